//! Failing operations on a simulated disk: data of a failed request may be lost, but not data of a completed request.
//!
//! Operations on the disk of the active image (reads, writes, zeroing, punching holes, changes of size, flushes) fail at
//! random, as on a bad or full disk. A failed request may have been executed in part. All other data must be correct, and the
//! image must stay usable. When the disk works again, the close of the image must succeed, and its check must find nothing
//! worse than leaks.

use oxblk_core::Errno;
use oxblk_ring::sim::{self, FailRule, FaultOp, Faults};

use super::history::History;
use super::look::{Look, look};
use super::run::tracked;
use super::workload::Workload;
use crate::filters::Stack;
use crate::filters::disks::Disks;
use crate::formats::Variant;
use crate::model::chain::{self, Chain, Tolerance};
use crate::model::ops::Op;
use crate::random::Random;
use crate::tally::Tally;

/// Chooses the operations of the disk that fail.
fn faults(random: &mut Random) -> Faults {
    if random.one_in(2) {
        return Faults { fail_rate: 0.03, ..Faults::default() };
    }
    let kinds = [FaultOp::Write, FaultOp::Sync, FaultOp::Fallocate, FaultOp::Read, FaultOp::Any];
    let rule = FailRule {
        op: *random.pick(&kinds),
        nth: Some(random.within(1, 200)),
        range: None,
        errno: if random.one_in(2) { Errno::NOSPC } else { Errno::IO },
        once: random.one_in(2),
    };
    Faults { fail: vec![rule], ..Faults::default() }
}

/// Runs the batches on a failing disk. Returns the number of guest requests that failed.
async fn work(
    workload: &Workload,
    chain: &Chain,
    disks: &Disks,
    history: &History,
) -> Result<u64, String> {
    let medium = disks.image_disk();
    let mut random = Random::new(workload.seed ^ 0xfa);
    let disk = chain::open_filtered(chain, disks).await?;
    medium.set_faults(faults(&mut random));
    let mut failed = 0;
    for (index, batch) in workload.batches.iter().enumerate() {
        if index + 4 == workload.batches.len() {
            medium.set_faults(Faults::default());
        }
        let tasks: Vec<_> = batch
            .iter()
            .map(|op| oxblk_ring::spawn(tracked(disk.clone(), op.clone(), history.clone())))
            .collect();
        for task in tasks {
            failed += u64::from(task.await.is_err());
        }
    }
    medium.set_faults(Faults::default());
    // After a close without an error, the data of all completed operations survives a power cut.
    let flush = history.issue(&Op::Flush);
    chain::close(disk).await.map_err(|e| format!("cannot be closed on a good disk: {e}"))?;
    history.complete(flush);
    Ok(failed)
}

fn attempt(workload: &Workload) -> Result<Tally, String> {
    sim::run(workload.seed, async {
        let (chain, disks, start) = workload.build().await?;
        let history = History::new(&disks.all());
        let failed = work(workload, &chain, &disks, &history).await?;
        let mut replay = history.replay(start);
        let how = Look { go_on: true, by_qemu: true };
        let end = replay.at_the_end();
        let image = disks.recover(workload.seed).await?;
        let seen = look(workload, &chain, &image, end, Tolerance::Leaks, how).await?;
        let operations = history.operations();
        let mut tally =
            Tally { operations, failed, checked_by_qemu: seen.asked_qemu, ..Tally::default() };
        tally.chain(workload.images());
        Ok(tally)
    })
}

/// Runs the workload of a seed on a failing disk.
///
/// # Panics
/// When data of a completed operation is lost, or the image has worse faults than leaks. The message contains the seed.
pub fn run(variant: &'static Variant, seed: u64) -> Tally {
    run_filtered(variant, seed, &Stack::default())
}

/// Does the same as [`run()`] with filters above and below the active image.
///
/// # Panics
/// As [`run()`].
pub fn run_filtered(variant: &'static Variant, seed: u64, stack: &Stack) -> Tally {
    let workload = Workload::new(variant, seed, stack);
    let attempt = std::panic::AssertUnwindSafe(|| attempt(&workload));
    let outcome = std::panic::catch_unwind(attempt);
    match outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        Ok(tally) => tally,
        Err(error) => panic!("{} faults: {error}", workload.describe()),
    }
}
