//! Makes an incremental backup: `bitmap_backup IMAGE BACKUP.raw`.
//!
//! The image must be qcow2. The first run adds a bitmap to the image and copies the complete disk. Later runs copy only
//! the ranges that the bitmap has recorded since the last run. If a run fails, the next run copies the same ranges
//! again. If the image was not closed after its last use, the bitmap may miss writes. In this case the complete disk is
//! copied again.

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

/// Creates the backup, or updates it with the changes since the last run.
pub fn run(image: &Path, backup: &Path) -> Result<()> {
    let disk = Disk::options().format(Format::Qcow2).open(image).wait()?;
    let copied = update(&disk, backup);
    // The close stores the bitmap in the image.
    copied.and(disk.close().wait())
}

fn update(disk: &Disk, backup: &Path) -> Result<()> {
    match disk.bitmaps()?.into_iter().find(|bitmap| bitmap.name == BITMAP) {
        Some(bitmap) if !bitmap.inconsistent => copy_changes(disk, backup),
        Some(_) => {
            disk.remove_bitmap(BITMAP).wait()?;
            copy_disk(disk, backup)
        }
        None => copy_disk(disk, backup),
    }
}

/// Copies the complete disk. The bitmap is added first, so it records all writes that the copy may miss.
fn copy_disk(disk: &Disk, backup: &Path) -> Result<()> {
    disk.add_bitmap(BITMAP, true).wait()?;
    let copied = Convert::new(disk, backup, Format::Raw).run().wait();
    if copied.is_err() {
        // Remove the bitmap if the backup failed. Otherwise the next run would copy only the changes.
        disk.remove_bitmap(BITMAP).wait()?;
    }
    copied
}

/// Copies the ranges that the bitmap has recorded.
fn copy_changes(disk: &Disk, backup: &Path) -> Result<()> {
    // If this function returns early, `changes` is dropped, and the bitmap contains the ranges again.
    let changes = disk.take_dirty_ranges(BITMAP).wait()?;
    let copy = Disk::options().format(Format::Raw).open(backup).wait()?;
    let copied = copy_ranges(disk, &copy, changes.ranges());
    copied.and(copy.close().wait())?;
    // The close has flushed the copies.
    changes.finish();
    Ok(())
}

fn copy_ranges(disk: &Disk, copy: &Disk, ranges: &[std::ops::Range<u64>]) -> Result<()> {
    if copy.size() != disk.size() {
        copy.resize(disk.size()).wait()?;
    }
    for range in ranges {
        // Copy in pieces of 1 MiB, since a range may be as long as the disk.
        for offset in range.clone().step_by(1 << 20) {
            let len = (range.end - offset).min(1 << 20);
            let data = disk.read(offset, usize::try_from(len).unwrap_or(0)).wait()?;
            copy.write(offset, data).wait()?;
        }
    }
    Ok(())
}
