//! Runs of requests and image-wide changes in which one operation of the disk fails: in each run another operation.
//!
//! The harness repeats the same steps. In each repetition another write, flush, change of size, zeroing or punching of the
//! active image's disk fails, with `ENOSPC` or `EIO`. These properties must hold:
//!
//! - a failed request leaves the old data, or part of the new data; a failed image-wide change leaves the state from before the
//!   change, or the state from after it;
//! - later steps succeed, except those that the image refuses because the value of one of its pointers is unknown;
//! - a power cut right after a failed request loses nothing that was flushed;
//! - at the end the image can be closed and opened, has at worst leaks, contains the data that was read last, and accepts a
//!   write.

use std::sync::Arc;

use oxblk_core::{Backend, Errno};
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};

use super::changes::{Change, Content, carry_out, read_all, snapshots};
use super::oracle::CrashOracle;
use crate::filters::Stack;
use crate::filters::disks::Disks;
use crate::formats::Variant;
use crate::model::chain::{self, Image, Tolerance};
use crate::model::ops::{Op, Shape};
use crate::model::run;
use crate::random::Random;
use crate::tally::Tally;

/// The kinds of operation that fail.
const KINDS: [FaultOp; 4] = [FaultOp::Write, FaultOp::Sync, FaultOp::Fallocate, FaultOp::Truncate];

/// One step of a run.
#[derive(Clone, Debug)]
enum Step {
    Request(Op),
    Change(Change),
}

/// Returns the steps of a seed: requests that change the disk, flushes, and each image-wide change that the variant supports
/// once or twice.
fn steps(shape: &Shape, variant: &Variant, random: &mut Random, stack: &Stack) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut now = shape.clone();
    let plain = *stack == Stack::default();
    // Snapshots are not taken through filters above the image, and the image is not emptied through them.
    let snapshots = plain && variant.snapshots && !variant.options.contains("refcount_bits=1,");
    let requests = |steps: &mut Vec<Step>, now: &Shape, random: &mut Random| {
        for _ in 0..5 {
            let op = now.random_op(random);
            if op.changes() || op == Op::Flush {
                steps.push(Step::Request(op));
            }
        }
        steps.push(Step::Request(Op::Flush));
    };
    requests(&mut steps, &now, random);
    requests(&mut steps, &now, random);
    if snapshots {
        steps.push(Step::Change(Change::Take));
        requests(&mut steps, &now, random);
        steps.push(Step::Change(Change::Apply("1".to_owned())));
        requests(&mut steps, &now, random);
        steps.push(Step::Change(Change::Remove("1".to_owned())));
    }
    if stack.resizes(variant) {
        now.size = (now.size * 3 / 2).next_multiple_of(512);
        steps.push(Step::Change(Change::Resize(now.size)));
        requests(&mut steps, &now, random);
        now.size = (now.size / 2).next_multiple_of(512);
        now.longest = now.longest.min(now.size);
        steps.push(Step::Change(Change::Resize(now.size)));
        requests(&mut steps, &now, random);
    }
    if plain && variant.backing && !variant.data_file {
        steps.push(Step::Change(Change::Empty));
        requests(&mut steps, &now, random);
    }
    steps
}

/// The harness's knowledge of the disk during a run.
struct Known {
    content: Content,
    /// The contents that a power cut may leave.
    durable: CrashOracle,
}

async fn seen(disk: &Backend, kept: &Content) -> Result<Content, String> {
    Ok(Content { active: read_all(disk).await?, kept: kept.kept.clone() })
}

/// Opens the image that a power cut may leave, and returns its contents.
async fn after_cut(variant: &'static Variant, disk: Disk) -> Result<Arc<[u8]>, String> {
    let image = Image { variant, disk };
    if !variant.repairs_on_open {
        chain::check(&image, Tolerance::Leaks).await?;
    }
    let disk = chain::open(std::slice::from_ref(&image)).await?;
    let bytes = read_all(&disk).await?;
    chain::close(disk).await?;
    Ok(bytes)
}

/// The image, and the disks of the filters.
struct Medium {
    variant: &'static Variant,
    disks: Disks,
}

impl Known {
    /// Executes one step. Returns whether the step failed. A change that the format does not support while a snapshot exists
    /// does not count as a failure.
    async fn step(&mut self, disk: &Backend, medium: &Medium, step: &Step) -> Result<bool, String> {
        let outcome = match step {
            Step::Request(op) if op.range().end > disk.size() => return Ok(false),
            Step::Request(op) => {
                let ticket = self.durable.issue(op);
                let mut possible = CrashOracle::new(Arc::clone(&self.content.active));
                possible.issue(op);
                let outcome = run::execute(disk, op).await.map(drop);
                if outcome.is_ok() {
                    self.durable.complete(op, ticket);
                }
                let now = seen(disk, &self.content).await?;
                possible.check(&now.active)?;
                self.content = now;
                outcome
            }
            Step::Change(Change::Apply(id) | Change::Remove(id))
                if !self.content.kept.contains_key(id) =>
            {
                return Ok(false);
            }
            Step::Change(change) => {
                let before = self.content.clone();
                let after = before.after(change, &["1".to_owned()]);
                let outcome = carry_out(disk, change).await;
                let list = snapshots(disk).await?;
                let now = read_all(disk).await?;
                let is =
                    |content: &Content| content.active == now && content.kept.len() == list.len();
                if !is(&after) && (outcome.is_ok() || !is(&before)) {
                    return Err(format!("{outcome:?} left neither the old state nor the new one"));
                }
                self.content = if is(&after) { after } else { before };
                let outcome = match outcome {
                    Ok(()) => disk.flush().await,
                    failed => failed,
                };
                // After a failure, a power cut may leave the old or the new state until the next flush.
                self.durable = CrashOracle::new(Arc::clone(&self.content.active));
                outcome
            }
        };
        let Err(error) = outcome else { return Ok(false) };
        // The snapshot whose removal failed still exists, and the format does not allow this change while a snapshot exists.
        if error.kind() == oxblk_core::ErrorKind::Unsupported {
            return Ok(false);
        }
        if let Step::Request(_) = step {
            let on = medium.disks.image_disk();
            for left in [on.after_power_loss_none(), on.after_power_loss_all()] {
                let fail = |e| format!("{error}, and after a power cut: {e}");
                let left = medium.disks.on(&[left]).image();
                let bytes = after_cut(medium.variant, left).await.map_err(fail)?;
                self.durable.check(&bytes).map_err(fail)?;
            }
        }
        Ok(true)
    }
}

/// Runs the steps with one failing operation. Returns whether a step failed.
async fn work(
    image: Image,
    steps: &[Step],
    size: u64,
    rule: FailRule,
    stack: &Stack,
) -> Result<bool, String> {
    chain::create(&image, size).await?;
    let active: Arc<[u8]> = vec![0; usize::try_from(size).expect("a small disk")].into();
    let medium = Medium { variant: image.variant, disks: Disks::new(stack, &image.disk, &active) };
    let on = medium.disks.image_disk().clone();
    let disk = chain::open_filtered(std::slice::from_ref(&image), &medium.disks).await?;
    let content = Content { active: Arc::clone(&active), kept: std::collections::BTreeMap::new() };
    let mut known = Known { content, durable: CrashOracle::new(active) };
    disk.flush().await.map_err(|e| e.to_string())?;
    on.set_faults(Faults { fail: vec![rule], ..Faults::default() });
    let mut met = None;
    for (number, step) in steps.iter().enumerate() {
        let fail = |e: String| format!("step {number} ({step:?}): {e}");
        let failed = known.step(&disk, &medium, step).await.map_err(fail)?;
        if failed && met.is_some() && !node_has_stopped(&disk) {
            return Err(fail("the step fails although the disk works again".to_owned()));
        }
        met = met.or(failed.then_some(number));
    }
    on.set_faults(Faults::default());
    let stopped = node_has_stopped(&disk);
    let closed = chain::close(disk).await;
    if !stopped {
        closed.map_err(|e| format!("cannot be closed: {e}"))?;
    }
    let image = Image { disk: medium.disks.image(), ..image };
    chain::check(&image, Tolerance::Leaks).await?;
    let images = std::slice::from_ref(&image);
    let disk = chain::open(images).await.map_err(|e| format!("cannot be opened: {e}"))?;
    let last = read_all(&disk).await?;
    if last != known.content.active {
        let differs = last.iter().zip(&*known.content.active).position(|(a, b)| a != b);
        return Err(format!(
            "after step {met:?} had failed, byte {differs:?} is not what was last read"
        ));
    }
    let op = Op::Write { offset: 0, len: 512, seed: 3, fua: true };
    run::execute(&disk, &op).await.map_err(|e| format!("a last write: {e}"))?;
    chain::close(disk).await.map_err(|e| format!("cannot be closed at the end: {e}"))?;
    chain::check(&image, Tolerance::Leaks).await?;
    Ok(met.is_some())
}

/// Whether the image refuses writes because the value of one of its pointers is unknown.
fn node_has_stopped(disk: &Backend) -> bool {
    disk.node().is_ok_and(|node| node.driver().info().is_corrupt)
}

fn attempt(
    variant: &'static Variant,
    seed: u64,
    every: u64,
    stack: &Stack,
) -> Result<Tally, String> {
    let mut random = Random::new(seed);
    let clusters = if variant.cluster >= 256 << 10 { 4 } else { 20 };
    let size = (clusters * variant.cluster).max(64 << 10);
    let longest = (variant.cluster * 3).min(size);
    let compress = stack.passes_compressed(variant);
    let shape = Shape { size, cluster: variant.cluster, alignment: 512, compress, longest };
    let steps = steps(&shape, variant, &mut random, stack);
    let mut tally = Tally::default();
    for op in KINDS {
        let (mut nth, mut missed) = (random.within(1, every), 0);
        // Some failures are not reported, for example the failure of a discard on the host. Later operations of the same kind
        // may report their failure.
        while missed < 4 {
            let errno = if nth.is_multiple_of(2) { Errno::NOSPC } else { Errno::IO };
            let rule = FailRule { op, nth: Some(nth), range: None, errno, once: true };
            let image = Image { variant, disk: Disk::new(seed, 0) };
            let outcome = sim::run(seed, work(image, &steps, size, rule, stack));
            let met = outcome.map_err(|e| format!("{op:?} {nth} fails with {errno}: {e}"))?;
            tally.operations += steps.len() as u64;
            tally.failed += u64::from(met);
            missed = if met { 0 } else { missed + 1 };
            nth += every;
        }
    }
    Ok(tally)
}

/// Runs the steps of a seed repeatedly. In each run, another operation of the disk fails. For each kind of operation, every
/// `every`-th operation is chosen, from a random one on.
///
/// # Panics
/// When data is lost, or the image has worse faults than leaks. The message contains the seed and the operation.
pub fn run(variant: &'static Variant, seed: u64, every: u64) -> Tally {
    run_filtered(variant, seed, every, &Stack::default())
}

/// Does the same as [`run()`] with filters without copies above and below the image, and without the changes that only the image
/// itself can make.
///
/// # Panics
/// As [`run()`].
pub fn run_filtered(variant: &'static Variant, seed: u64, every: u64, stack: &Stack) -> Tally {
    let attempt = std::panic::AssertUnwindSafe(|| attempt(variant, seed, every, stack));
    let outcome = std::panic::catch_unwind(attempt);
    match outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        Ok(tally) => tally,
        Err(error) => panic!("{} each fault, seed {seed}, {stack:?}: {error}", variant.name),
    }
}
