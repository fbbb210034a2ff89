//! The load: tasks on one I/O thread, each with one request in flight.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use oxblk::core::{Backend, WriteFlags};
use oxblk::{Disk, Error, IoBufMut, Result};
use oxblk_ring::{sleep, spawn};
use rustix::time::{ClockId, clock_gettime};

use super::{BLOCK, DEPTH};
use crate::random::Random;

/// What the requests do.
#[derive(Clone, Copy)]
pub(super) enum Direction {
    Read,
    /// Writes to allocated clusters.
    Write,
}

/// The measurements of one run.
pub(super) struct Measured {
    /// Requests per second.
    pub(super) rate: f64,
    /// Processor time of the process for one request, in seconds. Contains the time in the kernel.
    pub(super) processor: f64,
}

/// The time for which the load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// Runs the load for `time`.
pub(super) fn measure(
    disk: &Disk,
    direction: Direction,
    time: Duration,
) -> std::result::Result<Measured, String> {
    let run = disk.run(move |backend| async move {
        run(&backend, direction, WARM_UP).await?;
        run(&backend, direction, time).await
    });
    run.wait().map_err(|error| error.to_string())
}

#[expect(clippy::cast_precision_loss, reason = "far fewer requests than a double can count")]
async fn run(backend: &Backend, direction: Direction, time: Duration) -> Result<Measured> {
    let stop = Rc::new(Cell::new(false));
    let (started, processor) = (Instant::now(), processor_time());
    let tasks: Vec<_> = (1..=DEPTH)
        .map(|seed| spawn(requests(backend.clone(), direction, Rc::clone(&stop), seed)))
        .collect();
    sleep(time).await;
    stop.set(true);
    let mut count = 0;
    for task in tasks {
        count += task.await?;
    }
    let count = count as f64;
    let processor = processor_time().saturating_sub(processor).as_secs_f64() / count;
    Ok(Measured { rate: count / started.elapsed().as_secs_f64(), processor })
}

/// Makes one request after the other. Returns their number.
async fn requests(
    backend: Backend,
    direction: Direction,
    stop: Rc<Cell<bool>>,
    seed: u64,
) -> Result<u64> {
    let size = backend.size();
    let mut random = Random::new(seed);
    let mut buf = IoBufMut::zeroed(BLOCK);
    random.fill(&mut buf);
    let mut count = 0;
    match direction {
        Direction::Read => {
            while !stop.get() {
                buf = backend.read(random.offset(size, BLOCK), buf).await?;
                count += 1;
            }
        }
        Direction::Write => {
            let data = buf.freeze();
            while !stop.get() {
                let offset = random.offset(size, BLOCK);
                backend.write(offset, data.clone(), WriteFlags::empty()).await?;
                count += 1;
            }
        }
    }
    if count == 0 { Err(Error::invalid("a task without requests")) } else { Ok(count) }
}

/// The processor time of the process, in all threads, including the threads of io_uring.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
