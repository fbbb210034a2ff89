//! Copies a disk into a compressed qcow2 image: `convert SOURCE TARGET`.

use std::path::Path;

use oxblk::{Compression, Convert, Disk, Qcow2Options, Result};

fn main() -> Result<()> {
    let mut names = std::env::args_os().skip(1);
    let (Some(source), Some(target)) = (names.next(), names.next()) else {
        panic!("usage: convert SOURCE TARGET");
    };
    run(source.as_ref(), target.as_ref())
}

/// Copies the disk in `source` into a compressed image at `target`.
pub fn run(source: &Path, target: &Path) -> Result<()> {
    let source = Disk::open_read_only(source).wait()?;
    let options = Qcow2Options { compression: Compression::Zstd, ..Qcow2Options::default() };
    Convert::new(&source, target, options).compress(true).run().wait()?;
    source.close().wait()
}
