//! Runs a workload, cuts the power at chosen write boundaries, and looks at what is left.

use std::cell::RefCell;
use std::rc::Rc;

use oxblk_core::Backend;
use oxblk_ring::sim::{self, Disk};

use super::oracle::CrashOracle;
use crate::drivers::Variant;
use crate::model::chain::{self, Chain, Image, Tolerance};
use crate::model::ops::{Op, Shape};
use crate::model::oracle::Oracle;
use crate::model::run::{self, Seen};
use crate::model::sim::new_disk;
use crate::random::Random;

/// The most operations under way at once.
const BATCH: u64 = 8;

/// What was done, for the report of a soak.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Operations that were carried out before the cuts.
    pub operations: u64,
    /// Power cuts: runs that ended in one.
    pub cuts: u64,
    /// Disks left by cuts that were opened, checked and compared.
    pub disks: u64,
    /// Of those, how many `qemu-img check` was run on.
    pub checked_by_qemu: u64,
}

impl Tally {
    /// Adds another count to this one.
    pub fn add(&mut self, other: Tally) {
        self.operations += other.operations;
        self.cuts += other.cuts;
        self.disks += other.disks;
        self.checked_by_qemu += other.checked_by_qemu;
    }
}

/// A workload: everything in it follows from the seed.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) seed: u64,
    pub(super) variant: &'static Variant,
    /// Whether there is a backing file with content.
    backed: bool,
    shape: Shape,
    pub(super) batches: Vec<Vec<Op>>,
}

/// The seed of the content of a backing file.
const BASE_CONTENT: u64 = 1;

impl Workload {
    pub(super) fn new(variant: &'static Variant, seed: u64) -> Self {
        let mut random = Random::new(seed);
        // Large clusters are dear to simulate and few of them meet all there is to meet.
        let large = variant.cluster >= 256 << 10;
        let clusters = if large { random.within(5, 10) } else { random.within(24, 80) };
        let size = (clusters * variant.cluster).max(64 << 10);
        let size = if random.one_in(2) { size } else { size - 512 * random.within(1, 7) };
        let longest = (variant.cluster * 4).clamp(16 << 10, 512 << 10).min(size);
        let compress = variant.compress;
        let shape = Shape { size, cluster: variant.cluster, alignment: 512, compress, longest };
        let flushes = random.within(2, 8);
        let batches = (0..random.within(8, 40)).map(|_| {
            let mut batch = shape.random_batch(&mut random, BATCH);
            if random.one_in(flushes) {
                batch.push(Op::Flush);
            }
            batch
        });
        let batches = batches.collect();
        Self { seed, variant, backed: variant.backing && random.one_in(2), shape, batches }
    }

    /// Makes the images, all of them durable; the active one is the last.
    pub(super) async fn build(&self) -> Result<Chain, String> {
        let mut chain = Chain::new();
        if self.backed {
            let base = Image { variant: self.variant, disk: new_disk(self.seed, false) };
            chain::create(&base, self.shape.size).await?;
            chain.push(base);
            let disk = chain::open(&chain).await?;
            let op = Op::Write { offset: 0, len: self.shape.size, seed: BASE_CONTENT, fua: false };
            run::execute(&disk, &op).await.map_err(|e| e.to_string())?;
            chain::close(disk).await?;
        }
        // No short writes: they would tear sectors, and a sector is written whole or not at all.
        let top = Image { variant: self.variant, disk: new_disk(self.seed ^ 1, false) };
        chain::create(&top, self.shape.size).await?;
        chain.push(top);
        let disk = chain::open(&chain).await?;
        disk.flush().await.map_err(|e| e.to_string())?;
        chain::close(disk).await?;
        Ok(chain)
    }

    pub(super) fn oracle(&self) -> CrashOracle {
        CrashOracle::new(self.shape.size, if self.backed { BASE_CONTENT } else { 0 })
    }
}

pub(super) fn active(chain: &Chain) -> &Disk {
    &chain.last().expect("a chain has an active image").disk
}

/// One operation, told to the oracle before and after. An error counts only while there is power.
pub(super) async fn tracked(
    disk: Backend,
    op: Op,
    oracle: Rc<RefCell<CrashOracle>>,
) -> Result<Seen, String> {
    let ticket = oracle.borrow_mut().issue(&op);
    let seen = run::execute(&disk, &op).await.map_err(|error| format!("{op:?}: {error}"))?;
    oracle.borrow_mut().complete(&op, ticket);
    Ok(seen)
}

/// Runs the batches until they end or the power is cut; gives the operations carried out.
async fn work(
    workload: &Workload,
    chain: &Chain,
    oracle: &Rc<RefCell<CrashOracle>>,
) -> Result<u64, String> {
    let power = active(chain).clone();
    let disk = match chain::open(chain).await {
        Ok(disk) => disk,
        Err(error) => return if power.is_cut() { Ok(0) } else { Err(error) },
    };
    let mut operations = 0;
    for batch in &workload.batches {
        let tasks: Vec<_> = batch
            .iter()
            .map(|op| oxblk_ring::spawn(tracked(disk.clone(), op.clone(), Rc::clone(oracle))))
            .collect();
        for task in tasks {
            let outcome = task.await;
            operations += 1;
            if let (Err(error), false) = (outcome, power.is_cut()) {
                return Err(error);
            }
        }
        if power.is_cut() {
            break;
        }
    }
    let closed = chain::close(disk).await;
    match closed {
        Err(error) if !power.is_cut() => Err(error),
        _ => Ok(operations),
    }
}

/// Write boundaries of the active disk: when the workload begins, and when it has ended.
fn measure(workload: &Workload) -> Result<(u64, u64), String> {
    sim::run(workload.seed, async {
        let chain = workload.build().await?;
        let before = active(&chain).write_boundaries();
        let oracle = Rc::new(RefCell::new(workload.oracle()));
        work(workload, &chain, &oracle).await?;
        let after = active(&chain).write_boundaries();
        let oracle = oracle.borrow().clone();
        look(workload, &chain, active(&chain), &oracle, Tolerance::Clean, false).await?;
        Ok((before, after))
    })
}

/// Looks at a disk that a power cut left: it opens, its check finds nothing worse than leaks, every
/// flushed byte is there, and it can be worked with and closed.
pub(super) async fn look(
    workload: &Workload,
    chain: &Chain,
    left: &Disk,
    oracle: &CrashOracle,
    tolerance: Tolerance,
    go_on: bool,
) -> Result<(), String> {
    let mut chain = chain.clone();
    let top = Image { variant: workload.variant, disk: left.clone() };
    if let Some(active) = chain.last_mut() {
        active.disk = left.clone();
    }
    let before = workload.variant.check && !workload.variant.repairs_on_open;
    if before {
        chain::check(&top, tolerance).await.map_err(|e| format!("before opening: {e}"))?;
    }
    let disk = chain::open(&chain).await.map_err(|e| format!("cannot be opened: {e}"))?;
    let all = Op::Read { offset: 0, len: workload.shape.size };
    let seen = run::execute(&disk, &all).await.map_err(|e| format!("cannot be read: {e}"))?;
    let Seen::Bytes(bytes) = seen else { return Err("a read without bytes".to_owned()) };
    oracle.check(&bytes)?;
    if go_on {
        let mut random = Random::new(workload.seed ^ 0x60);
        let mut model = Oracle::new(bytes.to_vec());
        for _ in 0..6 {
            let batch = workload.shape.random_batch(&mut random, BATCH);
            run::run_batch(&disk, &mut model, &batch)
                .await
                .map_err(|e| format!("going on: {e}"))?;
        }
        run::compare_all(&disk, &mut model).await.map_err(|e| format!("going on: {e}"))?;
    }
    chain::close(disk).await.map_err(|e| format!("cannot be closed: {e}"))?;
    if workload.variant.check {
        chain::check(&top, tolerance).await.map_err(|e| format!("after closing: {e}"))?;
    }
    Ok(())
}

/// Runs the workload with the power cut at the given boundary and looks at some of the disks that may
/// be left.
fn cut(workload: &Workload, boundary: u64, by_qemu: bool) -> Result<Tally, String> {
    let (chain, oracle, operations) = sim::run(workload.seed, async {
        let chain = workload.build().await?;
        active(&chain).cut_after(boundary);
        let oracle = Rc::new(RefCell::new(workload.oracle()));
        let operations = work(workload, &chain, &oracle).await?;
        let oracle = oracle.borrow().clone();
        Ok::<_, String>((chain, oracle, operations))
    })?;
    let power = active(&chain);
    let mut tally = Tally { operations, cuts: 1, ..Tally::default() };
    let left = [
        ("all that had completed is left", power.after_power_loss_all()),
        ("all that was not durable is lost", power.after_power_loss_none()),
        ("some of it is left", power.after_power_loss(boundary)),
        ("some of it is left", power.after_power_loss(!boundary)),
    ];
    for (index, (how, disk)) in left.iter().enumerate() {
        let fail = |error: String| format!("cut at boundary {boundary}, {how} ({index}): {error}");
        if by_qemu && workload.variant.check && !workload.variant.repairs_on_open && index >= 2 {
            super::qemu::check(workload.variant, disk, Tolerance::Leaks).map_err(fail)?;
            tally.checked_by_qemu += 1;
        }
        let go_on = (boundary + index as u64).is_multiple_of(3);
        sim::run(boundary, look(workload, &chain, disk, &oracle, Tolerance::Leaks, go_on))
            .map_err(fail)?;
        tally.disks += 1;
    }
    Ok(tally)
}

/// Runs the workload of a seed and cuts the power at up to `cuts` of its write boundaries. Every
/// `qemu_every`-th cut is also shown to `qemu-img check` (0: none).
///
/// # Panics
/// When flushed data is lost or an image is left worse than leaking, with the seed and the boundary.
pub fn run(variant: &'static Variant, seed: u64, cuts: u64, qemu_every: u64) -> Tally {
    let workload = Workload::new(variant, seed);
    let attempt = std::panic::AssertUnwindSafe(|| {
        let (first, last) = measure(&workload)?;
        let mut random = Random::new(seed ^ 0xc07);
        let mut tally = Tally::default();
        for n in 0..cuts.min(last - first) {
            let boundary = random.within(first + 1, last);
            let by_qemu = qemu_every > 0 && n.is_multiple_of(qemu_every);
            tally.add(cut(&workload, boundary, by_qemu)?);
        }
        Ok::<_, String>(tally)
    });
    let outcome = std::panic::catch_unwind(attempt);
    match outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        Ok(tally) => tally,
        Err(error) => panic!(
            "{} crash seed {seed} ({} bytes, backed: {}): {error}",
            variant.name, workload.shape.size, workload.backed
        ),
    }
}
