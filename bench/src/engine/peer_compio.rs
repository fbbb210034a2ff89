//! compio: 32 tasks, each with one read in flight.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use compio::BufResult;
use compio::fs::File;
use compio::io::AsyncReadAt;
use compio::runtime::Runtime;

use super::{BLOCK, DEPTH, FILE_SIZE, Rate, Task, rate};
use crate::random::Random;

pub(super) fn run(task: &Task<'_>) -> Rate {
    let runtime = Runtime::new().map_err(|e| e.to_string())?;
    let (path, time) = (task.path.to_owned(), task.time);
    runtime.block_on(async move {
        let file = File::open(path).await.map_err(|e| e.to_string())?;
        let stop = Rc::new(Cell::new(false));
        let started = Instant::now();
        let readers: Vec<_> = (0..DEPTH as u64)
            .map(|seed| compio::runtime::spawn(reader(file.clone(), Rc::clone(&stop), seed + 1)))
            .collect();
        compio::time::sleep(time).await;
        stop.set(true);
        let mut reads = 0;
        for reader in readers {
            reads += reader.await.map_err(|_| "a reader panicked".to_owned())??;
        }
        Ok(rate(reads, started.elapsed()))
    })
}

async fn reader(file: File, stop: Rc<Cell<bool>>, seed: u64) -> Result<u64, String> {
    let mut random = Random::new(seed);
    let mut buf: Vec<u8> = Vec::with_capacity(BLOCK);
    let mut reads = 0;
    while !stop.get() {
        buf.clear();
        let BufResult(result, back) = file.read_at(buf, random.offset(FILE_SIZE, BLOCK)).await;
        if result.map_err(|e| e.to_string())? != BLOCK {
            return Err("short read".to_owned());
        }
        buf = back;
        reads += 1;
    }
    Ok(reads)
}
