//! Uses a disk from tokio, with several requests in flight: `tokio IMAGE`.

use oxblk::{Disk, Result};

fn main() -> Result<()> {
    let Some(image) = std::env::args_os().nth(1) else { panic!("usage: tokio IMAGE") };
    run(image.as_ref())
}

/// Reads from eight offsets of the disk concurrently.
#[tokio::main]
pub async fn run(image: &std::path::Path) -> Result<()> {
    let disk = Disk::open_read_only(image).await?;
    let mut tasks = Vec::new();
    for number in 0..8 {
        let disk = disk.clone();
        // Each task reads from another eighth of the disk.
        let offset = disk.size() / 8 * number;
        tasks.push(tokio::spawn(async move { disk.read(offset, 512).await }));
    }
    for task in tasks {
        let Ok(data) = task.await else { panic!("a task was lost") };
        let data = data?;
        println!("{:02x?}", &data[..8]);
    }
    disk.close().await
}
