//! Flags of requests.

bitflags::bitflags! {
    /// Flags of a write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct WriteFlags: u8 {
        /// The data is on stable storage when the write completes.
        const FUA = 1;
        /// The data is what a read would return already: nothing that a reader sees changes.
        const UNCHANGED = 2;
        /// Store the data compressed (formats that can; whole clusters).
        const COMPRESSED = 4;
    }
}

bitflags::bitflags! {
    /// Flags of a zero write.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct ZeroFlags: u8 {
        /// The zeroes are on stable storage when the request completes.
        const FUA = 1;
        /// The space may be given back to the host.
        const MAY_UNMAP = 2;
        /// Fail with `ENOTSUP` rather than write zeroes as data.
        const NO_FALLBACK = 4;
        /// They are the node's own: they stay zeroes whatever backing file it is given later. Without this, a format that
        /// has no other way to express zeroes may leave unallocated what nothing below it holds.
        const OWN = 8;
    }
}
