//! Damage of one bit of the header, of its extensions or of the snapshot table, followed by a repair and a write. After the
//! damage is undone, the data must be complete, unless a write without a repair loses it too: neither the repair nor the
//! write may free or overwrite clusters whose references the damage hides.
//!
//! Ordinary runs test a part of the bits; `OXBLK_TEST_SCALE=96` tests all bits.

use std::ops::Range;

use oxblk_core::check::{CheckReport, Fix};
use oxblk_core::{Backend, Result, WriteFlags};
use oxblk_ring::IoBuf;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_tests::scaled;

use super::changes_fail::set::{Held, Kind, Set};

/// The guest range that is written after a repair. All clusters of this range are unallocated.
const WRITTEN: Range<usize> = 210 << 10..242 << 10;
/// An ordinary run tests one of this many bits.
const SHARE: u64 = 48;
/// The value of [`SHARE`] for images with large LUKS headers.
const LUKS_SHARE: u64 = 96;
/// The space by which the file can grow, in bytes.
const ROOM: u64 = 512 << 10;
/// The size of the first cluster, which contains the header and its extensions.
const HEAD: usize = 4096;
/// The header field with the refcount order.
const WIDTH: Range<usize> = 96..100;

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()).try_into().unwrap()
}

/// Returns the byte ranges to damage: the header without the magic number, the extensions for bitmaps, for the LUKS header
/// and for the name of the data file, and the snapshot table.
fn ranges(bytes: &[u8]) -> Vec<Range<usize>> {
    let fields = 4..112;
    let (mut at, mut found) = (word(bytes, 100), vec![fields]);
    while word(bytes, at) != 0 {
        let end = at + 8 + word(bytes, at + 4).next_multiple_of(8);
        // The types of the extensions for bitmaps, for the LUKS header, and for the name of the data file.
        if [0x2385_2875, 0x0537_be77, 0x4441_5441].contains(&word(bytes, at)) {
            found.push(at..end);
        }
        at = end;
    }
    let table = word(bytes, 68);
    found.push(table..table + 72 * word(bytes, 60));
    found
}

async fn repair(image: &Set, fix: Fix) -> Result<CheckReport> {
    let backend = image.open_for_check().await?;
    let node = backend.node()?;
    let outcome = node.driver().check().unwrap().check(fix, &|_| ()).await;
    drop(node);
    backend.close().await?;
    outcome
}

async fn write_somewhere(image: &Set) -> Result<()> {
    let backend: Backend = image.open().await?;
    let data = IoBuf::from(vec![0xee; WRITTEN.len()]);
    let written = backend.write(WRITTEN.start as u64, data, WriteFlags::empty()).await;
    written.and(backend.close().await)
}

/// Repairs a restored image and returns its first fault.
async fn fault_of(image: &Set, old: &Held, written: bool) -> Option<String> {
    let repaired = async {
        repair(image, Fix::All).await?;
        Ok::<_, oxblk_core::Error>((repair(image, Fix::Nothing).await?, Held::of(image).await?))
    };
    let (report, mut now) = match repaired.await {
        Ok(repaired) => repaired,
        Err(error) => return Some(error.to_string()),
    };
    if (report.corruptions, report.check_errors) != (0, 0) {
        return Some(format!("still corrupt: {report:?}"));
    }
    if written {
        now.active[WRITTEN].copy_from_slice(&old.active[WRITTEN]);
        // After a write whose close failed, bitmaps may have the in-use flag, so they are not compared.
        now.bitmaps.clone_from(&old.bitmaps);
    }
    let lost = [
        ("data", now.active != old.active),
        ("a snapshot", !old.snapshots.iter().all(|one| now.snapshots.contains(one))),
        ("a bitmap", now.bitmaps != old.bitmaps),
    ];
    lost.into_iter().find(|(_, lost)| *lost).map(|(what, _)| format!("{what} is lost"))
}

/// Returns three versions of the image: with the original header, with the damaged bit corrected, and as it is.
fn put_right(trial: &Trial<'_>, damaged: &Set) -> [Set; 3] {
    let now = damaged.disk.bytes();
    let mut right = now.clone();
    right[trial.bit / 8] ^= 0x80 >> (trial.bit % 8);
    let mut old = if trial.bit / 8 < HEAD { now.clone() } else { right.clone() };
    old[..HEAD].copy_from_slice(&trial.original.disk.bytes()[..HEAD]);
    [old, right, now].map(|bytes| {
        let data = damaged.data.as_ref().map(|disk| disk.bytes());
        let mut restored = damaged.map(|_| Disk::from_bytes(9, data.as_deref().unwrap_or(&[])));
        restored.disk = Disk::from_bytes(9, &bytes);
        restored
    })
}

/// Returns `None` if the data is complete in at least one of the three versions. Otherwise returns the faults.
async fn recover(trial: &Trial<'_>, damaged: &Set, written: bool) -> Option<String> {
    let mut faults = Vec::new();
    for restored in put_right(trial, damaged) {
        match fault_of(&restored, trial.old, written).await {
            None => return None,
            Some(fault) => faults.push(fault),
        }
    }
    let (name, bit, fix) = (trial.name, trial.bit, trial.fix);
    let (byte, part) = (bit / 8, bit % 8);
    Some(format!("{name}: byte {byte}, bit {part}, {fix:?}, written: {written}: {faults:?}"))
}

/// Whether each of the three restored versions of the image is corrupt or cannot be checked.
async fn is_corrupt(trial: &Trial<'_>, damaged: &Set) -> bool {
    for restored in put_right(trial, damaged) {
        if let Ok(report) = repair(&restored, Fix::Nothing).await
            && (report.corruptions, report.check_errors) == (0, 0)
        {
            return false;
        }
    }
    true
}

/// One case: an image, the bit to flip, and the repair mode.
struct Trial<'a> {
    name: &'a str,
    original: &'a Set,
    old: &'a Held,
    bit: usize,
    fix: Fix,
}

impl Trial<'_> {
    async fn run(&self, bytes: &[u8]) -> Option<String> {
        let mut flipped = bytes.to_vec();
        flipped[self.bit / 8] ^= 0x80 >> (self.bit % 8);
        let mut damaged = self.original.copy();
        damaged.disk = Disk::from_bytes(8, &flipped);
        let fail = FailRule {
            op: FaultOp::Any,
            nth: None,
            range: Some(bytes.len() as u64 + ROOM..u64::MAX),
            errno: 28,
            once: false,
        };
        damaged.disk.set_faults(Faults { fail: vec![fail], ..Faults::default() });
        // The repair may be refused. A refused repair changes nothing.
        drop(repair(&damaged, self.fix).await);
        let repaired = damaged.disk.bytes();
        let corrupt = repaired != flipped && is_corrupt(self, &damaged).await;
        if repaired != flipped
            && let Some(fault) = recover(self, &damaged, false).await
        {
            return Some(fault);
        }
        drop(write_somewhere(&damaged).await);
        let lost = match damaged.disk.bytes() != repaired {
            true => recover(self, &damaged, true).await,
            false => None,
        };
        let mut untouched = self.original.copy();
        untouched.disk = Disk::from_bytes(8, &flipped);
        if lost.is_some() {
            drop(write_somewhere(&untouched).await);
            if !corrupt && recover(self, &untouched, true).await.is_some() {
                // A write without a repair loses the data too, so the repair is not the cause.
                return None;
            }
        }
        lost
    }
}

fn flip_bits(kind: &Kind, share: u64) {
    let taken = |bit: &usize| {
        let random = (*bit as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        random % share < scaled(1)
    };
    flip(kind, taken);
}

fn flip(kind: &Kind, taken: impl Fn(&usize) -> bool) {
    let original = kind.make();
    let bytes = original.disk.bytes();
    let old = sim::run(1, Held::by(&original, kind.name));
    let bits = ranges(&bytes).into_iter().flat_map(|range| range.start * 8..range.end * 8);
    let mut failures = Vec::new();
    for bit in bits.filter(taken) {
        for fix in [Fix::Leaks, Fix::All] {
            let trial = Trial { name: kind.name, original: &original, old: &old, bit, fix };
            failures.extend(sim::run(1, trial.run(&bytes)));
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

const SNAPSHOT: &[&str] = &["qemu-img", "snapshot", "-c", "one", "image"];
const AGAIN: &[&str] = &["qemu-img", "snapshot", "-c", "two", "image"];
const BITMAP: &[&str] = &["qemu-img", "bitmap", "--add", "-g", "4096", "image", "b"];
const MORE: &[&str] = &["qemu-io", "-c", "write -P 0xa3 40k 30k"];

#[test]
fn a_wrong_refcount_width_frees_nothing() {
    for changes in [&[MORE][..], &[SNAPSHOT, MORE]] {
        let kind = Kind::new("refcount width", "cluster_size=4k");
        flip(&kind.with(changes), |bit| WIDTH.contains(&(bit / 8)));
    }
}

#[test]
fn a_wrong_bit_loses_nothing_of_snapshots() {
    let kind = Kind::new("snapshots", "cluster_size=4k");
    flip_bits(&kind.with(&[SNAPSHOT, MORE, AGAIN, MORE]), SHARE);
}

#[test]
fn a_wrong_bit_loses_nothing_of_snapshots_and_bitmaps() {
    let kind = Kind::new("snapshots and bitmaps", "cluster_size=4k");
    flip_bits(&kind.with(&[SNAPSHOT, BITMAP, MORE]), SHARE);
}

#[test]
fn a_wrong_bit_loses_nothing_of_an_encrypted_image() {
    let create = "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1";
    flip_bits(&Kind::new("LUKS", create), LUKS_SHARE);
}

#[test]
fn a_wrong_bit_loses_nothing_of_an_image_with_a_backing_file() {
    flip_bits(&Kind::new("a backing file", "cluster_size=4k").over_backing(), SHARE);
}

#[test]
fn a_wrong_bit_loses_nothing_of_an_image_with_a_data_file() {
    flip_bits(&Kind::new("a data file", "cluster_size=4k,data_file=data"), SHARE);
}
