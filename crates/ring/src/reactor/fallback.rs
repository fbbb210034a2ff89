//! The driver of the loop without io_uring: if the kernel refuses io_uring, if the configuration asks for it, and in
//! simulations. It uses `poll` for sockets and the bell. Blocking threads execute file operations.
//!
//! Socket calls are non-blocking: the first attempt is made when an operation starts, and another attempt each time
//! `poll` reports the socket as ready.

use std::cell::RefCell;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Once};

use super::Wait;
use super::slots::{Key, Op, Slot, Slots};
use crate::runtime::real_now;
use crate::runtime::shared::Shared;

/// Logs, once per process, why io_uring is not used.
pub(super) fn log_once(error: &io::Error) {
    static LOGGED: Once = Once::new();
    LOGGED.call_once(|| {
        tracing::warn!("io_uring is not available ({error}); using a pool of threads instead");
    });
}

/// Operations that wait until their socket is ready.
pub(super) struct Fallback {
    bell: RawFd,
    waiting: Vec<Key>,
    /// One entry for the bell, then one for each element of `waiting`.
    polled: Vec<libc::pollfd>,
}

impl Fallback {
    pub(super) fn new(shared: &Arc<Shared>) -> Fallback {
        let bell = libc::pollfd { fd: shared.bell(), events: libc::POLLIN, revents: 0 };
        Fallback { bell: shared.bell(), waiting: Vec::new(), polled: vec![bell] }
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Attempts an operation. Returns `None` if the operation must wait.
    pub(super) fn start(&mut self, key: Key, slot: &mut Slot) -> Option<i32> {
        slot.prepare_vectors();
        let result = attempt(slot);
        if result.is_none() {
            let fd = slot.target.as_ref().map_or(-1, super::Target::fd);
            self.waiting.push(key);
            self.polled.push(libc::pollfd { fd, events: events(slot.op), revents: 0 });
        }
        result
    }

    /// Stops waiting for an operation. Returns false if the operation was not waiting.
    pub(super) fn cancel(&mut self, key: Key) -> bool {
        let Some(at) = self.waiting.iter().position(|&k| k == key) else { return false };
        self.forget(at);
        true
    }

    fn forget(&mut self, at: usize) {
        self.waiting.swap_remove(at);
        self.polled.swap_remove(at + 1);
    }

    pub(super) fn turn(&mut self, slots: &RefCell<Slots>, wait: Wait, done: &mut Vec<(Key, i32)>) {
        // The time is rounded up, so that the timer is due when the wait ends.
        let millis = match wait {
            Wait::No => 0,
            Wait::Forever => -1,
            Wait::Until(deadline) => {
                let left = deadline.saturating_sub(real_now()).as_nanos();
                i32::try_from(left.div_ceil(1_000_000)).unwrap_or(i32::MAX)
            }
        };
        let count = libc::nfds_t::try_from(self.polled.len()).unwrap_or(libc::nfds_t::MAX);
        // SAFETY: the array has `count` entries.
        let ready = unsafe { libc::poll(self.polled.as_mut_ptr(), count, millis) };
        if ready <= 0 {
            return;
        }
        if self.polled.first().is_some_and(|bell| bell.revents != 0) {
            let mut word = [0u8; 8];
            // SAFETY: eight writable bytes; the descriptor is non-blocking.
            unsafe { libc::read(self.bell, word.as_mut_ptr().cast(), word.len()) };
        }
        let mut slots = slots.borrow_mut();
        let mut at = 0;
        while let (Some(&key), Some(polled)) = (self.waiting.get(at), self.polled.get(at + 1)) {
            let result = match slots.try_get_mut(key) {
                _ if polled.revents == 0 => None,
                Some(slot) if matches!(slot.op, Op::Poll { .. }) => Some(i32::from(polled.revents)),
                Some(slot) => attempt(slot),
                None => Some(0),
            };
            match result {
                Some(result) => {
                    done.push((key, result));
                    self.forget(at);
                }
                None => at += 1,
            }
        }
    }
}

fn events(op: Op) -> i16 {
    match op {
        Op::Poll { events } => events,
        Op::Send { .. } => libc::POLLOUT,
        _ => libc::POLLIN,
    }
}

/// Makes the call without blocking. Returns `None` if the call would block. Only a write to a pipe or terminal can block: if
/// the descriptor is in blocking mode and has less free space than the write needs.
fn attempt(slot: &mut Slot) -> Option<i32> {
    let fd = slot.target.as_ref().map_or(-1, super::Target::fd);
    loop {
        let result = match slot.op {
            // SAFETY: header, scatter list and buffers belong to the slot.
            Op::Recv { socket: true } => unsafe {
                libc::recvmsg(fd, &raw mut slot.message, libc::MSG_DONTWAIT)
            },
            // SAFETY: as above.
            Op::Send { socket: true } => unsafe {
                libc::sendmsg(fd, &raw const slot.message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            },
            Op::Recv { socket: false } | Op::Send { socket: false }
                if !is_ready(fd, events(slot.op)) =>
            {
                return None;
            }
            Op::Recv { socket: false } => {
                let count = libc::c_int::try_from(slot.iovecs.len()).unwrap_or(0);
                // SAFETY: scatter list and buffers belong to the slot.
                unsafe { libc::readv(fd, slot.iovecs.as_ptr(), count) }
            }
            Op::Send { socket: false } => {
                let count = libc::c_int::try_from(slot.iovecs.len()).unwrap_or(0);
                // SAFETY: scatter list and buffers belong to the slot.
                unsafe { libc::writev(fd, slot.iovecs.as_ptr(), count) }
            }
            Op::Poll { .. } => return None,
            _ => return Some(-libc::EOPNOTSUPP),
        };
        if result >= 0 {
            return Some(i32::try_from(result).unwrap_or(i32::MAX));
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => return None,
            errno => return Some(-errno.unwrap_or(libc::EIO)),
        }
    }
}

/// Whether a pipe or terminal is ready. If it is not ready, a call on it may block.
fn is_ready(fd: RawFd, events: i16) -> bool {
    let mut polled = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one entry.
    unsafe { libc::poll(&raw mut polled, 1, 0) > 0 }
}
