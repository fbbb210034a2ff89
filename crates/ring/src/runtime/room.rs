//! Whether the process has room for another thread.
//!
//! The last descriptors are for files: an I/O thread that takes them keeps the others from opening what they are for.
//!
//! Where the address space is limited (`ulimit -v`), the system may grant a thread its stack and have nothing left for what
//! the thread needs next. The standard library and the allocator then end the process. So a thread is not started in
//! the last part of the address space.

use std::io;
use std::os::fd::AsRawFd;
use std::thread::{Builder, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};
use rustix::process::{Resource, getrlimit};

/// What must be left beside the stack of a new thread.
const RESERVE: u64 = 128 << 20;

/// Bytes of address space that the process may still map; `None` where nothing limits it.
fn address_space_left() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    // Its first field is the size in pages. Where it cannot be read, mapping fails early enough or it does not.
    let sizes = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = sizes.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(pages.saturating_mul(rustix::param::page_size() as u64)))
}

/// Descriptors that must be left beside those of a new I/O thread.
const RESERVED_DESCRIPTORS: u64 = 16;

/// Whether an I/O thread may take descriptors.
///
/// # Errors
/// `EMFILE` where few are left.
pub(super) fn check_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // The system gives out the lowest number that is free.
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
/// `ENOMEM` in the last part of a limited address space; as `pthread_create(3)`.
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
