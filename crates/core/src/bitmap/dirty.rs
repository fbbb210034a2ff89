//! [`DirtyBitmap`]: a dirty bitmap with a name, flags, and possibly a successor.
//!
//! The current map, the enabled flag and the successor form one state behind an atomic pointer. Only the bits of the
//! maps change in place; every other change replaces the state, as the module `current` describes.
//! [`DirtyBitmap::mark`] follows the pointer. The lock `control` serialises all other changes; [`DirtyBitmap::mark`]
//! never takes this lock.
//!
//! **Successor.** A job that reads a bitmap freezes the bitmap. Until the job ends, the bitmap's successor records the
//! writes if the bitmap was enabled. If the job succeeds, the bitmap *abdicates*: the dirty bits of the successor
//! replace those of the bitmap. If the job fails, the bitmap *reclaims* the successor: the dirty bits of the successor
//! are added to those of the bitmap. Dropping a [`Successor`] reclaims the successor, so a cancelled job loses no dirty
//! bits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Guard};
use oxblk_ring::perturb::point;

use super::current::{mark_current, replace};
use super::{BitmapError, MAX_NAME, RangeMap};

bitflags::bitflags! {
    /// The states that [`DirtyBitmap::check`] tests. Each operation chooses which of these states are an error (QEMU:
    /// `BDRV_BITMAP_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Checks: u8 {
        /// Another operation uses the bitmap.
        const BUSY = 1;
        /// The bitmap is read-only.
        const READ_ONLY = 2;
        /// The contents are unusable.
        const INCONSISTENT = 4;
        /// An operation that changes the bitmap refuses these states.
        const CHANGE = 7;
        /// An operation that only reads the bitmap refuses these states.
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

/// Properties of a bitmap that `query-block` reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Name; empty if anonymous.
    pub name: String,
    /// Number of dirty bytes.
    pub count: u64,
    /// Bytes per bit.
    pub granularity: u64,
    /// The bitmap or its successor records writes.
    pub recording: bool,
    /// An operation has reserved the bitmap.
    pub busy: bool,
    /// The image stores the bitmap.
    pub persistent: bool,
    /// The contents are unusable.
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
    /// An enabled, clean bitmap of a disk of `size` bytes. A bitmap with an empty `name` is anonymous.
    ///
    /// # Errors
    /// [`BitmapError::NameTooLong`], and the errors of [`RangeMap::new`].
    pub fn new(name: &str, size: u64, granularity: u64) -> Result<Arc<Self>, BitmapError> {
        Self::with_map(name, RangeMap::new(size, granularity)?)
    }

    /// An enabled bitmap with the contents of `map`.
    ///
    /// # Errors
    /// [`BitmapError::NameTooLong`].
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

    /// The name; empty if the bitmap is anonymous.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets the bits of the range of a write that has completed, or that has failed and may have changed a part of the
    /// range. A bitmap that does not record writes ignores the call.
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

    /// The current map. A clear, a resize and the success of a job replace this map.
    pub fn map(&self) -> Arc<RangeMap> {
        self.state.load().own.map.clone()
    }

    /// The dirty bits of the bitmap and of its successor together. The driver stores these bits in the image.
    ///
    /// # Errors
    /// None in practice: the new map has the size and granularity of the old one.
    pub fn everything(&self) -> Result<Arc<RangeMap>, BitmapError> {
        let state = self.state.load();
        let Some(successor) = &state.successor else { return Ok(state.own.map.clone()) };
        let all = RangeMap::new(state.own.map.size(), state.own.map.granularity())?;
        all.absorb(&state.own.map);
        all.absorb(&successor.map);
        Ok(Arc::new(all))
    }

    /// Whether the bitmap or its successor records writes.
    pub fn is_recording(&self) -> bool {
        let state = self.state.load();
        state.own.enabled || state.successor.as_ref().is_some_and(|s| s.enabled)
    }

    /// Whether the bitmap itself (not its successor) records writes.
    pub fn is_enabled(&self) -> bool {
        self.state.load().own.enabled
    }

    /// Starts or stops recording. Call [`crate::Graph::enable_bitmap`] instead if the bitmap belongs to a node.
    pub fn set_enabled(&self, enabled: bool) {
        let _control = self.lock();
        self.change(|state| state.own.enabled = enabled);
    }

    /// Starts or stops recording in the successor, if there is one.
    pub fn set_successor_enabled(&self, enabled: bool) {
        let _control = self.lock();
        self.change(|state| {
            if let Some(successor) = &mut state.successor {
                successor.enabled = enabled;
            }
        });
    }

    /// Makes the entire bitmap clean and returns its former contents, for [`Self::restore`].
    ///
    /// # Errors
    /// None in practice: the new map has the size and granularity of the old one.
    pub(crate) fn clear(&self) -> Result<Arc<RangeMap>, BitmapError> {
        let _control = self.lock();
        let old = self.map();
        let empty = Arc::new(RangeMap::new(old.size(), old.granularity())?);
        self.change(|state| state.own.map = empty);
        Ok(old)
    }

    /// Undoes a `clear`. Ranges that were written after the clear stay dirty. If the disk was resized after the clear,
    /// the bitmap keeps the new size.
    pub fn restore(&self, old: &RangeMap) {
        let _control = self.lock();
        self.map().absorb(old);
    }

    /// Adds the dirty areas of `source` to this bitmap.
    ///
    /// # Errors
    /// When the sizes differ.
    pub(crate) fn merge_from(&self, source: &RangeMap) -> Result<(), BitmapError> {
        let _control = self.lock();
        self.map().merge(source)
    }

    /// Adapts the bitmap to a new size of the disk. Dirty bits past the new end are dropped; added space is clean.
    ///
    /// # Errors
    /// When the disk becomes too large for the granularity; the bitmap is then unchanged.
    pub fn resize(&self, size: u64) -> Result<(), BitmapError> {
        let _control = self.lock();
        let state = self.state.load_full();
        let own = resized(&state.own, size)?;
        let successor = state.successor.as_ref().map(|s| resized(s, size)).transpose()?;
        self.swap_copied(&State { own, successor }, |new| {
            new.own.map.absorb(&state.own.map);
            if let (Some(new), Some(old)) = (&new.successor, &state.successor) {
                new.map.absorb(&old.map);
            }
        });
        Ok(())
    }

    /// Returns an error if the bitmap is in one of the states of `checks`.
    ///
    /// # Errors
    /// [`BitmapError::Busy`], [`BitmapError::ReadOnly`] or [`BitmapError::Inconsistent`].
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

    /// Reserves the bitmap for an operation. Until the guard is dropped, a second reservation fails, and
    /// [`Self::check`] refuses the bitmap for operations that check [`Checks::BUSY`].
    ///
    /// # Errors
    /// When another operation uses the bitmap.
    pub(crate) fn hold(self: &Arc<Self>) -> Result<Busy, BitmapError> {
        match self.busy.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(Busy(self.clone())),
            Err(_) => Err(BitmapError::Busy(self.name.clone())),
        }
    }

    /// Freezes the bitmap for a job and creates a successor. If the bitmap was enabled, the successor records writes
    /// until the job ends.
    ///
    /// # Errors
    /// When the bitmap is in use or has a successor already.
    pub(crate) fn create_successor(self: &Arc<Self>) -> Result<Successor, BitmapError> {
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

    /// Whether an operation has reserved the bitmap.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Whether the bitmap is read-only. A bitmap that is stored in a read-only image is read-only.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Sets whether the bitmap is read-only.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Ordering::Release);
    }

    /// Whether the image stores the bitmap.
    pub fn is_persistent(&self) -> bool {
        self.persistent.load(Ordering::Acquire)
    }

    /// Sets whether the image stores the bitmap.
    pub fn set_persistent(&self, persistent: bool) {
        self.persistent.store(persistent, Ordering::Release);
    }

    /// Whether the contents are unusable: the image was not closed cleanly, for example.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent.load(Ordering::Acquire)
    }

    /// Marks the contents as unusable. The bitmap itself stops recording. Operations that check
    /// [`Checks::INCONSISTENT`] refuse the bitmap.
    pub fn set_inconsistent(&self) {
        self.set_enabled(false);
        self.inconsistent.store(true, Ordering::Release);
    }

    /// The properties that `query-block` reports.
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

    /// Replaces the state by a copy that `edit` has changed. The caller holds `control`.
    fn change(&self, edit: impl FnOnce(&mut State)) {
        let mut state = State::clone(&self.state.load());
        edit(&mut state);
        self.swap(state);
    }

    fn swap(&self, state: State) {
        replace(|| self.state.store(Arc::new(state)));
    }

    /// Replaces the state by `state`. `copy` copies the dirty bits of the old state into the new state, and is called
    /// twice. The first call ends before the new state is visible, so that no reader misses dirty bits. The second call
    /// copies the bits that other threads set in the old state before the replacement.
    fn swap_copied(&self, state: &State, copy: impl Fn(&State)) {
        copy(state);
        point();
        self.swap(state.clone());
        copy(state);
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
        self.swap_copied(&State { own, successor: None }, |new| {
            new.own.map.absorb(&successor.map);
        });
    }
}

fn resized(recorder: &Recorder, size: u64) -> Result<Recorder, BitmapError> {
    let map = Arc::new(RangeMap::new(size, recorder.map.granularity())?);
    Ok(Recorder { map, enabled: recorder.enabled })
}

/// A guard that reserves a bitmap for one operation until the guard is dropped.
pub struct Busy(Arc<DirtyBitmap>);

impl Busy {
    /// The reserved bitmap.
    pub fn bitmap(&self) -> &Arc<DirtyBitmap> {
        &self.0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.store(false, Ordering::Release);
    }
}

/// A bitmap that a job has frozen. Until this value is dropped, a successor records the writes if the bitmap was
/// enabled. Dropping this value without [`Self::abdicate`] reclaims the successor.
pub struct Successor {
    busy: Busy,
    ended: bool,
}

impl Successor {
    /// The frozen map. Only a resize of the disk changes this map before the job ends.
    pub fn frozen(&self) -> Arc<RangeMap> {
        self.busy.bitmap().map()
    }

    /// Ends a successful job: only ranges that the successor has recorded stay dirty.
    pub fn abdicate(mut self) {
        self.busy.bitmap().end_successor(true);
        self.ended = true;
    }

    /// Ends a failed job: ranges written since the freeze are added to the frozen bitmap.
    pub fn reclaim(self) {}
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.ended {
            self.busy.bitmap().end_successor(false);
        }
    }
}
