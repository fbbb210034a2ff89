//! Locks that prevent processes from using the same image in conflicting ways.
//!
//! Each of the four permissions has two lock bytes in the file; the contents of these bytes do not matter. A process
//! that takes permission `n` locks byte `100 + n`. A process that does not share permission `n` locks byte `200 + n`.
//! All locks are *shared* locks of the open file description, so any number of processes may lock the same byte. To
//! detect a conflict, a process queries whether another process has locked the opposite byte. QEMU uses the same lock
//! bytes, so conflicts with QEMU processes are detected too.
//!
//! A process first takes its locks, then checks for conflicts. If two processes with conflicting permissions start at
//! the same time, both may see the locks of the other process and fail. Two such processes never both succeed.
//!
//! The locks have their own descriptor. So a reopen can replace the descriptor for the data without a change of the
//! locks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use oxblk_core::{Error, ErrorKind, Perm, Permissions, Result};
use oxblk_ring::host::{LockRange, is_locked_elsewhere, lock_shared, unlock};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

const TAKEN: u32 = 100;
const UNSHARED: u32 = 200;

/// The permissions whose bytes are locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    taken: Perm,
    unshared: Perm,
}

impl Held {
    const NOTHING: Self = Self { taken: Perm::empty(), unshared: Perm::empty() };

    fn of(permissions: Permissions) -> Self {
        Self { taken: permissions.taken, unshared: Perm::all() - permissions.shared }
    }

    /// The locks that are also in `other`.
    fn among(self, other: Self) -> Self {
        Self { taken: self.taken & other.taken, unshared: self.unshared & other.unshared }
    }

    fn and(self, other: Self) -> Self {
        Self { taken: self.taken | other.taken, unshared: self.unshared | other.unshared }
    }
}

/// The locks that one node holds on its file.
#[derive(Debug)]
pub struct FileLocks {
    fd: OwnedFd,
    path: String,
    state: Mutex<State>,
}

/// The locks of one node. While permissions are prepared, the locks of both the current and the new permissions are held.
#[derive(Debug)]
struct State {
    held: Held,
    prepared: Option<Held>,
}

impl FileLocks {
    /// Prepares locking of the file open as `fd`. No lock is taken yet. `path` is the file name in messages. Returns
    /// `None` if the kernel or the file system does not support locks of open file descriptions. Other errors of the
    /// query are ignored; [`set`](Self::set) reports them.
    ///
    /// # Errors
    /// The error of the host if the descriptor cannot be duplicated.
    pub fn new(fd: impl AsFd, path: &str) -> Result<Option<Self>> {
        let fd = fd.as_fd();
        let own_path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let own = match rustix::fs::open(own_path, flags, Mode::empty()) {
            Ok(own) => own,
            // Without /proc, or if the file may only be written, the locks use the same open file description.
            Err(_) => rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(std::io::Error::from)?,
        };
        let probe = uninterrupted(|| is_locked_elsewhere(own.as_fd(), LockRange::byte(TAKEN)));
        if probe.is_err_and(|error| do_not_exist(&error)) {
            return Ok(None);
        }
        Ok(Some(Self {
            fd: own,
            path: path.to_owned(),
            state: Mutex::new(State { held: Held::NOTHING, prepared: None }),
        }))
    }

    /// Changes the locks to those of `permissions`.
    ///
    /// # Errors
    /// The errors of [`Self::prepare`].
    pub fn set(&self, permissions: Permissions) -> Result<()> {
        self.prepare(permissions)?;
        self.commit(permissions);
        Ok(())
    }

    /// Takes the locks of `permissions` and keeps the locks of the current permissions, until [`Self::commit`] or
    /// [`Self::abort`].
    ///
    /// # Errors
    /// If another process holds a conflicting lock, or if the host cannot take or query a lock. In this case the
    /// current locks remain.
    pub fn prepare(&self, permissions: Permissions) -> Result<()> {
        let wanted = Held::of(permissions);
        let mut state = self.state();
        if state.held == wanted {
            return Ok(());
        }
        let both = state.held.and(wanted);
        let outcome = self.lock(both).and_then(|()| self.look(wanted));
        match outcome {
            Ok(()) => state.prepared = Some(both),
            Err(_) => self.release_all_but(state.held),
        }
        outcome
    }

    /// Releases the locks that `permissions` do not need. The locks that they need were prepared, or are held. Locks that are
    /// neither prepared nor held are not taken.
    pub fn commit(&self, permissions: Permissions) {
        let mut state = self.state();
        let locked = state.prepared.take().unwrap_or(state.held);
        let kept = Held::of(permissions).among(locked);
        if kept != locked {
            self.release_all_but(kept);
        }
        state.held = kept;
    }

    /// Releases the locks that the current permissions do not need.
    pub fn abort(&self) {
        let mut state = self.state();
        if state.prepared.take().is_some() {
            self.release_all_but(state.held);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self, wanted: Held) -> Result<()> {
        for (base, perms) in [(TAKEN, wanted.taken), (UNSHARED, wanted.unshared)] {
            for (bit, _) in bits(perms) {
                let byte = base + bit;
                uninterrupted(|| lock_shared(self.fd.as_fd(), LockRange::byte(byte))).map_err(
                    |error| Error::from(error).prefix(format!("Failed to lock byte {byte}")),
                )?;
            }
        }
        Ok(())
    }

    /// Returns an error if another process holds a lock that conflicts with `wanted`, or if a lock cannot be queried.
    fn look(&self, wanted: Held) -> Result<()> {
        for (bit, perm) in bits(wanted.taken) {
            self.look_at(UNSHARED + bit, || format!("Failed to get \"{}\" lock", perm.names()))?;
        }
        for (bit, perm) in bits(wanted.unshared) {
            self.look_at(TAKEN + bit, || {
                format!("Failed to get shared \"{}\" lock", perm.names())
            })?;
        }
        Ok(())
    }

    fn look_at(&self, byte: u32, message: impl Fn() -> String) -> Result<()> {
        let locked = uninterrupted(|| is_locked_elsewhere(self.fd.as_fd(), LockRange::byte(byte)));
        let locked = locked.map_err(|error| {
            Error::from(error).prefix(format!("{} (lock byte {byte})", message()))
        })?;
        if locked {
            let hint = format!("Is another process using the image [{}]?", self.path);
            return Err(Error::new(ErrorKind::Busy, message())
                .errno(Errno::AGAIN.raw_os_error())
                .with_hint(hint));
        }
        Ok(())
    }

    fn release_all_but(&self, keep: Held) {
        for (base, perms) in [(TAKEN, keep.taken), (UNSHARED, keep.unshared)] {
            for (bit, _) in bits(Perm::all() - perms) {
                let byte = base + bit;
                if let Err(error) = uninterrupted(|| unlock(self.fd.as_fd(), LockRange::byte(byte)))
                {
                    // The lock keeps other processes out longer than necessary, at most until the file is closed.
                    tracing::warn!(path = self.path, byte, %error, "cannot release a lock");
                }
            }
        }
    }
}

/// Whether `error` means that the host does not support locks of open file descriptions.
fn do_not_exist(error: &io::Error) -> bool {
    let errnos = [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP];
    errnos.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Repeats a call that a signal has interrupted. Such interruptions happen on network file systems. Returns the error
/// if all attempts are interrupted.
fn uninterrupted<T>(call: impl Fn() -> io::Result<T>) -> io::Result<T> {
    const ATTEMPTS: u32 = 100;
    let mut attempt = 1;
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && attempt < ATTEMPTS => {
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

fn bits(perms: Perm) -> impl Iterator<Item = (u32, Perm)> {
    perms.iter().map(|perm| (perm.bits().trailing_zeros(), perm))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permissions(taken: Perm, shared: Perm) -> Permissions {
        Permissions { taken, shared }
    }

    fn pair() -> (tempfile::NamedTempFile, FileLocks, FileLocks) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let locks = || FileLocks::new(file.reopen().unwrap(), "disk.raw").unwrap().unwrap();
        let (first, second) = (locks(), locks());
        (file, first, second)
    }

    #[test]
    fn a_writer_that_does_not_share_writing_excludes_writers_and_admits_readers() {
        let (_file, first, second) = pair();
        let read = Perm::CONSISTENT_READ;
        first.set(permissions(read | Perm::WRITE, read)).unwrap();
        let error = second.set(permissions(read | Perm::WRITE, Perm::all())).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        assert_eq!(error.hint(), Some("Is another process using the image [disk.raw]?"));
        second.set(permissions(read, Perm::all())).unwrap();
    }

    #[test]
    fn a_reader_that_does_not_share_writing_is_refused_while_a_writer_exists() {
        let (_file, first, second) = pair();
        first.set(permissions(Perm::WRITE, Perm::all())).unwrap();
        let reader = permissions(Perm::CONSISTENT_READ, Perm::CONSISTENT_READ);
        let error = second.set(reader).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
        assert_eq!(error.kind(), ErrorKind::Busy);
        first.set(Permissions::NONE).unwrap();
        second.set(reader).unwrap();
    }

    #[test]
    fn a_refused_change_keeps_the_previous_locks() {
        let (_file, first, second) = pair();
        let read = Perm::CONSISTENT_READ;
        second.set(permissions(read, Perm::all())).unwrap();
        first.set(permissions(read, read)).unwrap();
        second.set(permissions(read | Perm::RESIZE, Perm::all())).unwrap_err();
        // If the resize lock of the second process remained, this change by the first process would fail.
        first.set(permissions(read | Perm::WRITE, read)).unwrap();
        // The previous read lock is still held.
        let error = first.set(permissions(Perm::WRITE, Perm::empty())).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get shared \"consistent read\" lock");
    }

    #[test]
    fn closing_releases_all_locks() {
        let (_file, first, second) = pair();
        first.set(permissions(Perm::WRITE, Perm::empty())).unwrap();
        drop(first);
        second.set(permissions(Perm::WRITE, Perm::empty())).unwrap();
    }

    #[test]
    fn a_call_that_is_always_interrupted_ends_with_an_error() {
        let calls = std::cell::Cell::new(0);
        let call = |until: u32| {
            calls.set(calls.get() + 1);
            if calls.get() < until { Err(io::Error::from(Errno::INTR)) } else { Ok(()) }
        };
        uninterrupted(|| call(5)).unwrap();
        let error = uninterrupted(|| call(u32::MAX)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::INTR.raw_os_error()));
    }

    #[test]
    fn only_a_host_without_lock_support_disables_locking() {
        for errno in [Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP] {
            assert!(do_not_exist(&errno.into()), "{errno}");
        }
        for errno in [Errno::IO, Errno::NOLCK, Errno::STALE, Errno::INTR, Errno::ACCESS] {
            assert!(!do_not_exist(&errno.into()), "{errno}");
        }
    }
}
