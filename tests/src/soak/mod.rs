//! The long run of the harnesses: choosing jobs, running them, and counting the work.
//!
//! A job is one seed of one kind of test on one variant. Several threads (one per core, or `--jobs`) take job after job: with a
//! time limit until the time is over, otherwise until every kind and variant has done its amount of work. A kind and variant
//! that has failed three times gets no more jobs. At the end of a run with failures, the program exits with an error.
//!
//! The seed modulo 4 determines the length of a chain. The jobs of one kind and variant use all four remainders one after
//! another, so every length is tested equally often.

mod report;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::crash::changes::From;
use crate::filters::Stack;
use crate::formats::Variant;
use crate::model::threads::Extent;
use crate::random::Random;
use crate::tally::Tally;
use crate::{crash, hostile, model, panic_text};

/// A kind of test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Random operations on simulated disks.
    Model,
    /// Random operations on real files from four I/O threads.
    Threads,
    /// The test of `Threads`, with about half of the requests cancelled.
    Cancel,
    /// Power cuts on simulated disks, one thread.
    Crash,
    /// Power cuts while four I/O threads send requests.
    CrashThreads,
    /// Power cuts during image-wide changes, one thread.
    Changes,
    /// The test of `Changes`, with requests from several I/O threads.
    ChangesThreads,
    /// Failing operations on simulated disks.
    Faults,
    /// Requests and image-wide changes, repeated; each time another operation fails.
    EachFault,
    /// Damaged images on simulated disks.
    Damage,
    /// Random changes of the graph under requests, on simulated disks.
    Graph,
    /// The test of `Graph` on real files, with requests from four I/O threads.
    GraphThreads,
    /// The test of `Model` with random filters.
    FilteredModel,
    /// The test of `Threads` with random filters.
    FilteredThreads,
    /// The test of `Crash` with random filters.
    FilteredCrash,
    /// The test of `Faults` with random filters.
    FilteredFaults,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 16] = [
        Kind::Model,
        Kind::Threads,
        Kind::Cancel,
        Kind::Crash,
        Kind::CrashThreads,
        Kind::Changes,
        Kind::ChangesThreads,
        Kind::Faults,
        Kind::EachFault,
        Kind::Damage,
        Kind::Graph,
        Kind::GraphThreads,
        Kind::FilteredModel,
        Kind::FilteredThreads,
        Kind::FilteredCrash,
        Kind::FilteredFaults,
    ];

    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Threads => "threads",
            Kind::Cancel => "cancel",
            Kind::Crash => "crash",
            Kind::CrashThreads => "crash-threads",
            Kind::Changes => "changes",
            Kind::ChangesThreads => "changes-threads",
            Kind::Faults => "faults",
            Kind::EachFault => "each-fault",
            Kind::Damage => "damage",
            Kind::Graph => "graph",
            Kind::GraphThreads => "graph-threads",
            Kind::FilteredModel => "filtered-model",
            Kind::FilteredThreads => "filtered-threads",
            Kind::FilteredCrash => "filtered-crash",
            Kind::FilteredFaults => "filtered-faults",
        }
    }

    /// Returns the kind with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether this kind of test exists for the variant. Not every image supports image-wide changes.
    fn suits(self, variant: &Variant) -> bool {
        match self {
            Kind::Changes | Kind::ChangesThreads => variant.check && variant.resizes,
            Kind::EachFault => variant.check,
            // Filters do not show the bitmaps of an image.
            Kind::FilteredModel | Kind::FilteredCrash => !variant.bitmaps,
            // These tests create their own images.
            Kind::Graph | Kind::GraphThreads => variant.name == "qcow2-4k",
            _ => true,
        }
    }

    /// Returns the count that measures the work of this kind: operations, power cuts, or jobs.
    fn counted(self, tally: &Tally, jobs: u64) -> u64 {
        match self {
            Kind::Model
            | Kind::Threads
            | Kind::Cancel
            | Kind::Graph
            | Kind::GraphThreads
            | Kind::FilteredModel
            | Kind::FilteredThreads => tally.operations,
            Kind::Crash
            | Kind::CrashThreads
            | Kind::Changes
            | Kind::ChangesThreads
            | Kind::FilteredCrash => tally.cuts,
            Kind::Faults | Kind::EachFault | Kind::Damage | Kind::FilteredFaults => jobs,
        }
    }

    /// Returns the approximate part of the count that one job does.
    fn per_job(self) -> u64 {
        match self {
            Kind::Model | Kind::FilteredModel => 1000,
            Kind::Threads | Kind::FilteredThreads => THREADS.phases * THREADS.operations,
            Kind::Cancel => CANCEL.phases * CANCEL.operations,
            Kind::Crash
            | Kind::CrashThreads
            | Kind::Changes
            | Kind::ChangesThreads
            | Kind::FilteredCrash => CUTS as u64,
            Kind::Faults | Kind::EachFault | Kind::Damage | Kind::FilteredFaults => 1,
            Kind::Graph | Kind::GraphThreads => CHANGES * 3 / 4,
        }
    }

    /// Runs one job.
    fn job(self, variant: &'static Variant, seed: u64) -> Tally {
        // Reading snapshots of large clusters takes a long time.
        let cuts = if variant.cluster >= 256 << 10 { CUTS / 5 } else { CUTS };
        match self {
            Kind::Model => model::sim::run(variant, seed, 250),
            Kind::Threads => model::threads::run(variant, seed, THREADS),
            Kind::Cancel => model::cancel::run(variant, seed, CANCEL),
            Kind::Crash => crash::run::run(variant, seed, CUTS),
            Kind::CrashThreads => crash::threads::run(variant, seed, 300, CUTS),
            Kind::Changes => crash::changes::run(variant, seed, cuts, From::OneThread),
            Kind::ChangesThreads => crash::changes::run(variant, seed, cuts, From::Threads),
            Kind::Faults => crash::faults::run(variant, seed),
            Kind::EachFault => crash::each_fault::run(variant, seed, 5),
            Kind::Graph => model::graph::run(seed, CHANGES),
            Kind::GraphThreads => model::graph::run_on_files(seed, CHANGES),
            Kind::FilteredModel => {
                let stack = Stack::random(variant, &mut Random::new(!seed));
                model::sim::run_filtered(variant, seed, 250, &stack)
            }
            Kind::FilteredThreads => {
                model::threads::run(variant, seed, Extent { filters: true, ..THREADS })
            }
            Kind::FilteredCrash => {
                let stack = Stack::random(variant, &mut Random::new(!seed));
                crash::run::run_filtered(variant, seed, CUTS, &stack)
            }
            Kind::FilteredFaults => {
                let stack = Stack::random_for_failures(variant, &mut Random::new(!seed));
                crash::faults::run_filtered(variant, seed, &stack)
            }
            Kind::Damage => {
                hostile::mutate::run(variant, seed);
                Tally::default()
            }
        }
    }
}

/// The interval at which a run in progress prints its table.
const REPORT_EVERY: Duration = Duration::from_secs(600);

/// The number of power cuts in one job.
const CUTS: usize = 20;

/// The size of one job on real files.
const THREADS: Extent = Extent { phases: 3, operations: 3000, filters: false };

/// The size of one job with cancelled requests.
const CANCEL: Extent = Extent { phases: 3, operations: 1000, filters: true };

/// The number of changes of the graph in one job.
const CHANGES: u64 = 1000;

/// The work and the duration of a run.
#[derive(Clone, Debug)]
pub struct Order {
    /// Kinds of test.
    pub kinds: Vec<Kind>,
    /// Variants of formats.
    pub variants: Vec<&'static Variant>,
    /// The first seed. Later jobs use greater seeds.
    pub seed: u64,
    /// No job begins after this time, and the amounts of work are ignored. `None`: the run ends when all work is done.
    pub time: Option<Duration>,
    /// The number of operations for each variant of a kind that is measured in operations; a fifth of it for [`Kind::Cancel`].
    pub operations: u64,
    /// The number of power cuts, failing disks or damaged disks for each variant of the other kinds.
    pub cuts: u64,
    /// The number of concurrent jobs.
    pub jobs: usize,
}

/// The finished work of one kind and variant.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    tally: Tally,
    started: u64,
    ended: u64,
    failures: u64,
}

impl Done {
    /// Whether the amount of work is complete when the running jobs have ended.
    fn is_enough(&self, kind: Kind, order: &Order) -> bool {
        let share = match kind {
            Kind::Model
            | Kind::Threads
            | Kind::Graph
            | Kind::GraphThreads
            | Kind::FilteredModel
            | Kind::FilteredThreads => order.operations,
            Kind::Cancel => order.operations.div_ceil(5),
            _ => order.cuts,
        };
        let under_way = self.started - self.ended - self.failures;
        kind.counted(&self.tally, self.ended) + under_way * kind.per_job() >= share
    }
}

type Table = BTreeMap<(Kind, &'static str), Done>;

struct Soak {
    order: Order,
    started: Instant,
    /// The time at which the table was last printed.
    reported: Mutex<Instant>,
    next: Mutex<usize>,
    table: Mutex<Table>,
    failures: Mutex<Vec<String>>,
}

/// Does the work of an order and prints the tally. Returns the failures.
///
/// # Panics
/// When a worker thread cannot be started.
pub fn run(order: &Order) -> Vec<String> {
    let soak = Soak {
        started: Instant::now(),
        reported: Mutex::new(Instant::now()),
        next: Mutex::new(0),
        table: Mutex::new(Table::new()),
        failures: Mutex::new(Vec::new()),
        order: order.clone(),
    };
    std::thread::scope(|scope| {
        for _ in 0..order.jobs.max(1) {
            scope.spawn(|| soak.work());
        }
    });
    let table = soak.table.into_inner().unwrap_or_default();
    report::print(&table, order, soak.started.elapsed());
    soak.failures.into_inner().unwrap_or_default()
}

impl Soak {
    fn work(&self) {
        while let Some((kind, variant, seed)) = self.take() {
            let outcome = std::panic::catch_unwind(|| kind.job(variant, seed));
            let mut table = self.table.lock().expect("no job panics with the table");
            let done = table.entry((kind, variant.name)).or_default();
            match outcome {
                Ok(tally) => {
                    done.tally.add(&tally);
                    done.ended += 1;
                    self.announce(kind, variant, done);
                    self.report_now_and_then(&table);
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

    /// Prints a line when a kind and variant has done its amount of work.
    fn announce(&self, kind: Kind, variant: &Variant, done: &Done) {
        let last = done.started == done.ended + done.failures;
        if self.order.time.is_none() && last && done.is_enough(kind, &self.order) {
            let elapsed = self.started.elapsed().as_secs();
            println!("{} {} has had its share after {elapsed} s", kind.name(), variant.name);
        }
    }

    /// Prints the current table if the last report is older than [`REPORT_EVERY`], because a long run may be stopped before its
    /// end.
    fn report_now_and_then(&self, table: &Table) {
        let mut reported = self.reported.lock().expect("nothing panics with it");
        if reported.elapsed() >= REPORT_EVERY {
            *reported = Instant::now();
            report::print(table, &self.order, self.started.elapsed());
        }
    }

    /// Chooses the next job: all kinds and variants one after another, without those that have done their amount of work or
    /// have failed three times. `None`: no job is left, or the time is over.
    fn take(&self) -> Option<(Kind, &'static Variant, u64)> {
        let mut next = self.next.lock().expect("nothing panics with it");
        let mut table = self.table.lock().expect("no job panics with the table");
        if self.order.time.is_some_and(|time| self.started.elapsed() >= time) {
            return None;
        }
        let Order { kinds, variants, .. } = &self.order;
        for _ in 0..kinds.len() * variants.len() {
            let turn = *next;
            *next += 1;
            let variant = variants[turn % variants.len()];
            let kind = kinds[turn / variants.len() % kinds.len()];
            if !kind.suits(variant) {
                continue;
            }
            let done = table.entry((kind, variant.name)).or_default();
            if done.failures >= 3
                || (self.order.time.is_none() && done.is_enough(kind, &self.order))
            {
                continue;
            }
            let seed = self.order.seed + 4 * turn as u64 + done.started % 4;
            done.started += 1;
            return Some((kind, variant, seed));
        }
        None
    }
}
