//! Flags of reads, writes and zero writes.

bitflags::bitflags! {
    /// Flags of a read.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct ReadFlags: u8 {
        /// Data that the node has not allocated is also written to the node (copy-on-read), as if the node had the setting
        /// `copy-on-read`. The user of the node needs the permission to write unchanged data.
        const COPY_ON_READ = 1;
    }
}

bitflags::bitflags! {
    /// Flags of a write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct WriteFlags: u8 {
        /// The data is on stable storage when the write completes.
        const FUA = 1;
        /// The data equals the data that a read of the range returns, so no reader sees a change.
        const UNCHANGED = 2;
        /// Store the data compressed. Only some formats support this, and only for whole clusters and for the
        /// incomplete cluster at the end of the disk.
        const COMPRESSED = 4;
        /// The write waits for all reads and changes in flight that overlap it, and holds back later ones until it has ended.
        /// Zeroes in the data are not detected. The node must track its requests ([`RequestTracking`](crate::RequestTracking)).
        const SERIALISING = 8;
    }
}

bitflags::bitflags! {
    /// Flags of a zero write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct ZeroFlags: u8 {
        /// The zeroes are on stable storage when the request completes.
        const FUA = 1;
        /// The host may free the space.
        const MAY_UNMAP = 2;
        /// Fail with `ENOTSUP` rather than write zeroes as data.
        const NO_FALLBACK = 4;
        /// The image itself must record the zeroes, so that the range still reads as zeroes if the backing file is
        /// changed later. Without this flag, a format that cannot record zeroes in another way may leave a range
        /// unallocated if no image below has data there.
        const OWN = 8;
        /// The data equals the data that a read of the range returns, so no reader sees a change.
        const UNCHANGED = 16;
        /// As [`WriteFlags::SERIALISING`]. A long range is zeroed in several pieces, one after the other.
        const SERIALISING = 32;
    }
}

impl WriteFlags {
    /// The flags of a zero write that concern its order and its permission, for a write of zeroes as data.
    pub(crate) fn of_zero_write(flags: ZeroFlags) -> Self {
        let mut own = Self::empty();
        own.set(Self::UNCHANGED, flags.contains(ZeroFlags::UNCHANGED));
        own.set(Self::SERIALISING, flags.contains(ZeroFlags::SERIALISING));
        own
    }
}
