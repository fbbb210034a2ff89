//! The workload of a power-cut run: a chain of images, and batches of operations.

use oxblk_ring::sim::Disk;

use super::oracle::CrashOracle;
use crate::filters::Stack;
use crate::filters::disks::Disks;
use crate::formats::Variant;
use crate::model::chain::{self, Chain};
use crate::model::ops::{Op, Shape};
use crate::model::sim::{build, random_chain};
use crate::random::Random;

/// The largest number of operations in a batch, without the flush. All operations of a batch are in flight concurrently.
pub(super) const BATCH: u64 = 8;

/// A workload. The seed determines all of it.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) seed: u64,
    pub(super) variant: &'static Variant,
    /// The images below the active image, with their sizes in bytes. The base is first.
    below: Vec<(&'static Variant, u64)>,
    pub(super) shape: Shape,
    pub(super) batches: Vec<Vec<Op>>,
    /// The filters above and below the active image.
    pub(super) stack: Stack,
}

impl Workload {
    pub(super) fn new(variant: &'static Variant, seed: u64, stack: &Stack) -> Self {
        let mut random = Random::new(seed);
        // Large clusters are slow to simulate, and a few large clusters are enough for every case.
        let large = variant.cluster >= 256 << 10;
        let clusters = if large { random.within(5, 10) } else { random.within(24, 80) };
        let size = (clusters * variant.cluster).max(64 << 10);
        let size = if random.one_in(2) { size } else { size - 512 * random.within(1, 7) };
        let longest = (variant.cluster * 4).clamp(16 << 10, 512 << 10).min(size);
        let compress = stack.passes_compressed(variant);
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
        let below = random_chain(&mut random, variant, size, seed);
        Self { seed, variant, below, shape, batches, stack: stack.clone() }
    }

    /// Returns the number of images in the chain.
    pub(super) fn images(&self) -> usize {
        self.below.len() + 1
    }

    /// Creates and flushes the images. The active image is the last image. Returns the chain, the disks of the filters, and the
    /// oracle of the active image.
    pub(super) async fn build(&self) -> Result<(Chain, Disks, CrashOracle), String> {
        // Short writes are disabled: they would tear sectors, but a disk writes a sector completely or not at all.
        let made = build(&self.below, self.variant, self.shape.size, self.seed, false).await;
        let (chain, model) = made.map_err(|e| format!("while building: {e}"))?;
        let disk = chain::open(&chain).await?;
        disk.flush().await.map_err(|e| e.to_string())?;
        chain::close(disk).await?;
        let disks = Disks::new(&self.stack, active(&chain), model.bytes());
        Ok((chain, disks, CrashOracle::new(model.bytes().into())))
    }

    /// Describes the workload for the message of a failure.
    pub(super) fn describe(&self) -> String {
        let below: Vec<_> = self.below.iter().map(|(v, size)| (v.name, size)).collect();
        format!(
            "{} seed {}, {} bytes over {below:?}, {:?}",
            self.variant.name, self.seed, self.shape.size, self.stack
        )
    }
}

pub(super) fn active(chain: &Chain) -> &Disk {
    &chain.last().expect("a chain has an active image").disk
}
