//! The model test on real files: four I/O threads use one image concurrently.
//!
//! Several tasks on each thread take an operation that does not conflict with the operations in flight, execute it and check
//! its result. After each phase the image is closed. `qemu-img check` must find no fault, and `qemu-img compare` must find the
//! model's content in the image. The next phase opens the image again. The machine's scheduler chooses the order, so a seed
//! gives the same operations, but not always the same run.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::{Backend, Preallocation};
use tempfile::TempDir;

use super::files::{Access, Files};
use super::ops::Shape;
use super::oracle::Oracle;
use super::pool::{Next, Pool};
use super::run::{compare_all, execute, judge};
use super::sim::{disk_size, random_chain};
use crate::filters::Stack;
use crate::formats::Variant;
use crate::perturbed::Perturbed;
use crate::random::Random;
use crate::scratch;
use crate::tally::Tally;
use crate::tasks::Tasks;

/// The amount of work.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// The number of phases. In each phase, the image is opened, used and closed.
    pub phases: u64,
    /// The number of operations in each phase.
    pub operations: u64,
    /// In each phase, random filters are above the image and below it.
    pub filters: bool,
}

/// A run: a chain of image files, and the model of the active image.
pub(super) struct Run {
    pub(super) files: Files,
    pub(super) variant: &'static Variant,
    pub(super) shape: Shape,
    pub(super) random: Random,
    pub(super) seed: u64,
    oracle: Arc<Mutex<Oracle>>,
    pub(super) tally: Tally,
}

fn lock(oracle: &Mutex<Oracle>) -> MutexGuard<'_, Oracle> {
    oracle.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    pub(super) fn new(variant: &'static Variant, seed: u64, directory: TempDir) -> Self {
        let mut random = Random::new(seed);
        let size = disk_size(variant, &mut random);
        let shape = Shape::of(variant, size);
        let files = Files::new(directory, random.fork());
        let oracle = Arc::new(Mutex::new(Oracle::zeroed(0)));
        Self { files, variant, shape, random, seed, oracle, tally: Tally::default() }
    }

    /// Returns the content of the active image according to the model.
    pub(super) fn content(&self) -> Arc<[u8]> {
        lock(&self.oracle).bytes().into()
    }

    /// Sends requests to the open image from all threads until `operations` operations are done.
    fn work(&mut self, disk: &Backend, shape: &Shape, operations: u64) -> Result<(), String> {
        let _perturbed = Perturbed::new(self.seed, self.variant.name);
        let pool = Pool::new(shape.clone(), self.random.fork(), operations);
        let mut tasks = Tasks::new();
        for thread in self.files.thread_of_each_task() {
            let (disk, pool, oracle) = (disk.clone(), pool.clone(), Arc::clone(&self.oracle));
            tasks.spawn(thread, move || task(disk, pool, oracle));
        }
        tasks.wait()?;
        pool.outcome()
    }

    /// Reads the disk and compares it with the model.
    fn compare(&self, disk: &Backend) -> Result<(), String> {
        let mut oracle = lock(&self.oracle).clone();
        let disk = disk.clone();
        let oracle = self.files.on_thread(move || async move {
            compare_all(&disk, &mut oracle).await?;
            Ok(oracle)
        })?;
        *lock(&self.oracle) = oracle;
        Ok(())
    }

    /// One phase: opens the image with one of two I/O engines, sends requests, compares, closes, and runs QEMU's tools.
    fn phase(
        &mut self,
        variant: &Variant,
        shape: &mut Shape,
        operations: u64,
        filters: bool,
    ) -> Result<(), String> {
        let aio = self.random.pick(&["io_uring", "threads"]);
        let copy_on_read = self.random.one_in(3);
        let stack = self.random_stack(filters);
        let access = Access { aio, direct: false, copy_on_read, stack };
        let shown = format!("{access:?}");
        let disk =
            self.files.open(access.clone(), shape.size).map_err(|e| format!("{shown}: {e}"))?;
        self.use_disk(disk, variant, shape, operations, &access)
            .map_err(|error| format!("{shown}: {error}"))
    }

    /// Chooses a stack of filters, if this run has filters.
    pub(super) fn random_stack(&mut self, has_filters: bool) -> Stack {
        match has_filters {
            true => Stack::random(self.variant, &mut self.random),
            false => Stack::default(),
        }
    }

    fn use_disk(
        &mut self,
        disk: Backend,
        variant: &Variant,
        shape: &mut Shape,
        operations: u64,
        Access { copy_on_read, stack, .. }: &Access,
    ) -> Result<(), String> {
        // With copy-on-read, this comparison would copy all data into the image, so later requests would not find an
        // unallocated cluster.
        if !copy_on_read {
            self.compare(&disk).map_err(|e| format!("after opening: {e}"))?;
        }
        if self.random.one_in(3) && stack.resizes(variant) {
            self.resize(&disk, shape)?;
        }
        let compress = stack.passes_compressed(variant);
        self.work(&disk, &Shape { compress, ..shape.clone() }, operations)?;
        self.compare(&disk).map_err(|e| format!("at the end of a phase: {e}"))?;
        self.files.close(disk)?;
        self.tally.checked_by_qemu += self.files.check_by_qemu(variant)?;
        self.files.compare_by_qemu(&self.content())
    }

    fn resize(&mut self, disk: &Backend, shape: &mut Shape) -> Result<(), String> {
        let size =
            (shape.size + self.random.within(1, 8) * shape.cluster / 2).next_multiple_of(512);
        let backend = disk.clone();
        self.files.on_thread(move || async move {
            backend.resize(size, Preallocation::Off).await.map_err(|e| format!("resize: {e}"))
        })?;
        shape.size = size;
        lock(&self.oracle).resize(size);
        Ok(())
    }

    /// Creates the images of the chain: the active image without data, all others with their own content.
    pub(super) fn build(&mut self) -> Result<(), String> {
        let chain = random_chain(&mut self.random, self.variant, self.shape.size, self.seed);
        self.tally.chain(chain.len() + 1);
        for (variant, size) in chain {
            self.files.create(variant, size)?;
            lock(&self.oracle).resize(size);
            self.phase(variant, &mut Shape::of(variant, size), 200, false)
                .map_err(|e| format!("below: {e}"))?;
            // The phase may have grown the image. The overlay's size limits the visible part of the image.
        }
        self.files.create(self.variant, self.shape.size)?;
        lock(&self.oracle).resize(self.shape.size);
        Ok(())
    }

    fn carry_out(&mut self, extent: Extent) -> Result<(), String> {
        self.build()?;
        let mut shape = self.shape.clone();
        for number in 0..extent.phases {
            self.phase(self.variant, &mut shape, extent.operations, extent.filters)
                .map_err(|e| format!("phase {number}: {e}"))?;
            self.tally.operations += extent.operations;
        }
        Ok(())
    }
}

/// One task: executes operations until the pool is empty or a check fails.
async fn task(disk: Backend, pool: Pool, oracle: Arc<Mutex<Oracle>>) {
    loop {
        let op = match pool.take() {
            Next::Do(op) => op,
            Next::Wait => {
                oxblk_ring::yield_now().await;
                continue;
            }
            Next::End => return,
        };
        let outcome = execute(&disk, &op).await.map_err(|error| format!("{op:?}: {error}"));
        let outcome = outcome.and_then(|seen| judge(&mut lock(&oracle), &op, &seen));
        pool.done(&op, outcome);
    }
}

/// Runs the operations of a seed on a new chain of image files.
///
/// # Panics
/// When the disk and the model differ, or a QEMU tool finds a fault. The message contains the seed.
pub fn run(variant: &'static Variant, seed: u64, extent: Extent) -> Tally {
    let mut run = Run::new(variant, seed, scratch::in_memory());
    match run.carry_out(extent) {
        Ok(()) => run.tally,
        Err(error) => {
            let kept = run.files.keep();
            panic!("{} threads seed {seed}: {error}\n{kept}", variant.name)
        }
    }
}
