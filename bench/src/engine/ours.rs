//! oxblk-ring: 32 tasks, each with one read in flight.

use std::cell::Cell;
use std::fs::File as StdFile;
use std::rc::Rc;
use std::time::Instant;

use oxblk_ring::{Aio, File, IoBufMut, block_on, sleep, spawn};

use super::{BLOCK, DEPTH, FILE_SIZE, Rate, Task, rate};
use crate::random::Random;

pub(super) fn run(task: &Task<'_>) -> Rate {
    let file = StdFile::open(task.path).map_err(|e| e.to_string())?;
    let file = File::from_fd(file.into(), Aio::IoUring);
    let time = task.time;
    block_on(async move {
        let stop = Rc::new(Cell::new(false));
        let started = Instant::now();
        let readers: Vec<_> = (0..DEPTH as u64)
            .map(|seed| spawn(reader(file.clone(), Rc::clone(&stop), seed + 1)))
            .collect();
        sleep(time).await;
        stop.set(true);
        let mut reads = 0;
        for reader in readers {
            reads += reader.await?;
        }
        Ok(rate(reads, started.elapsed()))
    })
}

async fn reader(file: File, stop: Rc<Cell<bool>>, seed: u64) -> Result<u64, String> {
    let mut random = Random::new(seed);
    let mut buf = IoBufMut::new(BLOCK);
    let mut reads = 0;
    while !stop.get() {
        let (result, back) = file.read_at(buf, random.offset(FILE_SIZE, BLOCK)).await;
        if result.map_err(|e| e.to_string())? != BLOCK {
            return Err("short read".to_owned());
        }
        buf = back;
        reads += 1;
    }
    Ok(reads)
}
