//! Prints the first bytes of a disk and its extents: `read IMAGE`. The disk must have at least 512 bytes.

use oxblk::{Disk, Result};

fn main() -> Result<()> {
    let Some(image) = std::env::args_os().nth(1) else { panic!("usage: read IMAGE") };
    run(image.as_ref())
}

/// Prints the first bytes and the extents of the disk in `image`.
pub fn run(image: &std::path::Path) -> Result<()> {
    let disk = Disk::open_read_only(image).wait()?;
    let start = disk.read(0, 512).wait()?;
    println!("{} bytes, beginning with {:02x?}", disk.size(), &start[..16.min(start.len())]);

    let mut offset = 0;
    while offset < disk.size() {
        let extent = disk.extent_at(offset).wait()?;
        let what = if extent.zero { "zeroes" } else { "data" };
        println!("{offset:>16} {:>16} {what}, from image {}", extent.len, extent.depth);
        offset += extent.len;
    }
    disk.close().wait()
}
