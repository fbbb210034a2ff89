//! Examines the disks that a power cut may leave.

use oxblk_core::Backend;
use oxblk_ring::sim::{self, Disk};

use super::oracle::CrashOracle;
use super::qemu;
use super::workload::{BATCH, Workload};
use crate::filters::Stack;
use crate::filters::disks::Disks;
use crate::model::bitmaps;
use crate::model::chain::{self, Chain, Image, Tolerance};
use crate::model::ops::Op;
use crate::model::oracle::Oracle;
use crate::model::run;
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

/// The result of an examination.
pub(super) struct Seen {
    /// How often `qemu-img check` ran.
    pub(super) asked_qemu: u64,
    /// The contents of the disk before further requests.
    pub(super) bytes: Vec<u8>,
}

/// Examines a chain in which the disk `left` replaces the active image's disk. The image must open, its check must find nothing
/// worse than `tolerance`, the oracle must allow its contents, and the close must succeed. Further requests pass the filters of
/// the workload.
pub(super) async fn look(
    workload: &Workload,
    chain: &Chain,
    left: &Disk,
    oracle: &CrashOracle,
    tolerance: Tolerance,
    how: Look,
) -> Result<Seen, String> {
    let variant = workload.variant;
    let top = Image { variant, disk: left.clone() };
    let mut chain = chain.clone();
    if let Some(active) = chain.last_mut() {
        *active = top.clone();
    }
    let mut asked_qemu = 0;
    let mut ask = |disk: &Disk| {
        if !variant.checked_by_qemu {
            return Ok(());
        }
        asked_qemu += 1;
        qemu::check(variant, disk, tolerance)
    };
    if variant.check && !variant.repairs_on_open {
        chain::check(&top, tolerance).await.map_err(|e| format!("before opening: {e}"))?;
        if how.by_qemu {
            ask(left).map_err(|e| format!("before opening: {e}"))?;
        }
    }
    let disk = chain::open(&chain).await.map_err(|e| format!("cannot be opened: {e}"))?;
    let all = Op::Read { offset: 0, len: workload.shape.size };
    let seen = run::execute(&disk, &all).await.map_err(|e| format!("cannot be read: {e}"))?;
    let run::Seen::Bytes(bytes) = seen else { return Err("a read without bytes".to_owned()) };
    oracle.check(&bytes)?;
    if variant.bitmaps {
        bitmaps::check_honest(&disk, variant.cluster).await?;
    }
    let mut after = top;
    if how.go_on {
        after.disk = go_on(workload, &chain, disk, left, bytes.to_vec())
            .await
            .map_err(|e| format!("going on: {e}"))?;
    } else {
        chain::close(disk).await.map_err(|e| format!("cannot be closed: {e}"))?;
    }
    if variant.check && (how.go_on || variant.repairs_on_open) {
        chain::check(&after, tolerance).await.map_err(|e| format!("after closing: {e}"))?;
        if how.by_qemu {
            ask(&after.disk).map_err(|e| format!("after closing: {e}"))?;
        }
    }
    Ok(Seen { asked_qemu, bytes: bytes.to_vec() })
}

/// Sends further requests to the open image on the disk `left`, and closes it. If the workload has filters, the requests pass
/// the filters, on new copies. Returns the disk of the image.
async fn go_on(
    workload: &Workload,
    chain: &Chain,
    mut disk: Backend,
    left: &Disk,
    bytes: Vec<u8>,
) -> Result<Disk, String> {
    let mut filters = None;
    if workload.stack != Stack::default() {
        chain::close(disk).await?;
        let disks = Disks::new(&workload.stack, left, &bytes);
        disk = chain::open_filtered(chain, &disks).await?;
        filters = Some(disks);
    }
    let mut random = Random::new(workload.seed ^ 0x60);
    let mut model = Oracle::new(bytes);
    for _ in 0..6 {
        let batch = workload.shape.random_batch(&mut random, BATCH);
        run::run_batch(&disk, &mut model, &batch).await?;
    }
    run::compare_all(&disk, &mut model).await?;
    chain::close(disk).await?;
    let Some(disks) = filters else { return Ok(left.clone()) };
    disks.check_copies(model.bytes())?;
    Ok(disks.image())
}

/// A power cut.
pub(super) struct Cut {
    /// The number of boundaries that the disks had passed.
    pub(super) boundary: u64,
    /// The disks at this moment.
    pub(super) disks: Disks,
    /// The number of the cut in its run.
    pub(super) number: usize,
}

/// Examines the disks that a power cut may leave: with all completed writes, with the flushed writes only, and twice with a
/// random part of the other writes. The number of the cut chooses which disk `qemu-img check` examines (one at every second
/// cut) and which disks get further requests.
pub(super) fn look_at_cut(
    workload: &Workload,
    chain: &Chain,
    cut: &Cut,
    oracle: &CrashOracle,
) -> Result<Tally, String> {
    let Cut { boundary, disks, number } = cut;
    let (boundary, number) = (*boundary, *number);
    let some = |seed: u64| {
        let each = disks.all().into_iter().zip(seed..);
        each.map(|(disk, seed)| disk.after_power_loss(seed)).collect()
    };
    let every = |left: fn(&Disk) -> Disk| disks.all().into_iter().map(left).collect();
    let left: [(&str, Vec<Disk>); 4] = [
        ("all completed writes are kept", every(Disk::after_power_loss_all)),
        ("all writes that were not flushed are lost", every(Disk::after_power_loss_none)),
        ("some writes are kept", some(boundary)),
        ("some writes are kept", some(!boundary >> 1)),
    ];
    let mut tally = Tally { cuts: 1, ..Tally::default() };
    for (index, (what, left)) in left.iter().enumerate() {
        let how = Look {
            go_on: (number + index).is_multiple_of(3),
            by_qemu: number.is_multiple_of(2) && number / 2 % 4 == index,
        };
        let attempt = async {
            let left = disks.on(left);
            left.check_guest_copies(oracle)?;
            let image = left.recover(boundary).await?;
            look(workload, chain, &image, oracle, Tolerance::Leaks, how).await
        };
        tally.checked_by_qemu += sim::run(boundary, attempt)
            .map_err(|error| format!("cut at boundary {boundary}, {what} ({index}): {error}"))?
            .asked_qemu;
        tally.disks += 1;
    }
    Ok(tally)
}
