//! File operations by blocking system calls on a worker thread.
//!
//! The worker works on the memory of the operation's slot by pointer; the slot keeps memory and file until the worker's
//! message has come back, which it does in every case.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use super::slots::{Key, Op, Slot};
use crate::runtime::shared::{Message, Shared};

/// A file operation on its way to a worker.
pub(crate) struct BlockingOp {
    key: Key,
    shared: Arc<Shared>,
    op: Op,
    fd: RawFd,
    iovecs: *const libc::iovec,
    count: usize,
}

// SAFETY: the pointed-to scatter list and buffers are owned by the operation's slot and stay in place, untouched by the
// I/O thread, until the message of the operation's end has been received.
unsafe impl Send for BlockingOp {}

impl BlockingOp {
    pub(super) fn new(key: Key, slot: &mut Slot, shared: &Arc<Shared>) -> BlockingOp {
        slot.prepare_vectors();
        let fd = slot.target.as_ref().map_or(-1, super::Target::fd);
        BlockingOp {
            key,
            shared: Arc::clone(shared),
            op: slot.op,
            fd,
            iovecs: slot.iovecs.as_ptr(),
            count: slot.iovecs.len(),
        }
    }

    /// Does the work and reports it to the I/O thread.
    pub(crate) fn run(self) {
        let result = self.perform();
        self.shared.send(Message::Complete(self.key, result));
    }

    /// Does the work: a count or a negative errno.
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

    /// A transfer of one buffer, which the kernel does for less than one of a scatter list.
    fn single(&self) -> Option<libc::iovec> {
        // SAFETY: the scatter list belongs to the slot and has `count` elements.
        (self.count == 1).then(|| unsafe { *self.iovecs })
    }

    fn call(&self) -> i64 {
        let count = libc::c_int::try_from(self.count).unwrap_or(0);
        match self.op {
            Op::Read { offset } => match libc::off_t::try_from(offset) {
                Ok(offset) if let Some(one) = self.single() => {
                    // SAFETY: the buffer belongs to the slot, and the descriptor is kept open by it.
                    unsafe { libc::pread(self.fd, one.iov_base, one.iov_len, offset) as i64 }
                }
                // SAFETY: the scatter list and what it names belong to the slot, and the descriptor is kept open by it.
                Ok(offset) => unsafe { libc::preadv(self.fd, self.iovecs, count, offset) as i64 },
                Err(_) => fail(libc::EINVAL),
            },
            Op::Write { offset, fua } => match libc::off_t::try_from(offset) {
                // SAFETY: as above.
                Ok(offset) if fua => unsafe {
                    libc::pwritev2(self.fd, self.iovecs, count, offset, libc::RWF_DSYNC) as i64
                },
                Ok(offset) if let Some(one) = self.single() => {
                    // SAFETY: as above.
                    unsafe { libc::pwrite(self.fd, one.iov_base, one.iov_len, offset) as i64 }
                }
                // SAFETY: as above.
                Ok(offset) => unsafe { libc::pwritev(self.fd, self.iovecs, count, offset) as i64 },
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
            Op::Truncate { .. } | Op::Recv { .. } | Op::Send { .. } | Op::Poll { .. } => {
                fail(libc::EOPNOTSUPP)
            }
        }
    }
}

fn fail(errno: i32) -> i64 {
    // SAFETY: the address of the thread's own errno.
    unsafe { *libc::__errno_location() = errno };
    -1
}
