//! The reference: a bare loop on a ring with a fixed file, fixed buffers, `SINGLE_ISSUER` and `DEFER_TASKRUN`. The loop does
//! almost no work between the system calls.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

use io_uring::{IoUring, opcode, types};

use super::{BLOCK, DEPTH, FILE_SIZE, Rate, Task, rate};
use crate::random::Random;

pub(super) fn run(task: &Task<'_>) -> Rate {
    reads(task).map_err(|e| e.to_string())
}

fn reads(task: &Task<'_>) -> std::io::Result<f64> {
    let file = File::open(task.path)?;
    // One allocation for all buffers, with one extra block so that the buffers can be aligned to a page.
    let mut memory = vec![0u8; BLOCK * (DEPTH + 1)];
    let skip = memory.as_ptr().align_offset(BLOCK);
    // SAFETY: `skip` is less than a block, and one extra block was allocated.
    let base = unsafe { memory.as_mut_ptr().add(skip) };
    let mut ring: IoUring =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(64)?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    let registered = libc::iovec { iov_base: base.cast(), iov_len: BLOCK * DEPTH };
    // SAFETY: `memory` outlives the ring: `memory` is declared before the ring, and no read is in flight when the loop below
    // ends.
    unsafe { ring.submitter().register_buffers(&[registered])? };
    let mut random = Random::new(1);
    let started = Instant::now();
    let (mut done, mut in_flight) = (0u64, 0usize);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut stop = false;
    while !stop || in_flight > 0 {
        while !stop && let Some(slot) = free.pop() {
            let len = u32::try_from(BLOCK).unwrap_or(0);
            // SAFETY: `slot < DEPTH`.
            let buf = unsafe { base.add(slot * BLOCK) };
            let read = opcode::ReadFixed::new(types::Fixed(0), buf, len, 0)
                .offset(random.offset(FILE_SIZE, BLOCK));
            // SAFETY: the buffer is part of `memory`, and only this slot uses it until its read completes.
            unsafe { ring.submission().push(&read.build().user_data(slot as u64)) }
                .map_err(std::io::Error::other)?;
            in_flight += 1;
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            if usize::try_from(entry.result()).ok() != Some(BLOCK) {
                return Err(std::io::Error::other("short read"));
            }
            in_flight -= 1;
            done += 1;
            free.push(usize::try_from(entry.user_data()).unwrap_or(0));
        }
        stop = started.elapsed() >= task.time;
    }
    Ok(rate(done, started.elapsed()))
}
