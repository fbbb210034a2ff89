//! The fuzz targets. Each target is a function that takes arbitrary bytes and panics when the code under test is wrong.
//!
//! The programs in `fuzz/` pass these functions to libFuzzer. Ordinary tests replay the inputs that are saved in `fuzz/seeds`
//! ([`replay`]). So every change is tested with the inputs that fuzzing has found, without a fuzzing toolchain.

pub mod luks_header;
pub mod nbd_negotiation;
pub mod nbd_replies;
pub mod parallels_header;
pub mod qcow2_bitmaps;
pub mod qcow2_header;
pub mod qcow2_subclusters;
pub mod qcow2_tables;
pub mod qed_header;
pub mod vdi_header;
pub mod vpc_header;

use std::path::Path;

/// A target and its name. Its program in `fuzz/` and its directory of saved inputs have the same name.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("luks_header", luks_header::run),
    ("nbd_negotiation", nbd_negotiation::run),
    ("nbd_replies", nbd_replies::run),
    ("parallels_header", parallels_header::run),
    ("qcow2_bitmaps", qcow2_bitmaps::run),
    ("qcow2_header", qcow2_header::run),
    ("qcow2_subclusters", qcow2_subclusters::run),
    ("qcow2_tables", qcow2_tables::run),
    ("qed_header", qed_header::run),
    ("vdi_header", vdi_header::run),
    ("vpc_header", vpc_header::run),
];

/// Runs every saved input of a target. Returns the number of inputs.
///
/// # Panics
/// When an input makes the target panic. The message contains the path of the file.
pub fn replay((name, run): Target) -> usize {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(name);
    let Ok(files) = std::fs::read_dir(&seeds) else { return 0 };
    let mut count = 0;
    for file in files {
        let path = file.expect("a saved input").path();
        let bytes = std::fs::read(&path).expect("a saved input");
        if let Err(panic) = std::panic::catch_unwind(|| run(&bytes)) {
            panic!("{name}: {}: {}", path.display(), crate::panic_text(&*panic));
        }
        count += 1;
    }
    count
}
