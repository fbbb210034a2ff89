//! Images on one simulated disk: functions that create images with qemu-img, open them and check them.
//!
//! Functions without a format work on qcow2 images.

use std::sync::Arc;

use oxblk_core::check::{Finding, Fix};
use oxblk_core::{Backend, Graph, OpenFlags, Options, Perm, Permissions, Result};
use oxblk_ring::sim::Disk;

use crate::program::Program;
use crate::sim_disk::{self, Pace};

/// Creates a qcow2 image of `size` bytes with `qemu-img create -o options`.
///
/// # Panics
/// When the image cannot be created.
pub fn new(seed: u64, options: &str, size: u64) -> Disk {
    let scratch = crate::scratch::in_memory();
    let path = scratch.path().join("a.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", options];
    Program::new("qemu-img").args(create).arg(&path).arg(size.to_string()).succeed();
    Disk::from_bytes(seed, &std::fs::read(&path).expect("the image that qemu-img created"))
}

/// Opens the image for reading, writing and resizing, or for a check if `check` is set.
///
/// # Errors
/// The error that the driver reports.
pub async fn open(disk: &Disk, check: bool) -> Result<Backend> {
    open_as("qcow2", disk, OpenFlags { check, ..OpenFlags::default() }).await
}

/// Opens an image of a format for reading and, unless `flags` are read-only, for writing and resizing.
///
/// # Errors
/// The error that the driver reports.
pub async fn open_as(format: &str, disk: &Disk, flags: OpenFlags) -> Result<Backend> {
    open_with(&format!("driver={format}"), disk, flags).await
}

/// Does the same as [`open_as`], with `options` that contain the driver and its options.
///
/// # Errors
/// The error that the driver reports.
pub async fn open_with(options: &str, disk: &Disk, flags: OpenFlags) -> Result<Backend> {
    let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
    graph.keep_open(sim_disk::add(&graph, "disk", disk, false, Pace::AtOnce)?)?;
    let options = Options::from_dotted(&format!("{options},file=disk"), None)?;
    let mut taken = Perm::CONSISTENT_READ;
    if !flags.read_only {
        taken |= Perm::WRITE | Perm::RESIZE;
    }
    let node = graph.open(options, OpenFlags { unmap: true, ..flags }).await?;
    Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken))
}

/// Asserts that the driver's check finds no corruption, and no leaks unless `leaks` is set.
///
/// # Panics
/// When the check finds a corruption, or leaks although `leaks` is not set.
pub async fn assert_sound(disk: &Disk, leaks: bool, what: &str) {
    let backend = open(disk, true).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    check_sound(&backend, leaks, what).await;
    backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// Does the same as [`assert_sound`] for an open image.
///
/// # Panics
/// When the check finds a corruption, or leaks although `leaks` is not set.
pub async fn check_sound(backend: &Backend, leaks: bool, what: &str) {
    let node = backend.node().expect("an open image");
    let report_finding = |finding: Finding| eprintln!("{finding}");
    let check = node.driver().check().expect("a format with a check");
    let report =
        check.check(Fix::Nothing, &report_finding).await.unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}");
    assert!(leaks || report.leaks == 0, "{what}: {} leaks", report.leaks);
}
