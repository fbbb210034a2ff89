//! Block status: the properties of a range that a driver or a backing chain reports without reading the data.

bitflags::bitflags! {
    /// Properties of an extent. Except for [`Self::PASSED_ON`], they correspond to the flags `BDRV_BLOCK_*` of QEMU.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct StatusFlags: u16 {
        /// This node, or a node below it, stores the extent's contents as data.
        const DATA = 1;
        /// The extent reads as zeroes.
        const ZERO = 2;
        /// [`Status::host`] is valid: the contents lie unchanged at that offset in [`Status::child`].
        const OFFSET_VALID = 4;
        /// This node, not its backing file, determines the contents of the extent.
        const ALLOCATED = 8;
        /// The extent ends at the end of the node.
        const EOF = 16;
        /// The child that stores the data may have a more precise status (zeroes, holes).
        const RECURSE = 32;
        /// The data is compressed.
        const COMPRESSED = 64;
        /// This node only forwards the child's data: the extent is data only if the child reports data.
        const PASSED_ON = 128;
    }
}

/// The status of one extent. `len` is in bytes, never more than the requested length, and never 0 for a range inside
/// the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Length in bytes, from the requested offset, of the extent with this status.
    pub len: u64,
    /// Properties of the extent.
    pub flags: StatusFlags,
    /// Byte offset of the data in `child`, or in this node if `child` is `None`.
    pub host: Option<u64>,
    /// The child that `host` refers to; `None`: this node itself.
    pub child: Option<crate::ChildIdx>,
}

impl Status {
    /// Data that this node stores at an offset that has no meaning outside the node.
    pub fn data(len: u64) -> Self {
        let flags = StatusFlags::DATA.union(StatusFlags::ALLOCATED);
        Self { len, flags, host: None, child: None }
    }

    /// An extent that this node has recorded as zeroes.
    pub fn zero(len: u64) -> Self {
        let flags = StatusFlags::ZERO.union(StatusFlags::ALLOCATED);
        Self { len, flags, host: None, child: None }
    }

    /// An extent that this node has not allocated: the backing file determines its contents.
    pub fn unallocated(len: u64) -> Self {
        Self { len, flags: StatusFlags::empty(), host: None, child: None }
    }

    /// An extent that this node forwards unchanged to `child` at offset `host`.
    pub fn mapped(len: u64, child: crate::ChildIdx, host: u64) -> Self {
        let mut status = Self::stored(len, child, host);
        status.flags |= StatusFlags::PASSED_ON;
        status
    }

    /// Data of this node that lies unchanged at `host` in `child`. The child may report that the data is zero.
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

    /// Whether this node, not its backing file, determines the contents of the extent.
    pub fn is_allocated(&self) -> bool {
        self.flags.contains(StatusFlags::ALLOCATED)
    }
}
