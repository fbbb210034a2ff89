//! Power cuts in a run on the simulated executor. The run has one thread, and the same seed gives the same run.

use oxblk_core::Backend;
use oxblk_ring::sim::{self, Disk};

use super::history::History;
use super::look::{Cut, Look, look, look_at_cut};
use super::workload::Workload;
use crate::filters::Stack;
use crate::filters::disks::Disks;
use crate::formats::Variant;
use crate::model::chain::{self, Chain, Tolerance};
use crate::model::ops::Op;
use crate::model::run::{self, Seen};
use crate::tally::Tally;

/// Executes one operation and records its issue and its completion in the history.
pub(super) async fn tracked(disk: Backend, op: Op, history: History) -> Result<Seen, String> {
    let number = history.issue(&op);
    let seen = run::execute(&disk, &op).await.map_err(|error| format!("{op:?}: {error}"))?;
    history.complete(number);
    Ok(seen)
}

/// Runs the batches one after another. The operations of one batch run concurrently.
async fn work(
    workload: &Workload,
    chain: &Chain,
    disks: &Disks,
    history: &History,
) -> Result<(), String> {
    let disk = chain::open_filtered(chain, disks).await?;
    for batch in &workload.batches {
        let tasks: Vec<_> = batch
            .iter()
            .map(|op| oxblk_ring::spawn(tracked(disk.clone(), op.clone(), history.clone())))
            .collect();
        for task in tasks {
            task.await?;
        }
    }
    chain::close(disk).await
}

fn attempt(workload: &Workload, cuts: usize) -> Result<Tally, String> {
    let (chain, disks, start, history) = sim::run(workload.seed, async {
        let (chain, disks, start) = workload.build().await?;
        let history = History::new(&disks.all());
        Disk::keep_common_moments(&disks.all(), workload.seed, cuts);
        work(workload, &chain, &disks, &history).await?;
        Ok::<_, String>((chain, disks, start, history))
    })?;
    let moments = disks.image_disk().common_moments();
    let mut tally = Tally { operations: history.operations(), ..Tally::default() };
    tally.chain(workload.images());
    let mut replay = history.replay(start);
    for (number, (boundary, moment)) in moments.iter().enumerate() {
        let cut = Cut { boundary: *boundary, disks: disks.on(moment), number };
        tally.add(&look_at_cut(workload, &chain, &cut, replay.at(*boundary))?);
    }
    let how = Look { go_on: false, by_qemu: true };
    let image = disks.image();
    let end = look(workload, &chain, &image, replay.at_the_end(), Tolerance::Clean, how);
    let end = sim::run(0, end).and_then(|seen| {
        disks.check_copies(&seen.bytes)?;
        Ok(seen)
    });
    tally.checked_by_qemu += end.map_err(|error| format!("without a cut: {error}"))?.asked_qemu;
    Ok(tally)
}

/// Runs the workload of a seed, then examines the disks that a power cut may leave, at up to `cuts` of its write boundaries.
///
/// # Panics
/// When flushed data is lost, or an image has worse faults than leaks. The message contains the seed and the boundary.
pub fn run(variant: &'static Variant, seed: u64, cuts: usize) -> Tally {
    run_filtered(variant, seed, cuts, &Stack::default())
}

/// Does the same as [`run()`] with filters above and below the active image. After a cut, the copies of a quorum vote.
///
/// # Panics
/// As [`run()`], and when a copy that a filter keeps loses flushed data.
pub fn run_filtered(variant: &'static Variant, seed: u64, cuts: usize, stack: &Stack) -> Tally {
    let workload = Workload::new(variant, seed, stack);
    let attempt = std::panic::AssertUnwindSafe(|| attempt(&workload, cuts));
    let outcome = std::panic::catch_unwind(attempt);
    match outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        Ok(tally) => tally,
        Err(error) => panic!("{} crash: {error}", workload.describe()),
    }
}
