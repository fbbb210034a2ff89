//! Snapshots, growth and compaction while four I/O threads send requests to the image.
//!
//! Tasks on four threads execute requests that do not conflict. Concurrently, one more task takes, applies and removes
//! snapshots, grows the disk, compacts the image and flushes. A write that is in flight while a snapshot is taken may be in the
//! snapshot or not. A write that is in flight while a snapshot is applied may take effect before or after the snapshot. The
//! value of such bytes is unknown to the model until they are read or written again (`Model::forget`). A read may overlap
//! concurrent writes. Such a read returns for each byte the old value or the value of one of these writes (`Active::allows`).
//! The harness delays reads between the lookup of the host offset and the I/O, so that many other requests execute during the
//! delay.
//!
//! With [`Plan::uncounted_reads`], reads are not counted as requests in flight, so that freed clusters are not quarantined
//! until these reads have ended. The test must then find wrong data. The wrong data shows that the quarantine is needed, and
//! that the test detects a missing quarantine.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Errno, Preallocation};
use oxblk_ring::sim::{self, Disk};
use oxblk_ring::{Config, IoBufMut, IoThread};

use super::chain::{self, Image, Tolerance};
use super::ops::{Op, Shape, content};
use super::oracle::Oracle;
use super::pool::Next;
use super::run::{Seen, execute, judge};
use crate::crash::qemu;
use crate::formats::Variant;
use crate::perturbed::Perturbed;
use crate::random::Random;
use crate::tasks::Tasks;

/// The number of I/O threads.
const THREADS: usize = 4;
/// The number of tasks on each thread. Each task has one operation in flight.
const TASKS: usize = 3;
/// The minimum number of scheduler rounds for which a read is delayed.
const HELD_UP: usize = 60;
/// The number of requests that other tasks begin while a read is delayed. With this number, the amount of concurrent work does
/// not depend on the machine's speed.
const MEANWHILE: u64 = 40;
/// After this number of rounds, a read continues even without concurrent requests, because all tasks may be delayed reads.
const MAX_ROUNDS: usize = 3000;
/// The largest number of snapshots that exist at the same time.
const KEPT: usize = 3;

/// The work of a run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The number of requests.
    pub operations: u64,
    /// Whether snapshots are taken, applied and removed, the disk grows, and the image is compacted.
    pub changes: bool,
    /// Whether reads are not counted as requests in flight.
    pub uncounted_reads: bool,
}

/// The known contents of a disk.
#[derive(Clone)]
struct Model {
    oracle: Oracle,
    unknown: Vec<bool>,
}

fn slots(range: Range<u64>) -> Range<usize> {
    let index = |at| usize::try_from(at).expect("a disk that fits in memory");
    index(range.start)..index(range.end)
}

impl Model {
    fn new(size: u64) -> Self {
        let unknown = vec![false; slots(0..size).end];
        Self { oracle: Oracle::zeroed(size), unknown }
    }

    fn resize(&mut self, size: u64) {
        self.oracle.resize(size);
        self.unknown.resize(slots(0..size).end, false);
    }

    /// Records that the bytes may have any value.
    fn forget(&mut self, range: Range<u64>) {
        self.unknown[slots(range)].fill(true);
    }

    /// Takes the values of unknown bytes from data that was read.
    fn learn(&mut self, offset: u64, bytes: &[u8]) {
        let range = slots(offset..offset + bytes.len() as u64);
        if !self.unknown[range.clone()].contains(&true) {
            return;
        }
        let mut known = self.oracle.bytes()[range.clone()].to_vec();
        for ((known, byte), unknown) in
            known.iter_mut().zip(bytes).zip(&self.unknown[range.clone()])
        {
            if *unknown {
                *known = *byte;
            }
        }
        self.oracle.set(offset, &known);
        self.unknown[range].fill(false);
    }

    fn judge(&mut self, op: &Op, seen: &Seen) -> Result<(), String> {
        let range = slots(op.range());
        match seen {
            Seen::Bytes(bytes) => self.learn(op.range().start, bytes),
            Seen::Extents(_) if self.unknown[range.clone()].contains(&true) => return Ok(()),
            // A discarded byte keeps its value or becomes zero, so an unknown byte stays unknown.
            Seen::Done if op.changes() && !matches!(op, Op::Discard { .. }) => {
                self.unknown[range].fill(false);
            }
            _ => {}
        }
        judge(&mut self.oracle, op, seen)
    }
}

/// The known value of a byte when a read began.
#[derive(Clone, Copy, Debug)]
struct Old {
    byte: u8,
    /// The byte was discarded before, so it may also be zero.
    doubtful: bool,
}

/// A request in flight.
struct Active {
    op: Op,
    /// A snapshot is applied concurrently, so the result of the request is not known.
    ambiguous: bool,
    /// For a read: the known old values of its bytes, and the writes that overlap it.
    before: Vec<Option<Old>>,
    met: Vec<Op>,
}

fn overlap(one: &Op, other: &Op) -> bool {
    let (a, b) = (one.range(), other.range());
    a.start < b.end && b.start < a.end
}

/// Whether the two requests may be in flight concurrently. The requests must differ. They must use different bytes, one of them
/// must be a read, or neither of them must change the disk.
fn go_together(one: &Op, other: &Op) -> bool {
    let reads = |op: &Op| matches!(op, Op::Read { .. });
    one != other && (one.commutes_with(other) || reads(one) || reads(other))
}

impl Active {
    /// Whether a read that overlaps writes may return these bytes. Each byte must have its old value or the value of a write
    /// that overlaps this byte. A byte may also be zero if a discard overlaps it, or had discarded it before the read began. A
    /// byte whose old value is unknown may have any value.
    fn allows(&self, bytes: &[u8]) -> bool {
        let start = self.op.range().start;
        let made: Vec<(Range<u64>, Vec<u8>)> = self
            .met
            .iter()
            .filter_map(|op| match *op {
                Op::Write { offset, len, seed, .. } | Op::WriteCompressed { offset, len, seed } => {
                    Some((op.range(), content(seed, offset, len)))
                }
                _ => None,
            })
            .collect();
        let put = |at: u64, byte: u8| {
            made.iter().any(|(range, bytes)| {
                range.contains(&at) && bytes[slots(range.start..at).len()] == byte
            })
        };
        let zeroed = |at: u64| {
            self.met.iter().any(|op| {
                matches!(op, Op::WriteZeroes { .. } | Op::Discard { .. })
                    && op.range().contains(&at)
            })
        };
        (start..).zip(bytes).zip(&self.before).all(|((at, &byte), before)| {
            before.is_none_or(|old| old.byte == byte || byte == 0 && old.doubtful)
                || byte == 0 && zeroed(at)
                || put(at, byte)
        })
    }
}

/// The requests in flight and the image-wide change in progress.
struct State {
    model: Model,
    kept: BTreeMap<String, Model>,
    shape: Shape,
    random: Random,
    left: u64,
    under_way: Vec<Active>,
    /// The ranges of all writes, zero writes and discards that were in flight at any moment since the current image-wide change
    /// began. `None`: no image-wide change that needs these ranges is in progress.
    meanwhile: Option<Vec<Range<u64>>>,
    /// A snapshot is being applied, so the results of reads are not known.
    applying: bool,
    failure: Option<String>,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<State>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Next {
        let mut state = self.lock();
        if state.left == 0 {
            return Next::End;
        }
        for _ in 0..8 {
            let State { shape, random, under_way, .. } = &mut *state;
            let op = shape.random_op(random);
            if under_way.iter().all(|other| go_together(&op, &other.op)) {
                state.start(&op);
                state.left -= 1;
                if let (Some(meanwhile), true) = (&mut state.meanwhile, op.changes()) {
                    meanwhile.push(op.range());
                }
                return Next::Do(op);
            }
        }
        Next::Wait
    }

    fn done(&self, op: &Op, outcome: Result<Seen, String>) {
        let mut state = self.lock();
        let at = state.under_way.iter().position(|other| other.op == *op).expect("taken");
        let active = state.under_way.swap_remove(at);
        let judged = match outcome {
            Err(error) => Err(error),
            Ok(_) if active.ambiguous => {
                if op.changes() {
                    state.model.forget(op.range());
                }
                Ok(())
            }
            Ok(Seen::Bytes(bytes)) if !active.met.is_empty() => match active.allows(&bytes) {
                true => Ok(()),
                false => Err(format!(
                    "{op:?}: returned neither the old data nor that of {:?}",
                    active.met
                )),
            },
            Ok(seen) => state.model.judge(op, &seen),
        };
        if let Err(error) = judged {
            state.fail(error);
        }
    }

    /// Records that an image-wide change begins. `applying`: the change applies a snapshot, so it changes the disk's contents.
    fn begin(&self, applying: bool) {
        let mut state = self.lock();
        let changes = state.under_way.iter().filter(|active| active.op.changes());
        state.meanwhile = Some(changes.map(|active| active.op.range()).collect());
        state.applying = applying;
        if applying {
            state.under_way.iter_mut().for_each(|active| active.ambiguous = true);
        }
    }

    /// Records that the change has ended. Returns the ranges that were written during the change.
    fn end(state: &mut State) -> Vec<Range<u64>> {
        state.applying = false;
        state.meanwhile.take().unwrap_or_default()
    }
}

impl State {
    /// Records that a request begins.
    fn start(&mut self, op: &Op) {
        let (mut before, mut met) = (Vec::new(), Vec::new());
        for active in self.under_way.iter_mut().filter(|active| overlap(&active.op, op)) {
            if op.changes() {
                active.met.push(op.clone());
            } else if active.op.changes() {
                met.push(active.op.clone());
            }
        }
        if let Op::Read { .. } = op {
            let Model { oracle, unknown } = &self.model;
            let old = |at| {
                let byte = oracle.bytes()[slots(0..at).end];
                (!unknown[slots(0..at).end]).then(|| Old { byte, doubtful: oracle.is_doubtful(at) })
            };
            before = op.range().map(old).collect();
        }
        self.under_way.push(Active { op: op.clone(), ambiguous: self.applying, before, met });
    }

    fn fail(&mut self, error: String) {
        self.failure.get_or_insert(error);
        self.left = 0;
    }
}

async fn request(
    disk: &Backend,
    shared: &Shared,
    op: &Op,
    uncounted: bool,
) -> oxblk_core::Result<Seen> {
    let Op::Read { offset, len } = *op else { return execute(disk, op).await };
    if !uncounted {
        return held_up(execute(disk, op), shared).await;
    }
    let buf = IoBufMut::filled(usize::try_from(len).expect("fits in memory"), 0xee);
    let node = disk.node()?;
    held_up(node.driver().read(offset, buf), shared).await.map(Seen::Bytes)
}

/// Polls the future once, then delays it.
async fn held_up<T>(work: impl Future<Output = T>, shared: &Shared) -> T {
    let mut work = std::pin::pin!(work);
    let mut begun = None;
    std::future::poll_fn(|context| {
        if let Poll::Ready(outcome) = work.as_mut().poll(context) {
            begun = Some(outcome);
        }
        Poll::Ready(())
    })
    .await;
    if let Some(outcome) = begun {
        return outcome;
    }
    let until = shared.lock().left.saturating_sub(MEANWHILE);
    for round in 0..MAX_ROUNDS {
        if round >= HELD_UP && shared.lock().left <= until {
            break;
        }
        oxblk_ring::yield_now().await;
    }
    work.await
}

/// One task: executes requests until all requests are done.
async fn requests(disk: Backend, shared: Shared, uncounted: bool) {
    loop {
        let op = match shared.take() {
            Next::Do(op) => op,
            Next::Wait => {
                oxblk_ring::yield_now().await;
                continue;
            }
            Next::End => return,
        };
        let outcome = request(&disk, &shared, &op, uncounted).await;
        shared.done(&op, outcome.map_err(|error| format!("{op:?}: {error}")));
    }
}

/// The task that makes image-wide changes.
async fn changes(disk: Backend, shared: Shared, mut random: Random) {
    while shared.lock().left > 0 {
        if let Err(error) = change(&disk, &shared, &mut random).await {
            shared.lock().fail(error);
        }
        for _ in 0..random.below(40) {
            oxblk_ring::yield_now().await;
        }
    }
}

async fn change(disk: &Backend, shared: &Shared, random: &mut Random) -> Result<(), String> {
    let ids: Vec<String> = shared.lock().kept.keys().cloned().collect();
    let picked = (!ids.is_empty()).then(|| random.pick(&ids).clone());
    match (random.below(10), picked) {
        (0..3, _) if ids.len() < KEPT => take(disk, shared).await,
        (3..5, Some(id)) => {
            shared.begin(true);
            let applied = disk.apply_snapshot(&id).await;
            applied.map_err(|error| format!("applying {id}: {error}"))?;
            let state = &mut *shared.lock();
            state.model = state.kept[&id].clone();
            Shared::end(state).into_iter().for_each(|range| state.model.forget(range));
            Ok(())
        }
        (5..7, Some(id)) => {
            shared.lock().kept.remove(&id);
            disk.delete_snapshot(&id).await.map_err(|error| format!("removing {id}: {error}"))
        }
        (7, _) => {
            let size = disk.size() + random.within(1, 64) * 512;
            match disk.resize(size, Preallocation::Off).await {
                Ok(()) => shared.lock().model.resize(size),
                // An old image (version 2) with snapshots cannot be resized.
                Err(error) if error.to_string().contains("version 2") => {}
                Err(error) => return Err(format!("growing: {error}")),
            }
            Ok(())
        }
        (8, _) => {
            let done = disk.compact(64 << 10, &|_, _| true).await;
            done.map(drop).map_err(|error| format!("compacting: {error}"))
        }
        _ => disk.flush().await.map_err(|error| format!("flushing: {error}")),
    }
}

async fn take(disk: &Backend, shared: &Shared) -> Result<(), String> {
    shared.begin(false);
    let new = SnapshotInfo { name: "some".to_owned(), ..SnapshotInfo::default() };
    let taken = disk.create_snapshot(&new).await;
    let list = disk.snapshots().await.map_err(|error| format!("listing: {error}"))?;
    let state = &mut *shared.lock();
    let meanwhile = Shared::end(state);
    match taken {
        Ok(()) => {
            let id = list.last().ok_or("a snapshot that was taken is not there")?.id.clone();
            let mut model = state.model.clone();
            meanwhile.into_iter().for_each(|range| model.forget(range));
            state.kept.insert(id, model);
            Ok(())
        }
        // A refcount of one bit cannot count the second reference.
        Err(error) if error.raw_errno() == Errno::INVAL => Ok(()),
        Err(error) => Err(format!("taking a snapshot: {error}")),
    }
}

/// Reads the disk and compares it with the model.
async fn compare(disk: &Backend, model: &mut Model, what: &str) -> Result<(), String> {
    let all = Op::Read { offset: 0, len: model.oracle.len() };
    if disk.size() != model.oracle.len() {
        return Err(format!("{what}: {} bytes, not {}", disk.size(), model.oracle.len()));
    }
    let seen = execute(disk, &all).await.map_err(|error| format!("{what}: {error}"))?;
    model.judge(&all, &seen).map_err(|error| format!("{what}: {error}"))
}

/// Checks the contents of the disk and of all snapshots.
async fn compare_all(disk: Backend, shared: Shared) -> Result<(), String> {
    let (mut model, kept) = {
        let state = shared.lock();
        (state.model.clone(), state.kept.clone())
    };
    compare(&disk, &mut model, "at the end").await?;
    for (id, mut model) in kept {
        disk.apply_snapshot(&id).await.map_err(|error| format!("applying {id}: {error}"))?;
        compare(&disk, &mut model, &format!("snapshot {id}")).await?;
    }
    chain::close(disk).await
}

fn work(image: &Image, shared: &Shared, plan: Plan) -> Result<(), String> {
    let start = |n| IoThread::start(&format!("mixed-{n}"), Config::default()).expect("a thread");
    let threads: Vec<IoThread> = (0..THREADS).map(start).collect();
    let gone = |gone| format!("a thread ended early: {gone:?}");
    let images = vec![image.clone()];
    let opening = threads[0].spawn(move || async move { chain::open_slow(&images).await });
    let disk = opening.wait().map_err(gone)??;
    let mut tasks = Tasks::new();
    for thread in threads.iter().cycle().take(THREADS * TASKS) {
        let (disk, shared) = (disk.clone(), shared.clone());
        tasks.spawn(thread, move || requests(disk, shared, plan.uncounted_reads));
    }
    if plan.changes {
        let random = shared.lock().random.fork();
        let (disk, shared) = (disk.clone(), shared.clone());
        tasks.spawn(&threads[1], move || changes(disk, shared, random));
    }
    tasks.wait()?;
    if let Some(failure) = shared.lock().failure.take() {
        return Err(failure);
    }
    let shared = shared.clone();
    threads[0].spawn(move || compare_all(disk, shared)).wait().map_err(gone)?
}

/// Executes the plan of a seed on a new image.
///
/// # Errors
/// Describes the difference from the model.
pub fn attempt(variant: &'static Variant, seed: u64, plan: Plan) -> Result<(), String> {
    let clusters = if variant.cluster >= 256 << 10 { 6 } else { 40 };
    let size = (clusters * variant.cluster).max(64 << 10);
    let shape = Shape { longest: size / 4, ..Shape::of(variant, size) };
    let image = Image { variant, disk: Disk::new(seed, 0) };
    sim::run(seed, chain::create(&image, size))?;
    let shared = Shared(Arc::new(Mutex::new(State {
        model: Model::new(size),
        kept: BTreeMap::new(),
        shape,
        random: Random::new(seed),
        left: plan.operations,
        under_way: Vec::new(),
        meanwhile: None,
        applying: false,
        failure: None,
    })));
    let perturbed = Perturbed::new(seed, variant.name);
    work(&image, &shared, plan)?;
    drop(perturbed);
    sim::run(seed, chain::check(&image, Tolerance::Clean))?;
    qemu::check(variant, &image.disk, Tolerance::Clean)
}

/// Executes the plan of a seed on a new image.
///
/// # Panics
/// When the image differs from the model. The message contains the seed.
pub fn run(variant: &'static Variant, seed: u64, plan: Plan) {
    if let Err(error) = attempt(variant, seed, plan) {
        panic!("{} mixed seed {seed}: {error}", variant.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A read of 16 bytes with the value 5. The last 4 bytes were discarded before the read.
    fn read(met: Vec<Op>) -> Active {
        let old = |at| Some(Old { byte: 5, doubtful: at >= 12 });
        let op = Op::Read { offset: 0, len: 16 };
        Active { op, ambiguous: false, before: (0..16).map(old).collect(), met }
    }

    fn zeroes(range: Range<usize>) -> [u8; 16] {
        let mut bytes = [5; 16];
        bytes[range].fill(0);
        bytes
    }

    #[test]
    fn only_bytes_that_a_discard_covers_may_be_zero() {
        let write = Op::Write { offset: 0, len: 4, seed: 1, fua: false };
        for zeroing in
            [Op::Discard { offset: 4, len: 4 }, Op::WriteZeroes { offset: 4, len: 4, unmap: false }]
        {
            let read = read(vec![write.clone(), zeroing]);
            assert!(read.allows(&zeroes(0..0)));
            assert!(read.allows(&zeroes(4..8)));
            assert!(read.allows(&zeroes(12..16)));
            assert!(!read.allows(&zeroes(8..9)));
            assert!(!read.allows(&zeroes(3..4)));
        }
    }
}
