//! Power cuts during image-wide changes: of the size, the snapshots, the contents and the bitmaps.
//!
//! A run alternates between stages of requests and changes. Before a change, the run flushes and reads the disk, so that the
//! harness knows its contents. A power cut during a change must leave the contents and the snapshots from before the change, or
//! those from after the change. A power cut during a stage of requests must leave contents that the [`CrashOracle`] allows.
//! After any power cut the image opens, has at worst leaks, and accepts requests.
//!
//! Requests come from one simulated thread, so that a seed reproduces the run exactly, or from several I/O threads that are
//! delayed at random ([`oxblk_ring::perturb`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Preallocation};
use oxblk_ring::sim::{self, Disk};
use oxblk_ring::{Config, IoThread};

use super::history::{History, Replay};
use super::oracle::CrashOracle;
use super::qemu;
use super::run::tracked;
use super::threads::requests;
use crate::formats::Variant;
use crate::model::chain::{self, Chain, Image, Tolerance};
use crate::model::ops::{Op, Shape};
use crate::model::pool::Pool;
use crate::model::run::{self, Seen};
use crate::perturbed::Perturbed;
use crate::random::Random;
use crate::tally::Tally;
use crate::tasks::Tasks;

/// The largest number of operations in a batch, without the flush.
const BATCH: u64 = 6;
/// The largest number of snapshots that exist at the same time.
const KEPT: usize = 3;
/// The number of I/O threads.
const THREADS: usize = 3;
/// The number of tasks on each I/O thread.
const TASKS: usize = 3;

/// The threads that send the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// One thread of the simulated executor.
    OneThread,
    /// Several I/O threads.
    Threads,
}

/// The contents of a disk, and of its snapshots by their identifiers.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) active: Arc<[u8]>,
    pub(super) kept: Kept,
}

/// The contents of snapshots, by their identifiers.
pub(super) type Kept = BTreeMap<String, Arc<[u8]>>;

impl Content {
    /// Returns the content after `change` has succeeded. `ids` are the identifiers of the snapshots after the change.
    pub(super) fn after(&self, change: &Change, ids: &[String]) -> Self {
        let mut after = self.clone();
        match change {
            Change::Resize(size) => {
                let mut active = after.active.to_vec();
                active.resize(usize::try_from(*size).expect("a small disk"), 0);
                after.active = active.into();
            }
            Change::Take => {
                let new = ids.iter().find(|id| !after.kept.contains_key(*id)).cloned();
                after.kept.extend(new.map(|id| (id, Arc::clone(&self.active))));
            }
            Change::Apply(id) => after.active = Arc::clone(&after.kept[id]),
            Change::Remove(id) => drop(after.kept.remove(id)),
            Change::Empty => after.active = vec![0; after.active.len()].into(),
            Change::AddBitmap(_) | Change::RemoveBitmap(_) => {}
        }
        after
    }
}

/// An image-wide change.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Resize(u64),
    Take,
    Apply(String),
    Remove(String),
    Empty,
    AddBitmap(String),
    RemoveBitmap(String),
}

/// One stage of a run, with the write boundary at which the stage began.
enum Stage {
    Requests { from: u64, replay: Box<Replay>, kept: Kept },
    Change { from: u64, change: Change, before: Content, after: Content },
}

impl Stage {
    fn from(&self) -> u64 {
        match self {
            Stage::Requests { from, .. } | Stage::Change { from, .. } => *from,
        }
    }
}

/// The executor of the futures of a run.
enum Place {
    Sim,
    Threads(Vec<IoThread>),
}

/// The state of a run.
struct Run {
    seed: u64,
    shape: Shape,
    random: Random,
    disk: Disk,
    content: Content,
    bitmaps: Vec<String>,
    stages: Vec<Stage>,
    operations: u64,
}

fn gone<T: std::fmt::Debug>(gone: T) -> String {
    format!("a thread ended early: {gone:?}")
}

/// Reads the complete contents of the disk.
pub(super) async fn read_all(disk: &Backend) -> Result<Arc<[u8]>, String> {
    let all = Op::Read { offset: 0, len: disk.size() };
    match run::execute(disk, &all).await.map_err(|error| format!("{all:?}: {error}"))? {
        Seen::Bytes(bytes) => Ok(bytes.to_vec().into()),
        other => Err(format!("a read gave {other:?}")),
    }
}

pub(super) async fn carry_out(disk: &Backend, change: &Change) -> oxblk_core::Result<()> {
    match change {
        Change::Resize(size) => disk.resize(*size, Preallocation::Off).await,
        Change::Take => {
            let new = SnapshotInfo { name: "some".to_owned(), ..SnapshotInfo::default() };
            disk.create_snapshot(&new).await
        }
        Change::Apply(id) => disk.apply_snapshot(id).await,
        Change::Remove(id) => disk.delete_snapshot(id).await,
        Change::Empty => disk.make_empty().await,
        Change::AddBitmap(name) => {
            let node = disk.node()?;
            disk.graph().add_persistent_bitmap(&node, name, None).await.map(drop)
        }
        Change::RemoveBitmap(name) => {
            let node = disk.node()?;
            let bitmap = node.bitmaps().find(name)?;
            disk.graph().delete_bitmap(&node, &bitmap).await
        }
    }
}

async fn flush_and_read(disk: Backend) -> Result<Arc<[u8]>, String> {
    disk.flush().await.map_err(|error| format!("flushing: {error}"))?;
    read_all(&disk).await
}

/// Lists the snapshots of an image. Images of a format without snapshots have none.
pub(super) async fn snapshots(disk: &Backend) -> Result<Vec<SnapshotInfo>, String> {
    if disk.node().is_ok_and(|node| node.driver().snapshots().is_none()) {
        return Ok(Vec::new());
    }
    disk.snapshots().await.map_err(|error| format!("listing: {error}"))
}

async fn change_and_list(disk: Backend, change: Change) -> Result<Vec<String>, String> {
    carry_out(&disk, &change).await.map_err(|error| format!("{change:?}: {error}"))?;
    disk.flush().await.map_err(|error| format!("flushing after {change:?}: {error}"))?;
    let list = snapshots(&disk).await?;
    Ok(list.into_iter().map(|snapshot| snapshot.id).collect())
}

impl Run {
    fn next_change(&mut self, variant: &Variant) -> Change {
        let random = &mut self.random;
        let kept: Vec<&String> = self.content.kept.keys().collect();
        let size = self.content.active.len() as u64;
        let snapshots = variant.snapshots && !variant.options.contains("refcount_bits=1,");
        // An old image (version 2) with snapshots cannot be resized.
        let sized = !variant.options.contains("compat=0.10") || kept.is_empty();
        loop {
            match random.below(10) {
                0 | 1 if sized => {
                    let most = self.shape.size * 2;
                    let grown = (size + 512 * random.within(1, most / 1024)).min(most);
                    return Change::Resize(grown);
                }
                2 if sized && kept.is_empty() => {
                    return Change::Resize(512 * random.within(1, size / 512));
                }
                3 | 4 if snapshots && kept.len() < KEPT => return Change::Take,
                5 if !kept.is_empty() => return Change::Apply(random.pick(&kept).to_string()),
                6 if !kept.is_empty() => return Change::Remove(random.pick(&kept).to_string()),
                7 if kept.is_empty() && variant.backing && !variant.data_file => {
                    return Change::Empty;
                }
                8 if variant.bitmaps && self.bitmaps.len() < 3 => {
                    return Change::AddBitmap(format!("b{}", random.next_u64()));
                }
                9 if variant.bitmaps && !self.bitmaps.is_empty() => {
                    return Change::RemoveBitmap(random.pick(&self.bitmaps).clone());
                }
                _ => {}
            }
        }
    }

    /// Begins a stage of requests. Returns the history that records them.
    fn begin_requests(&mut self) -> History {
        self.shape.size = self.content.active.len() as u64;
        self.shape.longest = (self.shape.cluster * 4).clamp(4096, 512 << 10).min(self.shape.size);
        History::new(&[&self.disk])
    }

    fn end_requests(&mut self, from: u64, history: &History, now: Arc<[u8]>) -> Result<(), String> {
        self.operations += history.operations();
        let start = CrashOracle::new(Arc::clone(&self.content.active));
        history.replay(start.clone()).at_the_end().check(&now)?;
        let replay = Box::new(history.replay(start));
        self.stages.push(Stage::Requests { from, replay, kept: self.content.kept.clone() });
        self.content.active = now;
        Ok(())
    }

    fn end_change(&mut self, from: u64, change: Change, ids: &[String]) {
        let before = self.content.clone();
        let after = before.after(&change, ids);
        match &change {
            Change::AddBitmap(name) => self.bitmaps.push(name.clone()),
            Change::RemoveBitmap(name) => self.bitmaps.retain(|other| other != name),
            _ => {}
        }
        self.content = after.clone();
        self.stages.push(Stage::Change { from, change, before, after });
    }
}

async fn batches(disk: Backend, run: &mut Run, history: &History) -> Result<(), String> {
    for _ in 0..run.random.within(2, 6) {
        let mut batch = run.shape.random_batch(&mut run.random, BATCH);
        if run.random.one_in(3) {
            batch.push(Op::Flush);
        }
        let tasks: Vec<_> = batch
            .into_iter()
            .map(|op| oxblk_ring::spawn(tracked(disk.clone(), op, history.clone())))
            .collect();
        for task in tasks {
            task.await?;
        }
    }
    Ok(())
}

/// Runs one stage of requests and one change on the simulated executor.
async fn step(disk: &Backend, run: &mut Run, variant: &Variant) -> Result<(), String> {
    let (from, history) = (run.disk.write_boundaries(), run.begin_requests());
    batches(disk.clone(), run, &history).await?;
    let now = flush_and_read(disk.clone()).await?;
    run.end_requests(from, &history, now)?;
    let (from, change) = (run.disk.write_boundaries(), run.next_change(variant));
    let ids = change_and_list(disk.clone(), change.clone()).await?;
    run.end_change(from, change, &ids);
    let seen = read_all(disk).await?;
    if seen != run.content.active {
        return Err("the disk does not hold what it should after a change".to_owned());
    }
    Ok(())
}

/// Runs one stage of requests and one change on I/O threads.
fn step_on(
    threads: &[IoThread],
    disk: &Backend,
    run: &mut Run,
    variant: &Variant,
) -> Result<(), String> {
    let (from, history) = (run.disk.write_boundaries(), run.begin_requests());
    let operations = run.random.within(20, 60);
    let pool = Pool::new(run.shape.clone(), run.random.fork(), operations);
    let mut tasks = Tasks::new();
    for thread in threads.iter().cycle().take(THREADS * TASKS) {
        let (disk, pool, history) = (disk.clone(), pool.clone(), history.clone());
        tasks.spawn(thread, move || requests(disk, pool, history));
    }
    tasks.wait()?;
    pool.outcome()?;
    let reader = disk.clone();
    let now = threads[0].spawn(move || flush_and_read(reader)).wait().map_err(gone)??;
    run.end_requests(from, &history, now)?;
    let (from, change) = (run.disk.write_boundaries(), run.next_change(variant));
    let (changed, doing) = (disk.clone(), change.clone());
    let ids = threads[0].spawn(move || change_and_list(changed, doing)).wait().map_err(gone)??;
    run.end_change(from, change, &ids);
    Ok(())
}

fn work(chain: &Chain, run: &mut Run, steps: u64, place: &Place) -> Result<(), String> {
    let variant = chain[0].variant;
    match place {
        Place::Sim => sim::run(run.seed, async {
            let disk = chain::open(chain).await?;
            for number in 0..steps {
                let outcome = step(&disk, run, variant).await;
                outcome.map_err(|error| format!("step {number}: {error}"))?;
            }
            chain::close(disk).await
        }),
        Place::Threads(threads) => {
            let _perturbed = Perturbed::new(run.seed, variant.name);
            let images = chain.clone();
            let opening = threads[0].spawn(move || async move { chain::open_slow(&images).await });
            let disk = opening.wait().map_err(gone)??;
            for number in 0..steps {
                let outcome = step_on(threads, &disk, run, variant);
                outcome.map_err(|error| format!("step {number}: {error}"))?;
            }
            threads[0].spawn(move || chain::close(disk)).wait().map_err(gone)?
        }
    }
}

/// Reads the contents of a disk and of its snapshots, and checks that a write to the disk works.
async fn found(chain: &[Image]) -> Result<Content, String> {
    let disk = chain::open(chain).await.map_err(|e| format!("cannot be opened: {e}"))?;
    let active = read_all(&disk).await?;
    let list = snapshots(&disk).await?;
    let mut kept = BTreeMap::new();
    for snapshot in list {
        let applied = disk.apply_snapshot(&snapshot.id).await;
        applied.map_err(|e| format!("applying {}: {e}", snapshot.id))?;
        kept.insert(snapshot.id, read_all(&disk).await?);
    }
    // A write must succeed, and a read must return its data.
    if disk.size() >= 512 {
        let op = Op::Write { offset: 0, len: 512, seed: 3, fua: true };
        run::execute(&disk, &op).await.map_err(|e| format!("going on: {e}"))?;
        let seen = read_all(&disk).await?;
        if seen[..512] != crate::model::ops::content(3, 0, 512) {
            return Err("going on: a write is not there".to_owned());
        }
    }
    chain::close(disk).await.map_err(|e| format!("cannot be closed: {e}"))?;
    Ok(Content { active, kept })
}

fn is_same(found: &Content, expected: &Content) -> Result<(), String> {
    if found.active.len() != expected.active.len() {
        let (found, expected) = (found.active.len(), expected.active.len());
        return Err(format!("{found} bytes, not {expected}"));
    }
    if found.active == expected.active {
        return has_snapshots(&found.kept, &expected.kept);
    }
    let differs = found.active.iter().zip(&*expected.active).position(|(a, b)| a != b);
    match differs {
        Some(at) => Err(format!("byte {at:#x} differs")),
        None => has_snapshots(&found.kept, &expected.kept),
    }
}

fn has_snapshots(found: &Kept, expected: &Kept) -> Result<(), String> {
    if found.keys().ne(expected.keys()) {
        let ids = |kept: &Kept| kept.keys().cloned().collect::<Vec<_>>();
        return Err(format!("snapshots {:?}, not {:?}", ids(found), ids(expected)));
    }
    match expected.iter().find(|(id, bytes)| found.get(*id) != Some(bytes)) {
        Some((id, _)) => Err(format!("snapshot {id} holds something else")),
        None => Ok(()),
    }
}

/// Checks that a power cut at a boundary may leave these contents.
fn judge(stage: &mut Stage, boundary: u64, found: &Content) -> Result<(), String> {
    match stage {
        Stage::Requests { replay, kept, .. } => {
            replay.at(boundary).check(&found.active)?;
            has_snapshots(&found.kept, kept)
        }
        Stage::Change { change, before, after, .. } => {
            let Err(not_before) = is_same(found, before) else { return Ok(()) };
            let Err(not_after) = is_same(found, after) else { return Ok(()) };
            Err(format!(
                "during {change:?}: not as before ({not_before}), not as after ({not_after})"
            ))
        }
    }
}

/// Whether the copied flag may be missing in L1 and L2 entries of clusters with one reference. This is allowed while snapshots
/// change: the image is marked dirty during the change, and is repaired when it is next opened for writing.
fn claims_may_be_stale(stage: &Stage) -> bool {
    let snapshots =
        |change: &Change| matches!(change, Change::Take | Change::Apply(_) | Change::Remove(_));
    matches!(stage, Stage::Change { change, .. } if snapshots(change))
}

/// Whether the image has version 2, which has no dirty bit. After a power cut, copied flags may be missing in its entries. A
/// later write then makes an unneeded copy.
fn is_old(disk: &Disk) -> bool {
    disk.bytes().get(4..8).is_some_and(|version| *version == 2_u32.to_be_bytes())
}

/// Whether the image has the dirty bit set (the first incompatible feature of the qcow2 header), or cannot have it.
fn is_marked_dirty(disk: &Disk) -> bool {
    is_old(disk) || disk.bytes().get(79).is_some_and(|features| features & 1 == 1)
}

/// Examines the disks that a power cut at this moment may leave.
fn look(
    chain: &Chain,
    run: &mut Run,
    (boundary, moment): &(u64, Disk),
    number: usize,
) -> Result<Tally, String> {
    let (boundary, variant) = (*boundary, chain[0].variant);
    let left = [
        moment.after_power_loss_all(),
        moment.after_power_loss_none(),
        moment.after_power_loss(boundary),
        moment.after_power_loss(!boundary),
    ];
    let at = run.stages.partition_point(|stage| stage.from() <= boundary).saturating_sub(1);
    let mut tally = Tally { cuts: 1, ..Tally::default() };
    for (index, disk) in left.into_iter().enumerate() {
        let fail = |error: String| format!("cut at boundary {boundary}, disk {index}: {error}");
        let image = Image { variant, disk };
        let stage = run.stages.get_mut(at).ok_or("nothing had happened")?;
        let claims = claims_may_be_stale(stage);
        if !(variant.repairs_on_open || (claims && is_marked_dirty(&image.disk))) {
            sim::run(boundary, chain::check(&image, Tolerance::Leaks)).map_err(fail)?;
            if number.is_multiple_of(2) && number / 2 % 4 == index {
                tally.checked_by_qemu += 1;
                qemu::check(variant, &image.disk, Tolerance::Leaks).map_err(fail)?;
            }
        }
        let found = sim::run(boundary, found(std::slice::from_ref(&image))).map_err(fail)?;
        judge(stage, boundary, &found).map_err(fail)?;
        if !(claims && is_old(&image.disk)) {
            sim::run(boundary, chain::check(&image, Tolerance::Leaks)).map_err(fail)?;
        }
        tally.disks += 1;
    }
    Ok(tally)
}

fn attempt(variant: &'static Variant, seed: u64, cuts: usize, from: From) -> Result<Tally, String> {
    let mut random = Random::new(seed);
    let clusters = if variant.cluster >= 256 << 10 { 6 } else { random.within(16, 48) };
    let size = (clusters * variant.cluster).max(64 << 10) - 512 * random.below(4);
    let longest = (variant.cluster * 4).clamp(16 << 10, 512 << 10).min(size);
    let compress = variant.compress;
    let shape = Shape { size, cluster: variant.cluster, alignment: 512, compress, longest };
    let image = Image { variant, disk: Disk::new(seed, 0) };
    let chain = vec![image.clone()];
    sim::run(seed, async {
        // Write and flush the image before the first stage.
        chain::create(&image, size).await?;
        let disk = chain::open(&chain).await?;
        disk.flush().await.map_err(|error| error.to_string())?;
        chain::close(disk).await
    })?;
    let active = vec![0; usize::try_from(size).expect("a small disk")].into();
    let content = Content { active, kept: BTreeMap::new() };
    let (disk, steps) = (image.disk.clone(), random.within(4, 10));
    let (stages, bitmaps) = (Vec::new(), Vec::new());
    let mut run = Run { seed, shape, random, disk, content, bitmaps, stages, operations: 0 };
    let start = |n| IoThread::start(&format!("changes-{n}"), Config::default()).expect("a thread");
    let place = match from {
        From::OneThread => Place::Sim,
        From::Threads => Place::Threads((0..THREADS).map(start).collect()),
    };
    image.disk.keep_moments(seed, cuts);
    work(&chain, &mut run, steps, &place)?;
    let mut tally = Tally { operations: run.operations, ..Tally::default() };
    tally.chain(1);
    let mut moments = image.disk.moments();
    moments.sort_by_key(|(boundary, _)| *boundary);
    for (number, moment) in moments.iter().enumerate() {
        let seen = look(&chain, &mut run, moment, number);
        tally.add(&seen.map_err(|e| format!("{e}\n{}", qemu::keep(&chain, &moment.1)))?);
    }
    sim::run(0, chain::check(&image, Tolerance::Clean))?;
    Ok(tally)
}

/// Runs the changes of a seed, then examines the disks that a power cut may leave, at up to `cuts` of the write boundaries.
///
/// # Panics
/// When data is lost, or an image has worse faults than leaks. The message contains the seed and the boundary.
pub fn run(variant: &'static Variant, seed: u64, cuts: usize, from: From) -> Tally {
    let attempt = std::panic::AssertUnwindSafe(|| attempt(variant, seed, cuts, from));
    let outcome = std::panic::catch_unwind(attempt);
    match outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        Ok(tally) => tally,
        Err(error) => panic!("{} changes ({from:?}) seed {seed}: {error}", variant.name),
    }
}
