//! Takes an internal snapshot of a disk and reverts the disk to it: `snapshot IMAGE`.

use oxblk::{Disk, Result};

fn main() -> Result<()> {
    let Some(image) = std::env::args_os().nth(1) else { panic!("usage: snapshot IMAGE") };
    run(image.as_ref())
}

/// Takes a snapshot, changes the disk, and reverts the change.
pub fn run(image: &std::path::Path) -> Result<()> {
    let disk = Disk::open(image).wait()?;
    disk.create_snapshot("before").wait()?;
    disk.write(0, vec![0xff; 4096]).wait()?;
    for snapshot in disk.snapshots().wait()? {
        println!("{} {}", snapshot.id, snapshot.name);
    }
    disk.apply_snapshot("before").wait()?;
    disk.delete_snapshot("before").wait()?;
    disk.close().wait()
}
