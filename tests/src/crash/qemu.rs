//! What QEMU says of an image on a simulated disk.

use std::io::Write;

use oxblk_ring::sim::Disk;

use crate::drivers::Variant;
use crate::model::chain::Tolerance;
use crate::program::Program;

/// `qemu-img check` finds nothing worse than is tolerated.
///
/// # Errors
/// With what it printed.
pub fn check(variant: &Variant, disk: &Disk, tolerance: Tolerance) -> Result<(), String> {
    const LEAKS: i32 = 3;
    let mut file = tempfile::NamedTempFile::new().map_err(|e| e.to_string())?;
    file.write_all(&disk.bytes()).map_err(|e| e.to_string())?;
    let reply =
        Program::new("qemu-img").args(["check", "-f", variant.format]).arg(file.path()).run();
    match reply.code() {
        0 => Ok(()),
        LEAKS if tolerance == Tolerance::Leaks => Ok(()),
        code => Err(format!("qemu-img check ended with {code}: {}{}", reply.out(), reply.err())),
    }
}
