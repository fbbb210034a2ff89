//! The test harnesses for drivers, tools and servers.
//!
//! A test in `tests/` does the work of a user or a peer: it runs the built program, or uses the library as other programs do.
//! Each kind of test has one harness here. A line in the table of [`formats`] adds a new format to the first four harnesses.
//! The parser of the format needs its own fuzz target.
//!
//! - [`differential`]: the same command with oxblk and with the QEMU tools;
//! - [`hostile`]: damaged images, and images that an attacker has made;
//! - [`model`]: random operations against a model in memory;
//! - [`crash`]: power cuts and failing disks under random operations;
//! - [`filters`]: stacks of filters for the model and crash harnesses;
//! - [`fuzz`]: the fuzz targets, and the saved inputs that fuzzing found;
//! - [`guest`]: a Linux guest that boots from a served disk.
//!
//! This crate is not part of the product. Its functions panic if a test fails.

pub mod crash;
pub mod differential;
pub mod filters;
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
mod tasks;

/// Multiplies a number of random runs by the environment variable `OXBLK_TEST_SCALE`. Without the variable, tests make few runs
/// and take little time.
pub fn scaled(count: u64) -> u64 {
    let scale = std::env::var("OXBLK_TEST_SCALE").ok().and_then(|text| text.parse().ok());
    count.saturating_mul(scale.unwrap_or(1))
}

/// Returns the message of a caught panic.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
