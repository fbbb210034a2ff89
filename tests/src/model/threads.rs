//! The model test on real files: four I/O threads at once on one image.
//!
//! Each of several tasks on each thread takes an operation that does not conflict with those under
//! way, carries it out and checks it. Now and then all stop: the image is closed, `qemu-img check`
//! must find it clean, `qemu-img compare` must find the model's content in it, and it is opened again.
//! The schedule is the machine's, so a seed gives the same operations but not always the same run.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oxblk_core::{Backend, Graph, OpenFlags, Options, Preallocation};
use oxblk_ring::{Config, IoThread};
use tempfile::TempDir;

use super::ops::{Op, Shape};
use super::oracle::Oracle;
use super::run::{compare_all, execute, judge};
use super::sim::{disk_size, random_chain};
use crate::drivers::Variant;
use crate::program::Program;
use crate::random::Random;

/// I/O threads.
const THREADS: usize = 4;
/// Tasks on each thread, each with one operation under way.
const TASKS: usize = 4;

/// How much to do.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Times that the image is opened, worked on and closed.
    pub phases: u64,
    /// Operations in each.
    pub operations: u64,
}

/// What all tasks share.
struct Shared {
    oracle: Oracle,
    random: Random,
    under_way: Vec<Op>,
    left: u64,
    failure: Option<String>,
}

/// A run: a chain of image files and the model of what the active one reads as.
struct Run {
    directory: TempDir,
    variant: &'static Variant,
    shape: Shape,
    random: Random,
    threads: Vec<IoThread>,
    shared: Arc<Mutex<Shared>>,
    images: Vec<PathBuf>,
}

/// Files in memory where there are such, so that flushes do not wait for a disk.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let builder = || tempfile::Builder::new().prefix("oxblk-model-").rand_bytes(8).to_owned();
    builder().tempdir_in(memory).or_else(|_| builder().tempdir()).expect("a scratch directory")
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    fn new(variant: &'static Variant, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let size = disk_size(variant, &mut random);
        let shape = Shape::of(variant, size);
        let threads = (0..THREADS)
            .map(|n| IoThread::start(&format!("model-{n}"), Config::default()).expect("a thread"))
            .collect();
        let shared = Shared {
            oracle: Oracle::zeroed(0),
            random: random.fork(),
            under_way: Vec::new(),
            left: 0,
            failure: None,
        };
        let shared = Arc::new(Mutex::new(shared));
        Self { directory: scratch(), variant, shape, random, threads, shared, images: Vec::new() }
    }

    fn on_thread<T: Send + 'static, F: Future<Output = Result<T, String>> + 'static>(
        &self,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Result<T, String> {
        self.threads[0].spawn(work).wait().map_err(|gone| format!("{gone:?}"))?
    }

    /// Makes an image file above the last one: by us or by `qemu-img create`.
    fn create(&mut self, variant: &'static Variant, size: u64) -> Result<(), String> {
        let path = self.directory.path().join(format!("image{}", self.images.len()));
        let backing = self.images.last().cloned().zip(self.backing_format());
        if self.random.one_in(2) {
            self.create_by_qemu(variant, size, &path, backing)?;
        } else {
            self.create_by_us(variant, size, &path, backing)?;
        }
        self.images.push(path);
        Ok(())
    }

    /// The format of the image that is last now: only a base has a variant of its own.
    fn backing_format(&self) -> Option<&'static str> {
        let first = self.images.last()?;
        let head = fs::read(first).ok()?;
        Some(if head.starts_with(b"QFI\xfb") { "qcow2" } else { "raw" })
    }

    fn create_by_qemu(
        &self,
        variant: &Variant,
        size: u64,
        path: &Path,
        backing: Option<(PathBuf, &str)>,
    ) -> Result<(), String> {
        let mut program = Program::new("qemu-img").args(["create", "-q", "-f", variant.format]);
        if !variant.options.is_empty() {
            program = program.args(["-o", variant.options]);
        }
        if let Some((name, format)) = backing {
            program = program.arg("-b").arg(name).args(["-F", format]);
        }
        let reply = program.arg(path).arg(size.to_string()).run();
        if reply.code() == 0 { Ok(()) } else { Err(reply.err()) }
    }

    fn create_by_us(
        &self,
        variant: &'static Variant,
        size: u64,
        path: &Path,
        backing: Option<(PathBuf, &'static str)>,
    ) -> Result<(), String> {
        let name = path.display().to_string();
        self.on_thread(move || async move {
            let graph = super::chain::graph();
            let mut options =
                Options::from_dotted(variant.options, None).map_err(|e| e.to_string())?;
            options.insert("size", size);
            if let Some((name, format)) = backing {
                options.insert("backing_file", name.display().to_string());
                options.insert("backing_fmt", format);
            }
            graph.create_image(&name, variant.format, &options).await.map_err(|e| e.to_string())
        })
    }

    /// Opens the active image; every other time with another way of doing I/O.
    fn open(&mut self) -> Result<Backend, String> {
        let path = self.images.last().expect("an active image").display().to_string();
        let aio = *self.random.pick(&["io_uring", "threads"]);
        let format = self.backing_format().unwrap_or("raw");
        let graph: Graph = super::chain::graph();
        self.on_thread(move || async move {
            let text = format!(
                r#"{{"driver":"{format}","file":{{"driver":"file","filename":"{path}","aio":"{aio}"}}}}"#
            );
            let options = Options::from_json(&text).map_err(|e| e.to_string())?;
            let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
            graph.open_backend(None, options, flags).await.map_err(|e| e.to_string())
        })
    }

    fn close(&self, disk: Backend) -> Result<(), String> {
        self.on_thread(move || async move { disk.close().await.map_err(|e| e.to_string()) })
    }

    /// Works on the open image from every thread until `operations` are done.
    fn work(&self, disk: &Backend, shape: &Shape, operations: u64) -> Result<(), String> {
        lock(&self.shared).left = operations;
        let mut tasks = Vec::new();
        for thread in &self.threads {
            for _ in 0..TASKS {
                let (disk, shape) = (disk.clone(), shape.clone());
                let shared = Arc::clone(&self.shared);
                tasks.push(thread.spawn(move || task(disk, shape, shared)));
            }
        }
        for task in tasks {
            task.wait().map_err(|gone| format!("{gone:?}"))?;
        }
        lock(&self.shared).failure.take().map_or(Ok(()), Err)
    }

    /// Reads the whole disk and compares it with the model.
    fn compare(&self, disk: &Backend) -> Result<(), String> {
        let (disk, shared) = (disk.clone(), Arc::clone(&self.shared));
        let mut oracle = lock(&shared).oracle.clone();
        let oracle = self.on_thread(move || async move {
            compare_all(&disk, &mut oracle).await?;
            Ok(oracle)
        })?;
        lock(&self.shared).oracle = oracle;
        Ok(())
    }

    /// What QEMU says of the closed image and of its content.
    fn ask_qemu(&self, variant: &Variant) -> Result<(), String> {
        let image = self.images.last().expect("an active image");
        let said = |reply: crate::program::Reply| format!("{}{}", reply.out(), reply.err());
        if variant.check {
            let reply =
                Program::new("qemu-img").args(["check", "-f", variant.format]).arg(image).run();
            if reply.code() != 0 {
                return Err(format!("qemu-img check: {}", said(reply)));
            }
        }
        let model = self.directory.path().join("model.raw");
        fs::write(&model, lock(&self.shared).oracle.bytes()).map_err(|e| e.to_string())?;
        let formats = ["compare", "-f", variant.format, "-F", "raw"];
        let reply = Program::new("qemu-img").args(formats).arg(image).arg(&model).run();
        if reply.code() == 0 { Ok(()) } else { Err(format!("qemu-img compare: {}", said(reply))) }
    }

    /// One phase: open, work, compare, close, ask QEMU.
    fn phase(
        &mut self,
        variant: &Variant,
        shape: &mut Shape,
        operations: u64,
    ) -> Result<(), String> {
        let disk = self.open()?;
        self.compare(&disk).map_err(|e| format!("after opening: {e}"))?;
        if self.random.one_in(3) {
            self.resize(&disk, shape)?;
        }
        self.work(&disk, shape, operations)?;
        self.compare(&disk).map_err(|e| format!("at the end of a phase: {e}"))?;
        self.close(disk)?;
        self.ask_qemu(variant)
    }

    fn resize(&mut self, disk: &Backend, shape: &mut Shape) -> Result<(), String> {
        let size =
            (shape.size + self.random.within(1, 8) * shape.cluster / 2).next_multiple_of(512);
        let backend = disk.clone();
        self.on_thread(move || async move {
            backend.resize(size, Preallocation::Off).await.map_err(|e| format!("resize: {e}"))
        })?;
        shape.size = size;
        lock(&self.shared).oracle.resize(size);
        Ok(())
    }

    fn carry_out(&mut self, extent: Extent) -> Result<u64, String> {
        let mut done = 0;
        let chain = random_chain(&mut self.random, self.variant, self.shape.size);
        for (variant, size) in chain {
            self.create(variant, size)?;
            lock(&self.shared).oracle.resize(size);
            self.phase(variant, &mut Shape::of(variant, size), 200)
                .map_err(|e| format!("below: {e}"))?;
            // The phase may have grown the image: the overlay decides what shows of it.
        }
        self.create(self.variant, self.shape.size)?;
        lock(&self.shared).oracle.resize(self.shape.size);
        let mut shape = self.shape.clone();
        for number in 0..extent.phases {
            self.phase(self.variant, &mut shape, extent.operations)
                .map_err(|e| format!("phase {number}: {e}"))?;
            done += extent.operations;
        }
        Ok(done)
    }
}

/// One task: takes operations until none are left or something is wrong.
async fn task(disk: Backend, shape: Shape, shared: Arc<Mutex<Shared>>) {
    while let Some(op) = take(&shape, &shared) {
        let Some(op) = op else {
            oxblk_ring::yield_now().await;
            continue;
        };
        let outcome = execute(&disk, &op).await.map_err(|error| format!("{op:?}: {error}"));
        let mut state = lock(&shared);
        state.under_way.retain(|other| *other != op);
        if let Err(error) = outcome.and_then(|seen| judge(&mut state.oracle, &op, &seen)) {
            state.failure.get_or_insert(error);
            state.left = 0;
        }
    }
}

/// Takes an operation that does not conflict with those under way: `None` when there are no more,
/// `Some(None)` when none was found.
fn take(shape: &Shape, shared: &Mutex<Shared>) -> Option<Option<Op>> {
    let mut state = lock(shared);
    if state.left == 0 {
        return None;
    }
    for _ in 0..8 {
        let op = shape.random_op(&mut state.random);
        let same_or_conflicting = |other: &Op| *other == op || !op.commutes_with(other);
        if !state.under_way.iter().any(same_or_conflicting) {
            state.left -= 1;
            state.under_way.push(op.clone());
            return Some(Some(op));
        }
    }
    Some(None)
}

/// Runs the operations of a seed on a fresh chain of image files; gives how many there were.
///
/// # Panics
/// When the disk and the model differ or QEMU finds fault with an image, with the seed.
pub fn run(variant: &'static Variant, seed: u64, extent: Extent) -> u64 {
    let mut run = Run::new(variant, seed);
    match run.carry_out(extent) {
        Ok(done) => done,
        Err(error) => {
            // What is needed to look into it.
            let kept = run.directory.keep();
            panic!(
                "{} threads seed {seed}: {error}\nthe files are in {}",
                variant.name,
                kept.display()
            )
        }
    }
}
