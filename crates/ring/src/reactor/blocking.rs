//! File operations by blocking system calls on a worker thread.
//!
//! The worker accesses the buffers of the operation's slot by pointer. The slot keeps buffers and file until the
//! worker's completion message has been received; the worker sends one in every case. The scatter list belongs to the
//! worker: the I/O thread uses the slot through `&mut` while the operation is in flight (its future is polled, or
//! dropped), so no other thread may read the slot. The buffers lie outside the slot, and only the list refers to
//! their bytes.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::slots::{Key, Op, ScatterList, Slot};
use crate::runtime::shared::{Message, Shared};

/// A file operation on its way to a worker.
pub(crate) struct BlockingOp {
    key: Key,
    shared: Arc<Shared>,
    op: Op,
    fd: RawFd,
    iovecs: ScatterList,
}

// SAFETY: the buffers that the list names are owned by the operation's slot and stay in place, and the I/O thread
// does not touch their bytes until it has received the operation's completion message.
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

    /// A transfer of one buffer, for which the kernel has a cheaper call than for a scatter list.
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
                    // SAFETY: the buffer belongs to the slot, and the descriptor is kept open by it.
                    unsafe { libc::pread(self.fd, one.iov_base, one.iov_len, offset) as i64 }
                }
                // SAFETY: the slot owns the buffers that the scatter list names, and keeps the descriptor open.
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
