//! Examines the disks that a power cut may leave.

use oxblk_ring::sim::{self, Disk};

use super::oracle::CrashOracle;
use super::qemu;
use super::workload::{BATCH, Workload};
use crate::model::bitmaps;
use crate::model::chain::{self, Chain, Image, Tolerance};
use crate::model::ops::Op;
use crate::model::oracle::Oracle;
use crate::model::run::{self, Seen};
use crate::random::Random;
use crate::tally::Tally;

/// How thorough an examination is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Look {
    /// Sends requests to the image after its contents have been read.
    pub(super) go_on: bool,
    /// Runs `qemu-img check` as well.
    pub(super) by_qemu: bool,
}

/// Examines a chain in which the disk `left` replaces the active image's disk. The image must open, its check must find nothing
/// worse than `tolerance`, the oracle must allow its contents, and the close must succeed. Returns how often `qemu-img check`
/// ran.
pub(super) async fn look(
    workload: &Workload,
    chain: &Chain,
    left: &Disk,
    oracle: &CrashOracle,
    tolerance: Tolerance,
    how: Look,
) -> Result<u64, String> {
    let variant = workload.variant;
    let top = Image { variant, disk: left.clone() };
    let mut chain = chain.clone();
    if let Some(active) = chain.last_mut() {
        *active = top.clone();
    }
    let mut asked = 0;
    let mut ask = || {
        if !variant.checked_by_qemu {
            return Ok(());
        }
        asked += 1;
        qemu::check(variant, left, tolerance)
    };
    if variant.check && !variant.repairs_on_open {
        chain::check(&top, tolerance).await.map_err(|e| format!("before opening: {e}"))?;
        if how.by_qemu {
            ask().map_err(|e| format!("before opening: {e}"))?;
        }
    }
    let disk = chain::open(&chain).await.map_err(|e| format!("cannot be opened: {e}"))?;
    let all = Op::Read { offset: 0, len: workload.shape.size };
    let seen = run::execute(&disk, &all).await.map_err(|e| format!("cannot be read: {e}"))?;
    let Seen::Bytes(bytes) = seen else { return Err("a read without bytes".to_owned()) };
    oracle.check(&bytes)?;
    if variant.bitmaps {
        bitmaps::check_honest(&disk, variant.cluster).await?;
    }
    if how.go_on {
        let mut random = Random::new(workload.seed ^ 0x60);
        let mut model = Oracle::new(bytes.to_vec());
        for _ in 0..6 {
            let batch = workload.shape.random_batch(&mut random, BATCH);
            run::run_batch(&disk, &mut model, &batch)
                .await
                .map_err(|e| format!("going on: {e}"))?;
        }
        run::compare_all(&disk, &mut model).await.map_err(|e| format!("going on: {e}"))?;
    }
    chain::close(disk).await.map_err(|e| format!("cannot be closed: {e}"))?;
    if variant.check && (how.go_on || variant.repairs_on_open) {
        chain::check(&top, tolerance).await.map_err(|e| format!("after closing: {e}"))?;
        if how.by_qemu {
            ask().map_err(|e| format!("after closing: {e}"))?;
        }
    }
    Ok(asked)
}

/// Examines four disks that a power cut at this moment of the active disk may leave: one with all completed writes, one with
/// the flushed writes only, and two with a random part of the other writes. The `number` of the cut chooses which disk
/// `qemu-img check` examines (one at every second cut) and which disks get further requests.
pub(super) fn look_at_cut(
    workload: &Workload,
    chain: &Chain,
    (boundary, moment): &(u64, Disk),
    oracle: &CrashOracle,
    number: usize,
) -> Result<Tally, String> {
    let boundary = *boundary;
    let left = [
        ("all completed writes are kept", moment.after_power_loss_all()),
        ("all writes that were not flushed are lost", moment.after_power_loss_none()),
        ("some writes are kept", moment.after_power_loss(boundary)),
        ("some writes are kept", moment.after_power_loss(!boundary)),
    ];
    let mut tally = Tally { cuts: 1, ..Tally::default() };
    for (index, (what, disk)) in left.iter().enumerate() {
        let how = Look {
            go_on: (number + index).is_multiple_of(3),
            by_qemu: number.is_multiple_of(2) && number / 2 % left.len() == index,
        };
        let attempt = look(workload, chain, disk, oracle, Tolerance::Leaks, how);
        tally.checked_by_qemu += sim::run(boundary, attempt)
            .map_err(|error| format!("cut at boundary {boundary}, {what} ({index}): {error}"))?;
        tally.disks += 1;
    }
    Ok(tally)
}
