//! A dirty bitmap as jobs and the monitor know it: a name, flags, and perhaps a successor.
//!
//! The map in use, whether it records, and the successor are one immutable state behind an atomic pointer, which
//! [`DirtyBitmap::mark`] follows and changes of the state replace as `current` says. Changes themselves are serialised
//! by `control`, which no marker takes.
//!
//! **Successor.** While a job reads a bitmap, writes are recorded in its successor. The job ends by
//! *abdicating* (success: the successor's marks become the bitmap's) or *reclaiming* (failure: they are added to
//! it). [`Successor`] reclaims when dropped, so a job that just vanishes loses nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};

use super::current::{mark_current, replace};
use super::{BitmapError, MAX_NAME, RangeMap};

bitflags::bitflags! {
    /// Which states of a bitmap an operation refuses.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Checks: u8 {
        /// In use by another operation.
        const BUSY = 1;
        /// Must not change.
        const READ_ONLY = 2;
        /// Contents were lost.
        const INCONSISTENT = 4;
        /// What an operation that changes the bitmap refuses.
        const CHANGE = 7;
        /// What an operation that only reads it refuses.
        const READ = 5;
    }
}

#[derive(Clone)]
struct Recorder {
    map: Arc<RangeMap>,
    enabled: bool,
}

impl Recorder {
    fn mark(&self, offset: u64, len: u64) {
        if self.enabled {
            self.map.set(offset, len);
        }
    }
}

#[derive(Clone)]
struct State {
    own: Recorder,
    successor: Option<Recorder>,
}

/// What `query-block` tells of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Name; empty if anonymous.
    pub name: String,
    /// Dirty bytes.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// Writes are being recorded, by it or its successor.
    pub recording: bool,
    /// An operation holds it.
    pub busy: bool,
    /// It is stored in the image when that is closed.
    pub persistent: bool,
    /// Its contents were lost.
    pub inconsistent: bool,
}

/// A named (or anonymous) dirty bitmap of a node.
pub struct DirtyBitmap {
    name: String,
    state: ArcSwap<State>,
    control: Mutex<()>,
    busy: AtomicBool,
    read_only: AtomicBool,
    persistent: AtomicBool,
    inconsistent: AtomicBool,
}

impl DirtyBitmap {
    /// An enabled, all-clean bitmap over `size` bytes; an empty `name` makes it anonymous.
    ///
    /// # Errors
    /// When the name is too long or [`RangeMap::new`] refuses.
    pub fn new(name: &str, size: u64, granularity: u64) -> Result<Arc<Self>, BitmapError> {
        Self::with_map(name, RangeMap::new(size, granularity)?)
    }

    /// An enabled bitmap with these contents.
    ///
    /// # Errors
    /// When the name is too long.
    pub fn with_map(name: &str, map: RangeMap) -> Result<Arc<Self>, BitmapError> {
        if crate::names::to_bytes(name).len() > MAX_NAME {
            return Err(BitmapError::NameTooLong(name.to_owned()));
        }
        let own = Recorder { map: Arc::new(map), enabled: true };
        Ok(Arc::new(Self {
            name: name.to_owned(),
            state: ArcSwap::from_pointee(State { own, successor: None }),
            control: Mutex::new(()),
            busy: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            persistent: AtomicBool::new(false),
            inconsistent: AtomicBool::new(false),
        }))
    }

    /// Its name; empty if anonymous.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Records a completed (or failed half-way) write.
    pub fn mark(&self, offset: u64, len: u64) {
        let is_same = |one: &Guard<Arc<State>>, other: &Guard<Arc<State>>| Arc::ptr_eq(one, other);
        mark_current(
            || self.state.load(),
            is_same,
            |state| {
                state.own.mark(offset, len);
                if let Some(successor) = &state.successor {
                    successor.mark(offset, len);
                }
            },
        );
    }

    /// The map as it is now; a clear or a resize gives the bitmap another.
    pub fn map(&self) -> Arc<RangeMap> {
        self.state.load().own.map.clone()
    }

    /// All that has been recorded, by it and by its successor: what an image that is closed now has to keep.
    ///
    /// # Errors
    /// None in practice: a new map is like the old one.
    pub fn everything(&self) -> Result<Arc<RangeMap>, BitmapError> {
        let state = self.state.load();
        let Some(successor) = &state.successor else { return Ok(state.own.map.clone()) };
        let all = RangeMap::new(state.own.map.size(), state.own.map.granularity())?;
        all.absorb(&state.own.map);
        all.absorb(&successor.map);
        Ok(Arc::new(all))
    }

    /// Whether writes are recorded, by it or by its successor.
    pub fn is_recording(&self) -> bool {
        let state = self.state.load();
        state.own.enabled || state.successor.as_ref().is_some_and(|s| s.enabled)
    }

    /// Whether the bitmap itself (not its successor) records writes.
    pub fn is_enabled(&self) -> bool {
        self.state.load().own.enabled
    }

    /// Starts or stops recording.
    pub fn set_enabled(&self, enabled: bool) {
        let _control = self.lock();
        self.change(|state| state.own.enabled = enabled);
    }

    /// Starts or stops recording in the successor, where there is one.
    pub fn set_successor_enabled(&self, enabled: bool) {
        let _control = self.lock();
        self.change(|state| {
            if let Some(successor) = &mut state.successor {
                successor.enabled = enabled;
            }
        });
    }

    /// Makes all of it clean and returns what was there, for [`Self::restore`].
    ///
    /// # Errors
    /// None in practice: the new map is like the old one.
    pub fn clear(&self) -> Result<Arc<RangeMap>, BitmapError> {
        let _control = self.lock();
        let old = self.map();
        let empty = Arc::new(RangeMap::new(old.size(), old.granularity())?);
        self.change(|state| state.own.map = empty);
        Ok(old)
    }

    /// Undoes a [`Self::clear`]; what was marked since stays marked.
    pub fn restore(&self, old: &Arc<RangeMap>) {
        let _control = self.lock();
        let since = self.map();
        self.change(|state| state.own.map = old.clone());
        old.absorb(&since);
    }

    /// Adds what `source` has dirty.
    ///
    /// # Errors
    /// When the sizes differ.
    pub fn merge_from(&self, source: &RangeMap) -> Result<(), BitmapError> {
        let _control = self.lock();
        self.map().merge(source)
    }

    /// Follows a change of the disk's size: what is cut off is forgotten, what is added is clean.
    ///
    /// # Errors
    /// When the disk gets too large for the granularity; the bitmap is then unchanged.
    pub fn resize(&self, size: u64) -> Result<(), BitmapError> {
        let _control = self.lock();
        let state = self.state.load_full();
        let own = resized(&state.own, size)?;
        let successor = state.successor.as_ref().map(|s| resized(s, size)).transpose()?;
        self.swap(State { own: own.clone(), successor: successor.clone() });
        own.map.absorb(&state.own.map);
        if let (Some(new), Some(old)) = (&successor, &state.successor) {
            new.map.absorb(&old.map);
        }
        Ok(())
    }

    /// Refuses if the bitmap is in one of the states of `checks`.
    ///
    /// # Errors
    /// The state it is in.
    pub fn check(&self, checks: Checks) -> Result<(), BitmapError> {
        if checks.contains(Checks::BUSY) && self.is_busy() {
            return Err(BitmapError::Busy(self.name.clone()));
        }
        if checks.contains(Checks::READ_ONLY) && self.is_read_only() {
            return Err(BitmapError::ReadOnly(self.name.clone()));
        }
        if checks.contains(Checks::INCONSISTENT) && self.is_inconsistent() {
            return Err(BitmapError::Inconsistent(self.name.clone()));
        }
        Ok(())
    }

    /// Takes the bitmap for an operation; others are refused until the guard is dropped.
    ///
    /// # Errors
    /// When another operation holds it.
    pub fn hold(self: &Arc<Self>) -> Result<Busy, BitmapError> {
        match self.busy.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(Busy(self.clone())),
            Err(_) => Err(BitmapError::Busy(self.name.clone())),
        }
    }

    /// Freezes the bitmap for a job; a successor records from now on, if the bitmap did.
    ///
    /// # Errors
    /// When the bitmap is in use or has a successor already.
    pub fn create_successor(self: &Arc<Self>) -> Result<Successor, BitmapError> {
        let busy = self.hold()?;
        let _control = self.lock();
        let state = self.state.load_full();
        if state.successor.is_some() {
            return Err(BitmapError::HasSuccessor);
        }
        let own = &state.own;
        let map = Arc::new(RangeMap::new(own.map.size(), own.map.granularity())?);
        let successor = Recorder { map, enabled: own.enabled };
        let own = Recorder { map: own.map.clone(), enabled: false };
        self.swap(State { own, successor: Some(successor) });
        Ok(Successor { busy, ended: false })
    }

    /// Whether an operation holds it.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Whether it must not change (its image is read-only).
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Sets whether it must not change.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Release);
    }

    /// Whether it is stored in the image.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Ordering::Acquire)
    }

    /// Sets whether it is stored in the image.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.store(persistent, Ordering::Release);
    }

    /// Whether its contents were lost (the image was not closed cleanly).
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent.load(Ordering::Acquire)
    }

    /// Marks its contents as lost: it stops recording and can only be removed.
    pub fn set_inconsistent(&self) {
        self.set_enabled(false);
        self.inconsistent.store(true, Ordering::Release);
    }

    /// What `query-block` tells of it.
    pub fn info(&self) -> BitmapInfo {
        let map = self.map();
        BitmapInfo {
            name: self.name.clone(),
            count: map.count(),
            granularity: map.granularity(),
            recording: self.is_recording(),
            busy: self.is_busy(),
            persistent: self.is_persistent(),
            inconsistent: self.is_inconsistent(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Swaps in a changed copy of the state; the caller holds `control`.
    fn change(&self, edit: impl FnOnce(&mut State)) {
        let mut state = State::clone(&self.state.load());
        edit(&mut state);
        self.swap(state);
    }

    fn swap(&self, state: State) {
        replace(|| self.state.store(Arc::new(state)));
    }

    fn end_successor(&self, abdicate: bool) {
        let _control = self.lock();
        let state = self.state.load_full();
        let Some(successor) = &state.successor else { return };
        if abdicate {
            self.swap(State { own: successor.clone(), successor: None });
            return;
        }
        let own = Recorder { map: state.own.map.clone(), enabled: successor.enabled };
        self.swap(State { own: own.clone(), successor: None });
        own.map.absorb(&successor.map);
    }
}

fn resized(recorder: &Recorder, size: u64) -> Result<Recorder, BitmapError> {
    let map = Arc::new(RangeMap::new(size, recorder.map.granularity())?);
    Ok(Recorder { map, enabled: recorder.enabled })
}

/// Holds a bitmap for one operation.
pub struct Busy(Arc<DirtyBitmap>);

impl Busy {
    /// The bitmap held.
    pub fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}

/// A job's hold on a bitmap whose writes go to a successor meanwhile. Dropping it reclaims.
pub struct Successor {
    busy: Busy,
    ended: bool,
}

impl Successor {
    /// The bitmap as it was frozen; nothing changes it while this lives.
    pub fn frozen(&self) -> Arc<RangeMap> {
        self.busy.bitmap().map()
    }

    /// The job succeeded: only what was written meanwhile stays dirty.
    pub fn abdicate(mut self) {
        self.busy.bitmap().end_successor(true);
        self.ended = true;
    }

    /// The job failed: what was written meanwhile is added.
    pub fn reclaim(self) {}
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.ended {
            self.busy.bitmap().end_successor(false);
        }
    }
}
