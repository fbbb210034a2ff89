//! The model test on simulated disks. The test has one thread and is deterministic, so a failing sequence can be reduced to the
//! operations that are needed.

use std::time::Duration;

use oxblk_core::{Backend, Preallocation};
use oxblk_ring::sim::{self, Disk, Faults};

use super::bitmaps;
use super::chain::{self, Chain, Image, Tolerance};
use super::ops::{Op, Shape};
use super::oracle::Oracle;
use super::run::{Seen, compare_all, execute, run_batch};
use super::shrink::shrink;
use crate::crash::qemu;
use crate::filters::Stack;
use crate::filters::disks::Disks;
use crate::formats::{self, Variant};
use crate::random::Random;
use crate::tally::Tally;

/// The largest number of concurrent operations.
const BATCH: u64 = 8;

/// One run. The seed determines all of it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed of all other fields.
    pub seed: u64,
    /// The variant of the active image.
    pub variant: &'static Variant,
    /// The variant and the size in bytes of each image below the active image. The base is first.
    below: Vec<(&'static Variant, u64)>,
    /// Properties of the disk that limit the choice of operations.
    pub shape: Shape,
    /// The steps of the run. Between batches, the image may be reopened or resized.
    pub batches: Vec<Step>,
    slow_disks: bool,
    /// The filters above and below the active image.
    stack: Stack,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Concurrent operations.
    Batch(Vec<Op>),
    /// Closes and reopens the image.
    Reopen,
    /// Sets the size, in bytes.
    Resize(u64),
}

/// Chooses the size of a test disk: enough clusters for several tables, but not too many for a test.
pub fn disk_size(variant: &Variant, random: &mut Random) -> u64 {
    let clusters = random.within(40, 200);
    let size = (clusters * variant.cluster).clamp(96 << 10, 48 << 20);
    // The size is rarely a whole number of clusters.
    size / 512 * 512 - 512 * random.below(8)
}

/// Chooses the images below an active image of this variant and size, base first. The list has at most three images, most of
/// the same variant, some smaller and some larger than the active image. It is empty if the variant cannot have a backing file.
/// Otherwise its length depends only on the seed, so that four consecutive seeds give all chain lengths.
pub fn random_chain(
    random: &mut Random,
    top: &'static Variant,
    size: u64,
    seed: u64,
) -> Vec<(&'static Variant, u64)> {
    let mut below = Vec::new();
    let count = if top.backing { seed % 4 } else { 0 };
    for _ in 0..count {
        let other = if random.one_in(2) { top } else { random.pick(formats::variants()) };
        let affordable = other.cluster <= top.cluster.max(64 << 10);
        // An image of a format without backing files can only be the base.
        let fits = affordable && (below.is_empty() || other.backing);
        let sectors = size * random.within(2, 6) / 4 / 512;
        below.push((if fits { other } else { top }, sectors * 512));
    }
    below
}

impl Plan {
    /// Makes the plan of a seed.
    pub fn new(variant: &'static Variant, seed: u64, steps: usize, stack: &Stack) -> Self {
        let mut random = Random::new(seed);
        let size = disk_size(variant, &mut random);
        let below = random_chain(&mut random, variant, size, seed);
        let compress = stack.passes_compressed(variant);
        let shape = Shape { compress, ..Shape::of(variant, size) };
        let mut now = shape.clone();
        let batches = (0..steps)
            .map(|_| {
                if random.one_in(40) {
                    return Step::Reopen;
                }
                if random.one_in(60) && stack.resizes(variant) {
                    now.size += 512 * random.within(1, now.cluster / 64);
                    return Step::Resize(now.size);
                }
                Step::Batch(now.random_batch(&mut random, BATCH))
            })
            .collect();
        let slow_disks = random.one_in(2);
        Self { seed, variant, below, shape, batches, slow_disks, stack: stack.clone() }
    }

    /// Returns the number of images in the chain.
    pub fn images(&self) -> usize {
        self.below.len() + 1
    }

    /// Returns the number of operations in the plan.
    pub fn operations(&self) -> u64 {
        let count = |step: &Step| match step {
            Step::Batch(ops) => ops.len() as u64,
            Step::Reopen | Step::Resize(_) => 0,
        };
        self.batches.iter().map(count).sum()
    }
}

/// Makes an empty disk. A slow disk reorders its operations and makes some transfers short.
pub fn new_disk(seed: u64, slow: bool) -> Disk {
    let disk = Disk::new(seed, 0);
    if slow {
        disk.set_faults(slowness());
    }
    disk
}

/// The behaviour of a slow disk.
fn slowness() -> Faults {
    Faults {
        short_reads: 0.02,
        short_writes: 0.02,
        delay: Duration::ZERO..Duration::from_millis(1),
        ..Faults::default()
    }
}

/// Creates the images below the active image, each with its own content, and the active image without data. Returns the chain,
/// and the model of the active image.
pub(crate) async fn build(
    below: &[(&'static Variant, u64)],
    variant: &'static Variant,
    size: u64,
    seed: u64,
    slow: bool,
) -> Result<(Chain, Oracle), String> {
    let mut random = Random::new(seed ^ 0xbac);
    let mut chain = Chain::new();
    let mut oracle = Oracle::zeroed(0);
    for &(variant, size) in below {
        let image = Image { variant, disk: new_disk(random.next_u64(), slow) };
        chain::create(&image, size).await?;
        chain.push(image);
        oracle.resize(size);
        let shape = Shape::of(variant, size);
        let disk = chain::open(&chain).await?;
        for _ in 0..random.within(2, 10) {
            let batch = shape.random_batch(&mut random, BATCH);
            run_batch(&disk, &mut oracle, &batch).await?;
        }
        compare_all(&disk, &mut oracle).await?;
        chain::close(disk).await?;
    }
    let image = Image { variant, disk: new_disk(random.next_u64(), slow) };
    chain::create(&image, size).await?;
    chain.push(image);
    oracle.resize(size);
    Ok((chain, oracle))
}

async fn carry_out(plan: &Plan) -> Result<Chain, String> {
    let made = build(&plan.below, plan.variant, plan.shape.size, plan.seed, plan.slow_disks).await;
    let (mut chain, mut oracle) = made.map_err(|e| format!("while building: {e}"))?;
    let active = chain.last().ok_or("no image")?;
    let disks = Disks::new(&plan.stack, &active.disk, oracle.bytes());
    if plan.slow_disks {
        disks.set_faults(&slowness());
    }
    let mut disk = chain::open_filtered(&chain, &disks).await?;
    for (index, step) in plan.batches.iter().enumerate() {
        match step {
            Step::Batch(batch) => run_batch(&disk, &mut oracle, batch).await,
            Step::Reopen => {
                chain::close(disk).await?;
                disk = chain::open_filtered(&chain, &disks).await?;
                compare_all(&disk, &mut oracle).await
            }
            Step::Resize(size) => {
                oracle.resize(*size);
                disk.resize(*size, Preallocation::Off).await.map_err(|e| e.to_string())
            }
        }
        .map_err(|error| format!("step {index}: {error}"))?;
    }
    compare_all(&disk, &mut oracle).await.map_err(|e| format!("at the end: {e}"))?;
    chain::close(disk).await?;
    disks.check_copies(oracle.bytes())?;
    if let Some(active) = chain.last_mut() {
        active.disk = disks.image();
    }
    let disk = chain::open(&chain).await?;
    compare_all(&disk, &mut oracle).await.map_err(|e| format!("after reopening: {e}"))?;
    if plan.variant.bitmaps {
        bitmaps::check_kept(&disk).map_err(|e| format!("after reopening: {e}"))?;
    }
    if let Some(image) = chain.last().filter(|image| image.variant.raw_data) {
        check_raw_data(&disk, image).await?;
    }
    chain::close(disk).await?;
    for image in chain.iter().filter(|image| image.variant.check) {
        chain::check(image, Tolerance::Clean).await?;
    }
    Ok(chain)
}

/// Checks that the data file contains exactly the contents of the disk.
async fn check_raw_data(disk: &Backend, image: &Image) -> Result<(), String> {
    let all = Op::Read { offset: 0, len: disk.size() };
    let Seen::Bytes(bytes) = execute(disk, &all).await.map_err(|e| e.to_string())? else {
        return Err("a read returned no bytes".to_owned());
    };
    let split = usize::try_from(chain::SPLIT).expect("it fits in memory");
    match image.disk.bytes().get(split..) {
        Some(data) if *data == *bytes => Ok(()),
        _ => Err("the data file differs from the contents of the disk".to_owned()),
    }
}

fn attempt(plan: &Plan) -> Result<Chain, String> {
    let run = std::panic::AssertUnwindSafe(|| sim::run(plan.seed, carry_out(plan)));
    match std::panic::catch_unwind(run) {
        Ok(outcome) => outcome,
        Err(panic) => Err(crate::panic_text(&*panic)),
    }
}

/// Splits batches into single operations, each with the number of its batch.
fn apart(steps: &[Step]) -> Vec<(usize, Step)> {
    let each = |(index, step): (usize, &Step)| match step {
        Step::Batch(ops) => ops.iter().map(|op| (index, Step::Batch(vec![op.clone()]))).collect(),
        Step::Reopen | Step::Resize(_) => vec![(index, step.clone())],
    };
    steps.iter().enumerate().flat_map(each).collect::<Vec<_>>()
}

/// Reverses [`apart`].
fn together(ops: &[(usize, Step)]) -> Vec<Step> {
    let mut steps: Vec<(usize, Step)> = Vec::new();
    for (index, step) in ops {
        match (steps.last_mut(), step) {
            (Some((last, Step::Batch(batch))), Step::Batch(op)) if last == index => {
                batch.extend(op.iter().cloned());
            }
            _ => steps.push((*index, step.clone())),
        }
    }
    steps.into_iter().map(|(_, step)| step).collect()
}

/// Runs `qemu-img check` on the images of a finished plan. Returns how often `qemu-img check` ran.
fn ask_qemu(chain: &Chain) -> Result<u64, String> {
    let mut asked = 0;
    let checked = |variant: &Variant| variant.check && variant.checked_by_qemu;
    for image in chain.iter().filter(|image| checked(image.variant)) {
        qemu::check(image.variant, &image.disk, Tolerance::Clean)?;
        asked += 1;
    }
    Ok(asked)
}

/// Runs the plan of a seed, then `qemu-img check` on its images.
///
/// # Panics
/// When the disk and the model differ, or QEMU's check of an image fails. The message contains the seed and the shortest
/// failing sequence that was found.
pub fn run(variant: &'static Variant, seed: u64, steps: usize) -> Tally {
    run_filtered(variant, seed, steps, &Stack::default())
}

/// Does the same as [`run`] with filters above and below the active image.
///
/// # Panics
/// As [`run`], and when a copy that a filter keeps differs from its original.
pub fn run_filtered(variant: &'static Variant, seed: u64, steps: usize, stack: &Stack) -> Tally {
    let plan = Plan::new(variant, seed, steps, stack);
    let outcome = attempt(&plan);
    let chain = outcome.unwrap_or_else(|error| fail(&plan, &error));
    let checked_by_qemu = ask_qemu(&chain).unwrap_or_else(|error| {
        panic!("{} seed {seed} steps {steps} {stack:?}: {error}", variant.name)
    });
    let mut tally = Tally { operations: plan.operations(), checked_by_qemu, ..Tally::default() };
    tally.chain(plan.images());
    tally
}

/// Reduces a failing plan, and panics with a message that shows the reduced plan.
fn fail(plan: &Plan, error: &str) -> ! {
    let with = |batches: &[Step]| Plan { batches: batches.to_vec(), ..plan.clone() };
    let fails = |batches: &[Step]| attempt(&with(batches)).is_err();
    let shortest = shrink(plan.batches.clone(), 200, fails);
    let shortest = together(&shrink(apart(&shortest), 200, |ops| fails(&together(ops))));
    let last = attempt(&with(&shortest)).err().unwrap_or_default();
    let list: String = shortest.iter().map(|step| format!("  {step:?}\n")).collect();
    panic!(
        "{} seed {} steps {} {:?}: {error}\ncut down, on {} over {:?}: {last}\n{list}",
        plan.variant.name,
        plan.seed,
        plan.batches.len(),
        plan.stack,
        plan.shape.size,
        plan.below.iter().map(|(variant, size)| (variant.name, size)).collect::<Vec<_>>(),
    );
}
