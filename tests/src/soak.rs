//! The long run of the harnesses: jobs, how much is to be done, and the tally of what was.
//!
//! A job is one seed of one kind of test on one variant. Jobs are taken in turn by as many threads as
//! there are cores, until every variant has had its share or the time is over. A failure is reported
//! and the run goes on: it exits with an error at the end.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::drivers::Variant;
use crate::{crash, model, panic_text};

/// A kind of test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Random operations on simulated disks.
    Model,
    /// Random operations on real files from four I/O threads.
    Threads,
    /// Power cuts on simulated disks.
    Crash,
    /// Failing operations on simulated disks.
    Faults,
    /// Damaged images on simulated disks.
    Damage,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 5] =
        [Kind::Model, Kind::Threads, Kind::Crash, Kind::Faults, Kind::Damage];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Threads => "threads",
            Kind::Crash => "crash",
            Kind::Faults => "faults",
            Kind::Damage => "damage",
        }
    }
}

/// What to run and for how long.
#[derive(Clone, Debug)]
pub struct Order {
    /// Kinds of test.
    pub kinds: Vec<Kind>,
    /// Variants of formats.
    pub variants: Vec<&'static Variant>,
    /// The first seed; each job takes the next.
    pub seed: u64,
    /// Stop after this time; without it, when every share is done.
    pub time: Option<Duration>,
    /// Operations for each kind and variant that is counted in operations.
    pub operations: u64,
    /// Power cuts for each variant.
    pub cuts: u64,
    /// Jobs at once.
    pub jobs: usize,
}

/// What was done for one kind and variant.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    operations: u64,
    cuts: u64,
    disks: u64,
    checked_by_qemu: u64,
    first_seed: u64,
    last_seed: u64,
    seeds: u64,
    failures: u64,
    /// Jobs that are under way.
    running: u64,
}

type Table = BTreeMap<(Kind, &'static str), Done>;

struct Soak {
    order: Order,
    started: Instant,
    next: Mutex<(u64, usize)>,
    table: Mutex<Table>,
    failures: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// Runs what was ordered and prints the tally; gives the failures.
///
/// # Panics
/// When a worker thread cannot be started.
pub fn run(order: &Order) -> Vec<String> {
    let soak = Soak {
        started: Instant::now(),
        next: Mutex::new((order.seed, 0)),
        table: Mutex::new(Table::new()),
        failures: Mutex::new(Vec::new()),
        stop: AtomicBool::new(false),
        order: order.clone(),
    };
    std::thread::scope(|scope| {
        for _ in 0..order.jobs.max(1) {
            scope.spawn(|| soak.work());
        }
    });
    soak.report();
    soak.failures.into_inner().unwrap_or_default()
}

impl Soak {
    fn work(&self) {
        while let Some((kind, variant, seed)) = self.take() {
            let outcome = std::panic::catch_unwind(|| self.job(kind, variant, seed));
            let mut table = self.table.lock().expect("no job panics with the table");
            let done = table.entry((kind, variant.name)).or_default();
            done.running -= 1;
            match outcome {
                Ok(job) => {
                    done.operations += job.operations;
                    done.cuts += job.cuts;
                    done.disks += job.disks;
                    done.checked_by_qemu += job.checked_by_qemu;
                    if self.order.time.is_none()
                        && done.running == 0
                        && self.has_its_share(kind, done)
                    {
                        let elapsed = self.started.elapsed().as_secs();
                        println!(
                            "{} {} has had its share after {elapsed} s",
                            kind.name(),
                            variant.name
                        );
                    }
                }
                Err(panic) => {
                    done.failures += 1;
                    let text = format!("{}: {}", kind.name(), panic_text(&*panic));
                    eprintln!("FAILED {text}");
                    self.failures.lock().expect("not poisoned").push(text);
                }
            }
        }
    }

    /// The next job: kinds and variants in turn, without those that have had their share.
    fn take(&self) -> Option<(Kind, &'static Variant, u64)> {
        let mut next = self.next.lock().expect("nothing panics with it");
        let mut table = self.table.lock().expect("no job panics with the table");
        if self.stop.load(Relaxed)
            || self.order.time.is_some_and(|time| self.started.elapsed() >= time)
        {
            return None;
        }
        let pairs = self.order.kinds.len() * self.order.variants.len();
        for _ in 0..pairs {
            let turn = next.1 % pairs;
            next.1 += 1;
            let kind = self.order.kinds[turn / self.order.variants.len()];
            let variant = self.order.variants[turn % self.order.variants.len()];
            let done = table.entry((kind, variant.name)).or_default();
            // One that fails again and again is not given more.
            if done.failures >= 3 || (self.order.time.is_none() && self.has_its_share(kind, done)) {
                continue;
            }
            let seed = next.0;
            next.0 += 1;
            if done.seeds == 0 {
                done.first_seed = seed;
            }
            done.last_seed = seed;
            done.seeds += 1;
            done.running += 1;
            return Some((kind, variant, seed));
        }
        None
    }

    fn has_its_share(&self, kind: Kind, done: &Done) -> bool {
        match kind {
            Kind::Model | Kind::Threads => {
                done.operations + done.running * self.per_job(kind) >= self.order.operations
            }
            Kind::Faults | Kind::Damage => done.disks + done.running >= self.order.cuts,
            Kind::Crash => done.cuts + done.running * self.per_job(kind) >= self.order.cuts,
        }
    }

    /// About how much one job does.
    fn per_job(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Model => 1000,
            Kind::Threads => THREADS_EXTENT.phases * THREADS_EXTENT.operations,
            Kind::Crash => CUTS,
            Kind::Faults | Kind::Damage => 1,
        }
    }

    fn job(&self, kind: Kind, variant: &'static Variant, seed: u64) -> Done {
        match kind {
            Kind::Model => {
                let (plan, _) = model::sim::run(variant, seed, 250);
                Done { operations: plan.operations(), ..Done::default() }
            }
            Kind::Threads => {
                let operations = model::threads::run(variant, seed, THREADS_EXTENT);
                Done { operations, ..Done::default() }
            }
            Kind::Faults => {
                crash::faults::run(variant, seed);
                Done { disks: 1, ..Done::default() }
            }
            Kind::Damage => {
                crate::hostile::mutate::run(variant, seed);
                Done { disks: 1, ..Done::default() }
            }
            Kind::Crash => {
                let tally = crash::run::run(variant, seed, CUTS, 4);
                Done {
                    operations: tally.operations,
                    cuts: tally.cuts,
                    disks: tally.disks,
                    checked_by_qemu: tally.checked_by_qemu,
                    ..Done::default()
                }
            }
        }
    }

    fn report(&self) {
        let table = self.table.lock().expect("no job panics with the table");
        println!(
            "{:8} {:18} {:>12} {:>8} {:>8} {:>8}  seeds",
            "kind", "variant", "operations", "cuts", "disks", "by qemu"
        );
        let mut sum = Done::default();
        for ((kind, variant), done) in table.iter() {
            println!(
                "{:8} {variant:18} {:>12} {:>8} {:>8} {:>8}  {} in {}..={}{}",
                kind.name(),
                done.operations,
                done.cuts,
                done.disks,
                done.checked_by_qemu,
                done.seeds,
                done.first_seed,
                done.last_seed,
                if done.failures > 0 {
                    format!(", {} FAILED", done.failures)
                } else {
                    String::new()
                }
            );
            sum.operations += done.operations;
            sum.cuts += done.cuts;
            sum.disks += done.disks;
            sum.checked_by_qemu += done.checked_by_qemu;
            sum.failures += done.failures;
        }
        println!(
            "in all: {} operations, {} power cuts, {} disks looked at, {} of them by qemu-img check, \
             {} failures, {} s",
            sum.operations,
            sum.cuts,
            sum.disks,
            sum.checked_by_qemu,
            sum.failures,
            self.started.elapsed().as_secs()
        );
    }
}

/// Power cuts in one job.
const CUTS: u64 = 20;

/// The size of one job on real files.
const THREADS_EXTENT: model::threads::Extent =
    model::threads::Extent { phases: 3, operations: 3000 };
