//! Examines an image on a simulated disk with the QEMU tools.

use std::path::{Path, PathBuf};

use oxblk_core::Options;
use oxblk_ring::sim::Disk;

use crate::formats::{self, Variant};
use crate::model::chain::{Chain, SPLIT, Tolerance};
use crate::program::Program;
use crate::scratch;

/// Checks that `qemu-img check` finds nothing worse than `tolerance`, if QEMU can check images of the variant.
///
/// # Errors
/// The error contains the tool's output.
pub fn check(variant: &Variant, disk: &Disk, tolerance: Tolerance) -> Result<(), String> {
    const LEAKS: i32 = 3;
    if !variant.checked_by_qemu {
        return Ok(());
    }
    let directory = scratch::in_memory();
    let path = directory.path().join("image");
    save(variant, disk, &path).map_err(|e| e.to_string())?;
    let mut options = Options::new();
    options.insert("driver", variant.driver());
    options.set("file.filename", path.display().to_string()).map_err(|e| e.to_string())?;
    options.set("file.driver", "file").map_err(|e| e.to_string())?;
    if variant.data_file {
        let data = data_path(&path).display().to_string();
        options.set("data-file.filename", data).map_err(|e| e.to_string())?;
        options.set("data-file.driver", "file").map_err(|e| e.to_string())?;
    }
    variant.add_open_options(&mut options);
    let check = formats::with_secrets(Program::new("qemu-img").arg("check"));
    let reply = check.arg(format!("json:{}", options.to_json())).run();
    match reply.code() {
        0 => Ok(()),
        LEAKS if tolerance == Tolerance::Leaks => Ok(()),
        code => Err(format!("qemu-img check ended with {code}: {}{}", reply.out(), reply.err())),
    }
}

/// Returns the path of the data file of the image at `path`.
fn data_path(path: &Path) -> PathBuf {
    path.with_extension("data")
}

/// Copies a disk to a file, or to two files if the variant has a data file.
fn save(variant: &Variant, disk: &Disk, path: &Path) -> std::io::Result<()> {
    let bytes = disk.bytes();
    let split = usize::try_from(SPLIT).unwrap_or(usize::MAX);
    match bytes.split_at_checked(split).filter(|_| variant.data_file) {
        None => scratch::write_sparse(path, &bytes),
        Some((image, data)) => {
            scratch::write_sparse(path, image)?;
            scratch::write_sparse(&data_path(path), data)
        }
    }
}

/// Saves the images of a chain in a directory for the analysis of a failure. Returns a text with the path of the directory.
pub(super) fn keep(chain: &Chain, active: &Disk) -> String {
    let directory = scratch::in_memory().keep();
    for (index, image) in chain.iter().enumerate() {
        let last = index + 1 == chain.len();
        let disk = if last { active } else { &image.disk };
        let saved = save(
            image.variant,
            disk,
            &directory.join(format!("image{index}-{}", image.variant.name)),
        );
        if let Err(error) = saved {
            return format!("cannot keep the images in {}: {error}", directory.display());
        }
    }
    format!("the images are in {}", directory.display())
}
