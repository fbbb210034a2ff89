//! Makes an incremental backup: `bitmap_backup IMAGE BACKUP.raw`.
//!
//! The first run adds a bitmap to the image, which must be qcow2, and copies the whole disk. Later runs copy only the
//! ranges that the bitmap has recorded since the last run.

use std::path::Path;

use oxblk::{Convert, Disk, Format, Result};

const BITMAP: &str = "backup";

fn main() -> Result<()> {
    let mut names = std::env::args_os().skip(1);
    let (Some(image), Some(backup)) = (names.next(), names.next()) else {
        panic!("usage: bitmap_backup IMAGE BACKUP.raw");
    };
    run(image.as_ref(), backup.as_ref())
}

/// Brings the backup up to date.
pub fn run(image: &Path, backup: &Path) -> Result<()> {
    let disk = Disk::options().format(Format::Qcow2).open(image).wait()?;
    if disk.bitmaps()?.iter().any(|bitmap| bitmap.name == BITMAP) {
        let copy = Disk::options().format(Format::Raw).open(backup).wait()?;
        for range in disk.take_dirty_ranges(BITMAP)? {
            // Copy in pieces of 1 MiB, since a range may be as long as the disk.
            for offset in range.clone().step_by(1 << 20) {
                let len = (range.end - offset).min(1 << 20);
                let data = disk.read(offset, usize::try_from(len).unwrap_or(0)).wait()?;
                copy.write(offset, data).wait()?;
            }
        }
        copy.close().wait()?;
    } else {
        disk.add_bitmap(BITMAP, true).wait()?;
        Convert::new(&disk, backup, Format::Raw).run().wait()?;
    }
    disk.close().wait()
}
