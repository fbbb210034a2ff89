//! Random changes of the graph under requests.
//!
//! Two disks are written and read by several tasks. At the same time, one task changes the graph (`steps`): it inserts and
//! removes filters, adds and removes children of quorums (`copies`), puts overlays above an image, exchanges the media of the
//! disks, reopens nodes and changes permissions. Some filters refuse permissions at random (`refuser`). A refused change must
//! leave the graph as it was (`state`). The contents always equal the model. At the end the graph must be empty.
//!
//! | function | disks | tasks |
//! |---|---|---|
//! | [`run`] | simulated | on the simulated executor |
//! | [`run_on_files`] | files; the locks in `/proc/locks` must be those of the permissions | on four I/O threads |

mod copies;
mod refuser;
mod state;
mod steps;
mod storage;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use oxblk_core::{Backend, ErrorKind, Gate, Graph, WriteFlags, ZeroFlags};
use oxblk_ring::{Config, IoBuf, IoBufMut, IoThread, Mutex as AsyncMutex, MutexGuard, sim, spawn};

use crate::perturbed::Perturbed;
use crate::random::Random;
use crate::tally::Tally;
use crate::tasks::Tasks;

use steps::Changer;
use storage::Storage;

/// The size of each disk in bytes.
const SIZE: usize = 256 << 10;
/// The number of tasks for each disk. Each task uses its own part of the disk.
const TASKS: usize = 2;
const PART: usize = SIZE / TASKS;
const DISKS: usize = 2;

/// A disk of the guest.
struct Disk {
    backend: Backend,
    /// The medium in the disk, as a position in [`World::media`].
    medium: AtomicU64,
    /// Writes may be refused now: the disk is read-only or gives its permission away.
    may_refuse: AtomicBool,
}

/// Everything that the tasks share.
struct World {
    disks: Vec<Disk>,
    /// The content that each medium must have.
    media: Vec<Mutex<Vec<u8>>>,
    /// One lock for each task. A task holds its lock during a request whose result depends on the medium.
    gates: Vec<AsyncMutex<()>>,
    is_over: AtomicBool,
    requests: AtomicU64,
}

impl World {
    fn new(disks: Vec<Backend>) -> Arc<Self> {
        let disks = (0..).zip(disks).map(|(medium, backend)| Disk {
            backend,
            medium: AtomicU64::new(medium),
            may_refuse: AtomicBool::new(false),
        });
        Arc::new(Self {
            disks: disks.collect(),
            media: (0..DISKS).map(|_| Mutex::new(vec![0; SIZE])).collect(),
            gates: (0..DISKS * TASKS).map(|_| AsyncMutex::default()).collect(),
            is_over: AtomicBool::new(false),
            requests: AtomicU64::new(0),
        })
    }

    /// Waits until no request is in progress whose result depends on the medium. Such requests wait until the guards are dropped.
    async fn close_gates(&self) -> Vec<MutexGuard<'_, ()>> {
        let mut guards = Vec::new();
        for gate in &self.gates {
            guards.push(gate.lock().await);
        }
        guards
    }

    /// Calls `action` with the expected content of a part of the medium in a disk.
    fn with_part<T>(&self, disk: &Disk, part: usize, action: impl FnOnce(&mut [u8]) -> T) -> T {
        let medium = usize::try_from(disk.medium.load(SeqCst)).expect("a small number");
        let mut content = self.media[medium].lock().unwrap_or_else(PoisonError::into_inner);
        action(&mut content[part * PART..(part + 1) * PART])
    }
}

/// Makes requests to one part of a disk until the changes are over.
async fn requests(world: Arc<World>, number: usize, mut random: Random) {
    let (disk, part) = (&world.disks[number / TASKS], number % TASKS);
    while !world.is_over.load(SeqCst) {
        let _gate = world.gates[number].lock().await;
        request(&world, disk, part, &mut random).await;
        world.requests.fetch_add(1, SeqCst);
        // Virtual time passes only while all tasks wait.
        oxblk_ring::sleep(Duration::from_micros(random.below(3))).await;
    }
}

async fn request(world: &World, disk: &Disk, part: usize, random: &mut Random) {
    let below = |random: &mut Random, bound: usize| {
        usize::try_from(random.below(bound as u64)).expect("a small number")
    };
    let unit = if random.one_in(2) { 512 } else { 4096 };
    let at = below(random, PART / unit) * unit;
    let len = (1 + below(random, 8)) * unit;
    let len = len.min(PART - at);
    let offset = (part * PART + at) as u64;
    let outcome = match random.below(8) {
        0..4 => match disk.backend.read(offset, IoBufMut::new(len)).await {
            Ok(read) => {
                let same = world.with_part(disk, part, |part| part[at..at + len] == *read);
                assert!(same, "{len} bytes at {offset} are not those of the model");
                return;
            }
            Err(error) => Err(error),
        },
        4..6 => {
            let mut data = vec![0; len];
            random.fill(&mut data);
            let written =
                disk.backend.write(offset, IoBuf::from(data.clone()), WriteFlags::empty()).await;
            written.map(|()| {
                world.with_part(disk, part, |part| part[at..at + len].copy_from_slice(&data));
            })
        }
        6 => {
            let flags = if random.one_in(2) { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            let written = disk.backend.write_zeroes(offset, len as u64, flags).await;
            written.map(|()| world.with_part(disk, part, |part| part[at..at + len].fill(0)))
        }
        _ => disk.backend.flush().await,
    };
    match outcome {
        Err(error)
            if disk.may_refuse.load(SeqCst)
                && matches!(error.kind(), ErrorKind::Denied | ErrorKind::ReadOnly) => {}
        outcome => outcome.unwrap_or_else(|error| panic!("a request failed: {error}")),
    }
}

/// Opens the disks in a new graph.
async fn open(storage: &mut Storage) -> Arc<World> {
    let graph = Graph::new(storage::drivers(), Gate::Anything);
    let mut disks = Vec::new();
    for _ in 0..DISKS {
        disks.push(storage.disk(&graph).await);
    }
    World::new(disks)
}

/// Makes the changes, then closes the disks and checks that nothing is left.
async fn change(world: Arc<World>, storage: Storage, changes: u64, random: Random) -> Tally {
    let graph = world.disks[0].backend.graph().clone();
    let mut changer = Changer::new(Arc::clone(&world), storage, random);
    for _ in 0..changes {
        changer.step().await;
    }
    world.is_over.store(true, SeqCst);
    drop(world.close_gates().await);
    changer.compare_all().await;
    for disk in &world.disks {
        disk.backend.close().await.expect("it closes");
    }
    let left: Vec<_> = graph.nodes().iter().map(|node| node.name().to_owned()).collect();
    assert!(left.is_empty(), "these nodes are left: {left:?}");
    assert!(graph.backends().is_empty());
    let (made, refused) = changer.counts();
    Tally { operations: made, failed: refused, ..Tally::default() }
}

/// Changes the graph `changes` times on simulated disks. Returns the number of changes made and refused.
///
/// # Panics
/// When a content differs from the model, when a refused change changes anything, or when something is left at the end.
pub fn run(seed: u64, changes: u64) -> Tally {
    sim::run(seed, async move {
        let mut random = Random::new(seed);
        let mut storage = Storage::simulated(seed);
        let world = open(&mut storage).await;
        let tasks: Vec<_> = (0..DISKS * TASKS)
            .map(|number| spawn(requests(Arc::clone(&world), number, random.fork())))
            .collect();
        let tally = change(Arc::clone(&world), storage, changes, random.fork()).await;
        for task in tasks {
            task.await;
        }
        tally
    })
}

/// Does the same as [`run`] on files and four I/O threads.
///
/// # Panics
/// As [`run`], and when the file locks are not those of the permissions.
pub fn run_on_files(seed: u64, changes: u64) -> Tally {
    let _perturbed = Perturbed::new(seed, "graph");
    let mut random = Random::new(seed);
    let start = |n| IoThread::start(&format!("graph-{n}"), Config::default()).expect("a thread");
    let threads: Vec<IoThread> = (0..DISKS * TASKS).map(start).collect();
    let opening = threads[0].spawn(move || async move {
        let mut storage = Storage::on_files();
        (open(&mut storage).await, storage)
    });
    let (world, storage) = opening.wait().expect("the disks open");
    let mut tasks = Tasks::new();
    for (number, thread) in threads.iter().enumerate() {
        let (world, random) = (Arc::clone(&world), random.fork());
        tasks.spawn(thread, move || requests(world, number, random));
    }
    let tally = Arc::new(Mutex::new(Tally::default()));
    let (result, random) = (Arc::clone(&tally), random.fork());
    let changing = Arc::clone(&world);
    tasks.spawn(&threads[0], move || async move {
        *result.lock().expect("one task") = change(changing, storage, changes, random).await;
    });
    let outcome = tasks.wait();
    drop(world);
    outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    *tally.lock().expect("the task has ended")
}
