//! The harnesses that every driver, tool and server passes.
//!
//! A test in `tests/` is what a user or a peer does: it runs the built program, or drives the library
//! as an embedder would. Each kind of test has one harness here, so that a new format gets all of
//! them by a line in the table of [`formats`]:
//!
//! - [`differential`]: the same command through oxblk and through the QEMU tools;
//! - [`hostile`]: damaged images, and images made to do harm;
//! - [`model`]: random operations against a model in memory;
//! - [`crash`]: power cuts and failing disks under random operations;
//! - [`fuzz`]: the fuzz targets, and what fuzzing found, replayed;
//! - [`guest`]: a Linux guest that boots from a served disk.
//!
//! Nothing here is part of the product, and everything reports by panicking.

pub mod crash;
pub mod differential;
pub mod formats;
pub mod fuzz;
pub mod guest;
pub mod host_clusters;
pub mod hostile;
pub mod model;
pub mod perturbed;
pub mod program;
pub mod random;
pub mod scratch;
pub mod sim_disk;
pub mod sim_image;
pub mod soak;
pub mod tally;

/// A count of random runs, multiplied by the environment's `OXBLK_TEST_SCALE`. Ordinary runs take a short share;
/// whoever has more time sets the variable.
pub fn scaled(count: u64) -> u64 {
    let scale = std::env::var("OXBLK_TEST_SCALE").ok().and_then(|text| text.parse().ok());
    count.saturating_mul(scale.unwrap_or(1))
}

/// What a caught panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
