//! Linux AIO (`aio=native`). Operations are queued, and each iteration of the loop submits them together. The kernel
//! rings the bell of the thread (an eventfd) when an operation completes.
//!
//! AIO is asynchronous only for files opened with `O_DIRECT`, so callers should use it only for such files.

use std::io;
use std::os::fd::RawFd;

use super::slots::{Key, Op, Slot};

const OP_PREADV: u16 = 7;
const OP_PWRITEV: u16 = 8;
const FLAG_RESFD: u32 = 1;
/// Number of operations in flight that the kernel is asked to allow. Operations that the kernel does not accept yet
/// wait in the queue.
const DEPTH: libc::c_long = 256;
const BATCH: usize = 64;

/// `struct io_event` of the kernel's ABI.
#[repr(C)]
#[derive(Clone, Copy)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// One AIO context.
pub(super) struct Native {
    context: libc::c_ulong,
    bell: RawFd,
    queue: Vec<libc::iocb>,
    in_flight: usize,
}

impl Native {
    pub(super) fn new(bell: RawFd) -> io::Result<Native> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word to `context`.
        if unsafe { libc::syscall(libc::SYS_io_setup, DEPTH, &raw mut context) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Native { context, bell, queue: Vec::new(), in_flight: 0 })
    }

    /// Queues a transfer for the next [`submit`](Self::submit).
    pub(super) fn start(&mut self, key: Key, slot: &mut Slot) {
        slot.prepare_vectors();
        // SAFETY: all zero is a valid control block.
        let mut block: libc::iocb = unsafe { std::mem::zeroed() };
        let (opcode, offset, flags) = match slot.op {
            Op::Write { offset, fua } => {
                (OP_PWRITEV, offset, if fua { libc::RWF_DSYNC } else { 0 })
            }
            Op::Read { offset } => (OP_PREADV, offset, 0),
            other => unreachable!("{other:?} is not a transfer"),
        };
        block.aio_data = key.to_bits();
        block.aio_lio_opcode = opcode;
        block.aio_rw_flags = flags;
        block.aio_fildes =
            u32::try_from(slot.target.as_ref().map_or(-1, super::Target::fd)).unwrap_or(u32::MAX);
        block.aio_buf = slot.iovecs.as_ptr() as u64;
        block.aio_nbytes = slot.iovecs.len() as u64;
        // The kernel refuses an offset beyond the signed range.
        block.aio_offset = offset.cast_signed();
        block.aio_flags = FLAG_RESFD;
        block.aio_resfd = u32::try_from(self.bell).unwrap_or(0);
        self.queue.push(block);
    }

    /// Submits the queue, as far as the kernel accepts it. Adds the operations that the kernel refuses to `done`.
    pub(super) fn submit(&mut self, done: &mut Vec<(Key, i32)>) {
        while !self.queue.is_empty() {
            let mut pointers: Vec<*mut libc::iocb> =
                self.queue.iter_mut().take(BATCH).map(|block| &raw mut *block).collect();
            // SAFETY: valid control blocks, which the kernel copies. The slots own the scatter lists and buffers to
            // which the control blocks point until the events have been read.
            let taken = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    pointers.len(),
                    pointers.as_mut_ptr(),
                )
            };
            match usize::try_from(taken) {
                Ok(taken) if taken > 0 => {
                    self.in_flight += taken;
                    self.queue.drain(..taken);
                }
                Ok(_) => return,
                Err(_) => match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN) if self.in_flight > 0 => return,
                    errno => {
                        let refused = self.queue.remove(0);
                        done.push((Key::from_bits(refused.aio_data), -errno.unwrap_or(libc::EIO)));
                    }
                },
            }
        }
    }

    /// Reads the available events.
    pub(super) fn reap(&mut self, done: &mut Vec<(Key, i32)>) {
        while self.in_flight > 0 {
            let mut events = [IoEvent { data: 0, obj: 0, res: 0, res2: 0 }; BATCH];
            let mut zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the array has `BATCH` elements; the call does not wait.
            let count = unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.context,
                    0,
                    BATCH,
                    events.as_mut_ptr(),
                    &raw mut zero,
                )
            };
            let count = usize::try_from(count).unwrap_or(0);
            if count == 0 {
                return;
            }
            self.in_flight = self.in_flight.saturating_sub(count);
            for event in events.iter().take(count) {
                let result = i32::try_from(event.res).unwrap_or(if event.res < 0 {
                    -libc::EIO
                } else {
                    i32::MAX
                });
                done.push((Key::from_bits(event.data), result));
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the context is ours. The call waits for the operations in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
