//! Flags of write requests and zero writes.

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
    }
}
