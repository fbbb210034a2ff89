//! Checks whether the process has enough resources for another thread.
//!
//! The last free descriptors are reserved for files. If an I/O thread used them, other threads could not open their
//! files.
//!
//! If the address space is limited (`ulimit -v`), a thread may get its stack, but then fail to allocate memory. In
//! this case the standard library or the allocator aborts the process. So a thread is started only if enough address
//! space is left.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::{Builder, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};

/// Bytes of address space that must remain in addition to the stack of a new thread.
const RESERVE: u64 = 128 << 20;

/// Bytes of address space that the process may still map; `None` if there is no limit or the size of the process is
/// unknown.
fn address_space_left() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    // The first field is the size in pages. If the size cannot be read, the check is skipped.
    let sizes = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = sizes.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(pages.saturating_mul(rustix::param::page_size() as u64)))
}

/// Descriptors that must remain after a new I/O thread has opened its own descriptors.
const RESERVED_DESCRIPTORS: u64 = 16;

/// Checks whether enough descriptors are free for an I/O thread.
///
/// # Errors
/// `EMFILE` if too few descriptors are left; otherwise the errors of `eventfd(2)`.
pub(super) fn check_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // A new descriptor gets the lowest free number.
    let lowest = eventfd(0, EventfdFlags::CLOEXEC)?.as_raw_fd();
    if u64::try_from(lowest).is_ok_and(|lowest| lowest.saturating_add(RESERVED_DESCRIPTORS) < limit)
    {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EMFILE))
    }
}

/// Starts a thread with a stack of `stack` bytes.
///
/// # Errors
/// `ENOMEM` if too little of a limited address space is left; otherwise the errors of `pthread_create(3)`.
pub(super) fn start_thread(
    name: String,
    stack: usize,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let needed = RESERVE.saturating_add(stack as u64);
    if address_space_left().is_some_and(|left| left < needed) {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    Builder::new().name(name).stack_size(stack).spawn(body)
}
