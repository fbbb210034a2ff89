//! The harnesses that every driver, tool and server passes.
//!
//! A test in `tests/` is what a user or a peer does: it runs the built program, or drives the library
//! as an embedder would. Each kind of test has one harness here, so that a new format gets all of
//! them by a line in a table:
//!
//! - [`differential`]: the same command through oxblk and through the QEMU tools;
//! - [`hostile`]: damaged images, and images made to do harm;
//! - [`model`]: random operations against a model in memory;
//! - [`crash`]: power cuts and failing disks under random operations;
//! - [`guest`]: a Linux guest that boots from a served disk.
//!
//! Nothing here is part of the product, and everything reports by panicking.

pub mod crash;
pub mod differential;
pub mod drivers;
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

/// What a caught panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
