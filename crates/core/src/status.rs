//! Block status: what a driver, or a whole chain, knows of a range without reading it.

bitflags::bitflags! {
    /// What is known of an extent (the meanings are those of `qemu-img map` and the NBD
    /// `base:allocation` context).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct StatusFlags: u16 {
        /// The extent's contents are stored by this layer (or below) as data.
        const DATA = 1;
        /// The extent reads as zeroes.
        const ZERO = 2;
        /// [`Status::host`] is valid: the contents lie there unchanged, in the child told.
        const OFFSET_VALID = 4;
        /// The layer itself decides what the extent reads as; its backing file is not asked.
        const ALLOCATED = 8;
        /// The extent ends at the end of the node.
        const EOF = 16;
        /// The child that holds the data may know more (zeroes, holes).
        const RECURSE = 32;
        /// The data is compressed.
        const COMPRESSED = 64;
        /// This node only passes on what the child holds: data is what the child calls data.
        const PASSED_ON = 128;
    }
}

/// The status of one extent. `len` is in bytes, never more than was asked for and never 0 for a
/// range inside the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Bytes, from the offset asked for, that share this status.
    pub len: u64,
    /// What is known.
    pub flags: StatusFlags,
    /// Byte offset in `child` (or in the host file, at the end of the walk) where the data lies.
    pub host: Option<u64>,
    /// The child that `host` refers to; `None` means this node itself.
    pub child: Option<crate::ChildIdx>,
}

impl Status {
    /// Data stored by this node, at an offset that means nothing outside it.
    pub fn data(len: u64) -> Self {
        let flags = StatusFlags::DATA.union(StatusFlags::ALLOCATED);
        Self { len, flags, host: None, child: None }
    }

    /// An extent that this node makes read as zeroes.
    pub fn zero(len: u64) -> Self {
        let flags = StatusFlags::ZERO.union(StatusFlags::ALLOCATED);
        Self { len, flags, host: None, child: None }
    }

    /// An extent about which this node says nothing: the backing file decides.
    pub fn unallocated(len: u64) -> Self {
        Self { len, flags: StatusFlags::empty(), host: None, child: None }
    }

    /// What `child` has at `host`, passed on as it is.
    pub fn mapped(len: u64, child: crate::ChildIdx, host: u64) -> Self {
        let mut status = Self::stored(len, child, host);
        status.flags |= StatusFlags::PASSED_ON;
        status
    }

    /// Data of this node that lies unchanged at `host` in `child`, which may know that it is zero.
    pub fn stored(len: u64, child: crate::ChildIdx, host: u64) -> Self {
        let flags = StatusFlags::DATA
            .union(StatusFlags::ALLOCATED)
            .union(StatusFlags::OFFSET_VALID)
            .union(StatusFlags::RECURSE);
        Self { len, flags, host: Some(host), child: Some(child) }
    }

    /// Whether the extent reads as zeroes.
    pub fn is_zero(&self) -> bool {
        self.flags.contains(StatusFlags::ZERO)
    }

    /// Whether this layer decides what the extent reads as.
    pub fn is_allocated(&self) -> bool {
        self.flags.contains(StatusFlags::ALLOCATED)
    }
}
