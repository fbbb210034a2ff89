//! Power cuts in the middle of one change of an image: after the cut, the disk must contain the old image or the new image.
//!
//! `qemu-img` creates the image, so the image can be a qcow2 image of any kind. The backing file of the image is not opened.
//! The test decides which property is compared: its `look` function examines the open image and returns a value.

use std::sync::Arc;

use oxblk_core::check::{Finding, Fix};
use oxblk_core::{Backend, Graph, OpenFlags, Options, Perm, Permissions, Result};
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::{self, Disk};

use crate::program::Program;
use crate::scratch;
use crate::sim_disk::{self, Pace};

/// Creates a qcow2 image with `qemu-img` and puts its file on a simulated disk. Each entry of `prepare` is a command line of a
/// QEMU tool that changes the file before the copy.
///
/// # Panics
/// When a tool fails.
pub fn image(seed: u64, create: &[&str], prepare: &[&[&str]]) -> Disk {
    let directory = scratch::in_memory();
    let run = |tool: &str, args: &[&str]| {
        Program::new(tool).args(args).directory(directory.path()).succeed();
    };
    run("qemu-img", &[&["create", "-q", "-u", "-f", "qcow2"], create].concat());
    for words in prepare {
        if let Some((tool, args)) = words.split_first() {
            run(tool, args);
        }
    }
    let file = std::fs::read(directory.path().join("image")).expect("the image");
    Disk::from_bytes(seed, &file)
}

/// Opens the image on a disk, writable and without its backing file.
///
/// # Errors
/// The errors that the drivers report.
pub async fn open(disk: &Disk, options: &str, check: bool) -> Result<Backend> {
    let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
    graph.keep_open(sim_disk::add(&graph, "disk", disk, false, Pace::AtOnce)?)?;
    let options = Options::from_dotted(&format!("driver=qcow2,file=disk{options}"), None)?;
    let flags = OpenFlags { unmap: true, no_backing: true, check, ..OpenFlags::default() };
    let node = graph.open(options, flags).await?;
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken))
}

/// Reads the complete contents of the disk.
///
/// # Panics
/// When the read fails.
pub async fn contents(image: &Backend) -> Vec<u8> {
    let len = usize::try_from(image.size()).expect("a small disk");
    image.read(0, IoBufMut::new(len)).await.expect("the contents").to_vec()
}

/// Asserts that the driver's check finds no corruption, and no leaks unless `leaks` is set.
///
/// # Panics
/// When the check finds a corruption, or leaks although `leaks` is not set.
pub async fn assert_sound(disk: &Disk, leaks: bool, what: &str) {
    let image = open(disk, "", true).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let node = image.node().expect("a node");
    let report_finding = |finding: Finding| eprintln!("{what}: {finding}");
    let check = node.driver().check().expect("a format with a check");
    let report = check.check(Fix::Nothing, &report_finding).await.expect("a check");
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
    assert!(leaks || report.leaks == 0, "{what}: {} leaks", report.leaks);
    drop(node);
    image.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// The settings of one test of a change.
pub struct Trial<'a> {
    /// Describes the change in the messages of failures.
    pub what: &'a str,
    /// The seed of all random choices.
    pub seed: u64,
    /// Options with which the image is opened for the change, with a comma before them.
    pub options: &'a str,
    /// Whether an image must be opened for writing after a power cut before it passes the check.
    pub repairs_on_open: bool,
}

/// Makes a change, then examines the disks that a power cut may leave at up to 16 write boundaries of the change.
///
/// # Panics
/// When the change fails or changes nothing, or when an image on one of these disks cannot be opened, is corrupt, or is neither
/// the old nor the new image.
pub fn old_or_new<S: PartialEq>(
    trial: &Trial<'_>,
    disk: &Disk,
    change: &impl AsyncFn(&Backend) -> Result<()>,
    look: &impl AsyncFn(&Backend) -> S,
) {
    let (old, new) = attempt(trial, disk, change, look);
    assert!(old != new, "{}: nothing changed", trial.what);
    look_at_cuts(trial, disk, look, |now| *now == old || *now == new);
}

/// Does the same as [`old_or_new`] for a change that `look` cannot see: `look` returns the same value before, during and after
/// the change.
///
/// # Panics
/// When the change fails or is visible, or when an image on one of the disks cannot be opened, is corrupt, or looks different
/// from the old image.
pub fn same_throughout<S: PartialEq>(
    trial: &Trial<'_>,
    disk: &Disk,
    change: &impl AsyncFn(&Backend) -> Result<()>,
    look: &impl AsyncFn(&Backend) -> S,
) {
    let (old, new) = attempt(trial, disk, change, look);
    assert!(old == new, "{}: the change is visible", trial.what);
    look_at_cuts(trial, disk, look, |now| *now == old);
}

async fn seen<S>(disk: &Disk, what: &str, look: &impl AsyncFn(&Backend) -> S) -> S {
    let image = open(disk, "", false).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    let seen = look(&image).await;
    image.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
    seen
}

/// Makes the change. Returns the values of `look` before and after the change.
fn attempt<S>(
    trial: &Trial<'_>,
    disk: &Disk,
    change: &impl AsyncFn(&Backend) -> Result<()>,
    look: &impl AsyncFn(&Backend) -> S,
) -> (S, S) {
    let Trial { what, seed, .. } = *trial;
    sim::run(seed, async {
        // `look` may write, so call it on a copy of the disk.
        let old = seen(&disk.after_power_loss_all(), what, look).await;
        disk.keep_moments(seed, 16);
        let image = open(disk, trial.options, false).await.expect("the image");
        change(&image).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        image.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let whole = disk.after_power_loss_none();
        assert_sound(&whole, false, what).await;
        (old, seen(&whole, what, look).await)
    })
}

fn look_at_cuts<S>(
    trial: &Trial<'_>,
    disk: &Disk,
    look: &impl AsyncFn(&Backend) -> S,
    allowed: impl Fn(&S) -> bool,
) {
    let Trial { what, seed, .. } = *trial;
    let moments = disk.moments();
    assert!(!moments.is_empty(), "{what}: nothing was written");
    for (boundary, moment) in moments {
        let any = (0..2).map(|seed| moment.after_power_loss(seed));
        let ends = [moment.after_power_loss_none(), moment.after_power_loss_all()];
        for (number, left) in any.chain(ends).enumerate() {
            let what = format!("{what}, cut at {boundary}, disk {number}");
            sim::run(seed, async {
                if !trial.repairs_on_open {
                    assert_sound(&left, true, &what).await;
                }
                let now = seen(&left, &what, look).await;
                assert!(allowed(&now), "{what}: neither the old image nor the new");
                assert_sound(&left, true, &what).await;
            });
        }
    }
}
