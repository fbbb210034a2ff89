//! [`Disk`]: a simulated disk with faults and power cuts.
//!
//! The head of [`sim`](super) describes the fault model.
//!
//! An operation takes effect when it completes, at a virtual time that the disk chooses. A write, an `fallocate` or a
//! change of size that is in flight at a power cut may have taken effect or not, independently for each sector and for
//! the size. A flush in flight has no effect.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::change::{Change, joined};
use super::damage::{ArmedDamage, Hit};
use super::faults::{ArmedRule, FaultOp, Faults};
use super::media::{Media, SECTOR, Survivors};
use super::moments::Moments;
use super::rng::Rng;
use crate::file::Extent;
use crate::reactor::{Op, Payload, Slot};

/// A simulated disk. A clone is another handle to the same disk. Sectors have 512 bytes. A write past the end extends
/// the disk.
#[derive(Clone)]
pub struct Disk(Arc<Mutex<State>>);

pub(super) struct State {
    media: Media,
    rng: Rng,
    faults: Faults,
    rules: Vec<ArmedRule>,
    /// Rules for operations that take effect, but report an error.
    late_rules: Vec<ArmedRule>,
    damage_rules: Vec<ArmedDamage>,
    /// The number of operations with damage.
    damaged: u64,
    boundaries: u64,
    cut_after: Option<u64>,
    /// The changes of the operations in flight.
    in_flight: BTreeMap<u64, Change>,
    next_id: u64,
    moments: Option<Arc<Moments>>,
}

/// An operation that has started.
#[derive(Clone, Copy)]
pub(crate) struct Started {
    id: u64,
    /// Number of the last change when the operation started. After a flush, all changes up to this number survive a
    /// power cut.
    change: u64,
}

impl Disk {
    fn with_media(seed: u64, media: Media) -> Disk {
        Disk(Arc::new(Mutex::new(State {
            media,
            rng: Rng::new(seed),
            faults: Faults::default(),
            rules: Vec::new(),
            late_rules: Vec::new(),
            damage_rules: Vec::new(),
            damaged: 0,
            boundaries: 0,
            cut_after: None,
            in_flight: BTreeMap::new(),
            next_id: 0,
            moments: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk of `size` bytes, which are all zero. The contents survive a power cut.
    pub fn new(seed: u64, size: u64) -> Disk {
        Disk::with_media(seed, Media::with_len(size))
    }

    /// A disk with these contents, which survive a power cut.
    pub fn from_bytes(seed: u64, bytes: &[u8]) -> Disk {
        Disk::with_media(seed, Media::from_bytes(bytes))
    }

    /// The contents that reads return. For an unreadable sector, the bytes that were written last.
    pub fn bytes(&self) -> Vec<u8> {
        let state = self.lock();
        let mut bytes = vec![0; usize::try_from(state.media.len()).unwrap_or(0)];
        state.media.read(0, &mut bytes);
        bytes
    }

    /// The size in bytes.
    pub fn len(&self) -> u64 {
        self.lock().media.len()
    }

    /// Whether the size is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Replaces the faults. The rules count the operations that complete after this call.
    pub fn set_faults(&self, faults: Faults) {
        let mut state = self.lock();
        state.rules = faults.fail.iter().cloned().map(ArmedRule::new).collect();
        state.late_rules = faults.fail_late.iter().cloned().map(ArmedRule::new).collect();
        state.damage_rules = faults.damage.iter().cloned().map(ArmedDamage::new).collect();
        state.faults = faults;
    }

    /// Silently changes the content of the sectors that contain bytes of this range, in every version that a power cut
    /// may leave. Sectors past the end of the disk do not change.
    pub fn corrupt(&self, range: Range<u64>) {
        let mut state = self.lock();
        let State { media, rng, .. } = &mut *state;
        for number in sectors(media, &range) {
            media.corrupt_at_rest(number, rng);
        }
    }

    /// Makes the sectors that contain bytes of this range unreadable, in every version that a power cut may leave. A
    /// write of a complete sector makes the sector readable again.
    pub fn make_unreadable(&self, range: Range<u64>) {
        let mut state = self.lock();
        for number in sectors(&state.media, &range) {
            state.media.spoil_at_rest(number);
        }
    }

    /// The number of operations in which a [`DamageRule`](super::DamageRule) took effect.
    pub fn damaged(&self) -> u64 {
        self.lock().damaged
    }

    /// Cuts the power when the disk has passed `n_writes` write boundaries since its creation. The completion of a
    /// write, an `fallocate`, a change of size or a flush is a write boundary, even if the operation fails. After the
    /// cut, all operations in flight and all new operations fail with `EIO`.
    pub fn cut_after(&self, n_writes: u64) {
        self.lock().cut_after = Some(n_writes);
    }

    /// Copies the disk before up to `most` of the following write boundaries, which are chosen at random with equal
    /// probability. [`moments`](Disk::moments) returns the copies. A test gets the states after a power cut from each
    /// copy ([`after_power_loss`](Disk::after_power_loss)), so one run covers many power cuts.
    pub fn keep_moments(&self, seed: u64, most: usize) {
        Disk::keep_common_moments(&[self], seed, most);
    }

    /// Like [`keep_moments`](Disk::keep_moments), for disks that lose power together: at a chosen boundary of one of
    /// the disks, all disks are copied.
    pub fn keep_common_moments(disks: &[&Disk], seed: u64, most: usize) {
        let handles = disks.iter().map(|disk| Arc::downgrade(&disk.0)).collect();
        let moments = Arc::new(Moments::new(handles, seed, most));
        for disk in disks {
            disk.lock().moments = Some(Arc::clone(&moments));
        }
    }

    /// The copies that [`keep_moments`](Disk::keep_moments) has made. For each copy: the number of boundaries that the
    /// disk had passed, and the disk at that time with its operations in flight.
    pub fn moments(&self) -> Vec<(u64, Disk)> {
        let common = self.common_moments().into_iter();
        common.filter_map(|(boundary, disks)| Some((boundary, disks.into_iter().next()?))).collect()
    }

    /// The copies that [`keep_common_moments`](Disk::keep_common_moments) has made. For each boundary: the number of
    /// boundaries that all disks together had passed, and a copy of each disk.
    pub fn common_moments(&self) -> Vec<(u64, Vec<Disk>)> {
        let moments = self.lock().moments.clone();
        moments.map_or_else(Vec::new, |moments| moments.kept())
    }

    /// An independent copy of the disk in its present state, and the number of boundaries that the disk has passed.
    pub(super) fn keep(state: &Arc<Mutex<State>>) -> (u64, Disk) {
        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = Disk::with_media(state.boundaries, state.media.clone());
        copy.lock().in_flight = state.in_flight.clone();
        (state.boundaries, copy)
    }

    /// Number of write boundaries passed.
    pub fn write_boundaries(&self) -> u64 {
        self.lock().boundaries
    }

    /// Whether the power has been cut.
    pub fn is_cut(&self) -> bool {
        self.lock().is_cut()
    }

    /// A possible state of the disk after a power cut at this moment. Each sector independently has its durable
    /// version or any later version, which may come from an operation in flight. The same holds for the size.
    pub fn after_power_loss(&self, rng_seed: u64) -> Disk {
        let mut rng = Rng::new(rng_seed);
        let state = self.lock();
        let mut media = state.media.clone();
        let mut started: Vec<&Change> = state.in_flight.values().collect();
        while !started.is_empty() {
            started.swap_remove(rng.index(started.len())).apply(&mut media);
        }
        Disk::with_media(rng_seed, media.after_power_loss(Survivors::Any(&mut rng)))
    }

    /// The disk after a power cut that loses everything that is not durable.
    pub fn after_power_loss_none(&self) -> Disk {
        Disk::with_media(0, self.lock().media.after_power_loss(Survivors::None))
    }

    /// The disk after a power cut that loses only the operations in flight.
    pub fn after_power_loss_all(&self) -> Disk {
        Disk::with_media(0, self.lock().media.after_power_loss(Survivors::All))
    }

    /// The size, as a handle of the disk reports it.
    pub(crate) fn file_len(&self) -> io::Result<u64> {
        let state = self.lock();
        state.check_power()?;
        Ok(state.media.len())
    }

    pub(crate) fn seek_extent(&self, offset: u64) -> io::Result<Extent> {
        let state = self.lock();
        state.check_power()?;
        if offset >= state.media.len() {
            return Err(io::Error::from_raw_os_error(libc::ENXIO));
        }
        let (is_data, end) = state.media.extent(offset);
        Ok(Extent { is_data, end })
    }

    /// Records the start of an operation. Returns the record and the duration of the operation.
    pub(super) fn begin(&self, op: Op, payload: &Payload) -> (Started, Duration) {
        let mut state = self.lock();
        let id = state.next_id;
        state.next_id += 1;
        if !state.is_cut()
            && let Some(change) = Change::of(op, payload)
        {
            state.in_flight.insert(id, change);
        }
        let range = state.faults.delay.clone();
        let delay = state.rng.duration(&range);
        (Started { id, change: state.media.change() }, delay)
    }

    /// Simulates the close of a handle. The close changes nothing, but a rule may make it fail.
    pub(crate) fn close(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.check_power()?;
        let mut failures =
            state.rules.iter_mut().filter_map(|r| r.errno_for(FaultOp::Close, &(0..u64::MAX)));
        failures.next().map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// Executes an operation that has started. Returns a count or a negative errno.
    pub(super) fn perform(&self, started: Started, slot: &mut Slot) -> i32 {
        let (kind, touched) = classify(slot.op, &slot.payload);
        let mut state = self.lock();
        if state.is_cut() {
            return -libc::EIO;
        }
        if kind != FaultOp::Read
            && let Some(moments) = state.moments.clone()
        {
            // The disk is unlocked, because `pass` locks all disks of the group, including this disk.
            drop(state);
            moments.pass();
            state = self.lock();
        }
        state.in_flight.remove(&started.id);
        let failure =
            state.rules.iter_mut().filter_map(|rule| rule.errno_for(kind, &touched)).next();
        let rate = state.faults.fail_rate;
        let failure = failure.or_else(|| state.rng.chance(rate).then_some(libc::EIO));
        if kind != FaultOp::Read {
            state.boundaries += 1;
        }
        if let Some(errno) = failure {
            return -errno;
        }
        let late =
            state.late_rules.iter_mut().filter_map(|rule| rule.errno_for(kind, &touched)).next();
        let hit = state.damage(kind, &touched);
        let outcome = state.apply(started, slot, hit);
        late.map_or(outcome, |errno| -errno)
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// The sectors of the disk that contain bytes of a range.
fn sectors(media: &Media, range: &Range<u64>) -> Range<u64> {
    range.start / SECTOR..range.end.min(media.len()).div_ceil(SECTOR)
}

fn span(offset: u64, len: u64) -> Range<u64> {
    offset..offset.saturating_add(len)
}

fn classify(op: Op, payload: &Payload) -> (FaultOp, Range<u64>) {
    match op {
        Op::Read { offset } => (FaultOp::Read, span(offset, payload.len() as u64)),
        Op::Write { offset, .. } => (FaultOp::Write, span(offset, payload.len() as u64)),
        Op::Fallocate { offset, len, .. } => (FaultOp::Fallocate, span(offset, len)),
        Op::Truncate { len } => (FaultOp::Truncate, len..u64::MAX),
        _ => (FaultOp::Sync, 0..u64::MAX),
    }
}

impl State {
    fn is_cut(&self) -> bool {
        self.cut_after.is_some_and(|n| self.boundaries >= n)
    }

    /// Fails with `EIO` after a power cut.
    fn check_power(&self) -> io::Result<()> {
        if self.is_cut() { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    /// The damage of an operation.
    fn damage(&mut self, kind: FaultOp, touched: &Range<u64>) -> Option<Hit> {
        let len = self.media.len();
        let State { damage_rules, rng, .. } = self;
        let hit = damage_rules.iter_mut().find_map(|rule| rule.damage_for(kind, touched, len, rng));
        self.damaged += u64::from(hit.is_some());
        hit
    }

    /// The number of bytes that a transfer of `len` bytes completes: fewer than `len` with the probability `short`.
    fn amount(&mut self, len: usize, short: f64) -> usize {
        if len > 1 && self.rng.chance(short) { 1 + self.rng.index(len - 1) } else { len }
    }

    fn apply(&mut self, started: Started, slot: &mut Slot, hit: Option<Hit>) -> i32 {
        let len = slot.payload.len();
        let place = |offset| hit.map_or(offset, |hit| hit.place(offset));
        let done = match slot.op {
            Op::Read { offset } => {
                let short = if hit.is_some() { 0.0 } else { self.faults.short_reads };
                let (offset, amount) = (place(offset), self.amount(len, short));
                if !self.media.is_readable(&span(offset, amount as u64)) {
                    return -libc::EIO;
                }
                self.read(offset, amount, &mut slot.payload)
            }
            Op::Write { offset, fua } => {
                let short = if hit.is_some() { 0.0 } else { self.faults.short_writes };
                let (offset, amount) = (place(offset), self.amount(len, short));
                if !self.media.is_changeable(&span(offset, amount as u64)) {
                    return -libc::EIO;
                }
                let done = self.write(offset, amount, fua, &slot.payload);
                if let Some(hit) = hit {
                    hit.after_write(&mut self.media, fua, &mut self.rng);
                }
                done
            }
            Op::Sync { .. } => {
                self.media.settle(started.change);
                0
            }
            Op::Fallocate { mode, offset, len } => return self.fallocate(mode, offset, len),
            Op::Truncate { len } => {
                self.media.truncate(len);
                0
            }
            Op::Recv { .. } | Op::Send { .. } | Op::Poll { .. } | Op::Call => {
                return -libc::EOPNOTSUPP;
            }
        };
        i32::try_from(done).unwrap_or(i32::MAX)
    }

    fn read(&self, offset: u64, amount: usize, payload: &mut Payload) -> usize {
        let mut done = 0;
        let mut one = |buf: &mut [u8]| {
            let want = buf.len().min(amount - done);
            if let Some(to) = buf.get_mut(..want) {
                done += self.media.read(offset.saturating_add(done as u64), to);
            }
        };
        match payload {
            Payload::Read(buf) => one(buf),
            Payload::ReadV(bufs) => bufs.iter_mut().for_each(|buf| one(buf)),
            Payload::ReadForeign(memory) => {
                let mut data = vec![0; memory.len()];
                one(&mut data);
                data.truncate(done);
                memory.copy_from(&data);
            }
            _ => {}
        }
        done
    }

    /// Writes the first `amount` bytes. The buffers are joined, so that a sector with bytes of two buffers has one new
    /// version.
    fn write(&mut self, offset: u64, amount: usize, fua: bool, payload: &Payload) -> usize {
        match payload {
            Payload::Write(buf) => {
                let data = buf.get(..amount).unwrap_or(buf);
                self.media.write(offset, data, fua);
                data.len()
            }
            Payload::WriteV(bufs) => {
                let mut data = joined(bufs);
                data.truncate(amount);
                self.media.write(offset, &data, fua);
                data.len()
            }
            Payload::WriteForeign(memory) => {
                let mut data = memory.to_buf();
                data.truncate(amount);
                self.media.write(offset, &data, fua);
                data.len()
            }
            _ => 0,
        }
    }

    fn fallocate(&mut self, mode: i32, offset: u64, len: u64) -> i32 {
        let Some(change) = Change::of_fallocate(mode, offset, len) else { return -libc::EINVAL };
        if let Change::Zero { .. } = change
            && !self.media.is_changeable(&span(offset, len))
        {
            return -libc::EIO;
        }
        change.apply(&mut self.media);
        0
    }
}
