//! Executes file operations by blocking system calls, on a worker thread or inline on the I/O thread.
//!
//! The worker accesses the buffers of the operation by pointer. The slot keeps the buffers and the file until the I/O
//! thread has received the completion message, which the worker always sends. While the operation is in flight, the
//! I/O thread uses the slot through `&mut` (when the future is polled or dropped), so the worker must not read the
//! slot. Therefore the worker has its own scatter list. The buffers lie outside the slot, and only the list refers to
//! their bytes.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::slots::{Key, Op, ScatterList, Slot};
use crate::runtime::shared::{Message, Shared};

/// A file operation that a worker executes.
pub(crate) struct BlockingOp {
    key: Key,
    shared: Arc<Shared>,
    op: Op,
    fd: RawFd,
    iovecs: ScatterList,
}

// SAFETY: the slot of the operation owns the buffers to which the list points, and they stay in place. The I/O thread
// does not access their bytes until it has received the completion message of the operation.
unsafe impl Send for BlockingOp {}

impl BlockingOp {
    pub(super) fn new(key: Key, slot: &mut Slot, shared: &Arc<Shared>) -> BlockingOp {
        let fd = slot.target.as_ref().map_or(-1, super::Target::fd);
        let mut iovecs = ScatterList::new();
        slot.payload.iovecs(&mut iovecs);
        BlockingOp { key, shared: Arc::clone(shared), op: slot.op, fd, iovecs }
    }

    /// Executes the operation and reports its result to the I/O thread.
    pub(crate) fn run(self) {
        let result = self.perform();
        crate::perturb::point();
        self.shared.send(Message::Complete(self.key, result));
    }

    /// Executes the operation. Returns a count or a negative errno.
    pub(super) fn perform(&self) -> i32 {
        loop {
            let result = self.call();
            if result >= 0 {
                return i32::try_from(result).unwrap_or(i32::MAX);
            }
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                Some(errno) => return -errno,
                None => return -libc::EIO,
            }
        }
    }

    /// The buffer, if the transfer has only one. The kernel has a cheaper call for one buffer than for a scatter
    /// list.
    fn single(&self) -> Option<libc::iovec> {
        match *self.iovecs {
            [one] => Some(one),
            _ => None,
        }
    }

    fn call(&self) -> i64 {
        let iovecs = self.iovecs.as_ptr();
        let count = libc::c_int::try_from(self.iovecs.len()).unwrap_or(0);
        match self.op {
            Op::Read { offset } => match libc::off_t::try_from(offset) {
                Ok(offset) if let Some(one) = self.single() => {
                    // SAFETY: the slot owns the buffer and keeps the descriptor open.
                    unsafe { libc::pread(self.fd, one.iov_base, one.iov_len, offset) as i64 }
                }
                // SAFETY: the slot owns the buffers to which the scatter list points, and keeps the descriptor open.
                Ok(offset) => unsafe { libc::preadv(self.fd, iovecs, count, offset) as i64 },
                Err(_) => fail(libc::EINVAL),
            },
            Op::Write { offset, fua } => match libc::off_t::try_from(offset) {
                // SAFETY: as above.
                Ok(offset) if fua => unsafe {
                    libc::pwritev2(self.fd, iovecs, count, offset, libc::RWF_DSYNC) as i64
                },
                Ok(offset) if let Some(one) = self.single() => {
                    // SAFETY: as above.
                    unsafe { libc::pwrite(self.fd, one.iov_base, one.iov_len, offset) as i64 }
                }
                // SAFETY: as above.
                Ok(offset) => unsafe { libc::pwritev(self.fd, iovecs, count, offset) as i64 },
                Err(_) => fail(libc::EINVAL),
            },
            // SAFETY: no memory involved.
            Op::Sync { data_only: true } => i64::from(unsafe { libc::fdatasync(self.fd) }),
            // SAFETY: no memory involved.
            Op::Sync { data_only: false } => i64::from(unsafe { libc::fsync(self.fd) }),
            Op::Fallocate { mode, offset, len } => {
                let (Ok(offset), Ok(len)) =
                    (libc::off_t::try_from(offset), libc::off_t::try_from(len))
                else {
                    return fail(libc::EFBIG);
                };
                // SAFETY: no memory involved.
                i64::from(unsafe { libc::fallocate(self.fd, mode, offset, len) })
            }
            Op::Truncate { .. }
            | Op::Recv { .. }
            | Op::Send { .. }
            | Op::Poll { .. }
            | Op::Call => fail(libc::EOPNOTSUPP),
        }
    }
}

fn fail(errno: i32) -> i64 {
    // SAFETY: the returned pointer is the address of this thread's own errno.
    unsafe { *libc::__errno_location() = errno };
    -1
}
