//! The reasons why requests to a node take the slow path: flags, and the number of serialising requests in progress.
//!
//! The flags and the number are in one atomic word, so that the fast path checks both with one load.

use std::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, SeqCst},
};

bitflags::bitflags! {
    /// Reasons why a request must take the slow path at a node.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct SlowPathFlags: u32 {
        /// Writes that contain only zeroes become zero writes.
        const DETECT_ZEROES = 1;
        /// A guard checks the data of writes, except for zero writes and compressed writes (probed raw images).
        const WRITE_GUARD = 4;
        /// Dirty bitmaps record the writes.
        const BITMAPS = 8;
        /// Copy-on-read: data that a read gets from the backing file is written to this node.
        const COPY_ON_READ = 16;
        /// The driver receives debug events.
        const DEBUG_EVENTS = 32;
        /// The primary child receives debug events, so the driver must report its accesses.
        const REPORTS_EVENTS = 64;
        /// The driver admits requests. The fast path asks the driver, so this flag alone does not make a request slow.
        const ADMITS = 128;
        /// Reads and changes are counted, so that serialising requests can wait for them.
        const TRACKS = 256;
        /// With [`Self::TRACKS`]: all requests in flight are counted, because those that began earlier have ended.
        const TRACKS_ALL = 512;
    }
}

/// The unit of the count of serialising requests (read-modify-write, copy-on-read). The flags have the lower 32 bits
/// of the word, and the count has the upper 32 bits. The count cannot overflow, because each request that is counted
/// occupies memory: 2^32 requests would need several terabytes.
const SERIALISING: u64 = 1 << 32;

/// The flags and the count of one node.
#[derive(Debug)]
pub(crate) struct SlowPath(AtomicU64);

impl SlowPath {
    pub(crate) fn new(flags: SlowPathFlags) -> Self {
        Self(AtomicU64::new(flags.bits().into()))
    }

    /// Whether a flag other than [`SlowPathFlags::ADMITS`] is set or a serialising request is in progress.
    pub(crate) fn is_needed(&self) -> bool {
        self.0.load(SeqCst) & !u64::from(SlowPathFlags::ADMITS.bits()) != 0
    }

    /// Whether one of these flags is set.
    pub(crate) fn has(&self, flag: SlowPathFlags) -> bool {
        self.0.load(Acquire) & u64::from(flag.bits()) != 0
    }

    pub(crate) fn set(&self, flag: SlowPathFlags) {
        self.0.fetch_or(flag.bits().into(), AcqRel);
    }

    /// Sets or clears a flag.
    pub(crate) fn assign(&self, flag: SlowPathFlags, on: bool) {
        if on { self.set(flag) } else { self.clear(flag) }
    }

    pub(crate) fn clear(&self, flag: SlowPathFlags) {
        self.0.fetch_and(!u64::from(flag.bits()), AcqRel);
    }

    pub(crate) fn begin_serialising(&self) {
        self.0.fetch_add(SERIALISING, SeqCst);
    }

    pub(crate) fn end_serialising(&self) {
        self.0.fetch_sub(SERIALISING, SeqCst);
    }

    pub(crate) fn is_serialising(&self) -> bool {
        self.0.load(SeqCst) >= SERIALISING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_holds_more_requests_than_sixteen_bits() {
        let state = SlowPath::new(SlowPathFlags::BITMAPS);
        for _ in 0..=1 << 16 {
            state.begin_serialising();
            assert!(state.is_serialising());
        }
        for _ in 0..=1 << 16 {
            assert!(state.is_serialising());
            state.end_serialising();
        }
        assert!(!state.is_serialising());
        assert!(state.has(SlowPathFlags::BITMAPS));
    }

    #[test]
    fn a_change_of_the_flags_keeps_the_count() {
        let state = SlowPath::new(SlowPathFlags::empty());
        assert!(!state.is_needed());
        state.begin_serialising();
        state.set(SlowPathFlags::WRITE_GUARD);
        state.clear(SlowPathFlags::all());
        assert!(state.is_needed() && state.is_serialising());
        assert!(!state.has(SlowPathFlags::WRITE_GUARD));
        state.end_serialising();
        assert!(!state.is_needed());
    }

    #[test]
    fn admission_alone_does_not_need_the_slow_path() {
        let state = SlowPath::new(SlowPathFlags::ADMITS);
        assert!(state.has(SlowPathFlags::ADMITS) && !state.is_needed() && !state.is_serialising());
        state.begin_serialising();
        assert!(state.is_needed());
    }
}
