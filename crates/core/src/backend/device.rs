//! The device that is attached to a backend, as QEMU's `query-block` shows it: tray, lock, I/O status, error policies.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::error_policy::{IoStatus, OnError};
use super::held::{Held, Round};
use super::mode::Mode;
use super::{Backend, no_medium};
use crate::{
    BlockEvent, Errno, Error, ErrorKind, EventSource, IoErrorAction, IoOperation, Node, Result,
};

/// The properties of a device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceOptions {
    /// The identifier of the device, or its path among QEMU's objects (`qdev`).
    pub id: String,
    /// The device supports removable media.
    pub removable: bool,
    /// The device has a tray. A new device has a closed tray.
    pub has_tray: bool,
    /// The policy for failed reads (`rerror`).
    pub on_read_error: OnError,
    /// The policy for failed writes, zero writes, discards and flushes (`werror`).
    pub on_write_error: OnError,
}

/// The state of an attached device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// The properties. The policies are never [`OnError::Auto`].
    pub options: DeviceOptions,
    /// Whether the tray is open; `None` if the device has no tray.
    pub tray_open: Option<bool>,
    /// Whether the guest has locked the medium in the device.
    pub locked: bool,
    /// The I/O status; `None` if the policies never hold a request because of an error of the host.
    pub io_status: Option<IoStatus>,
}

impl DeviceState {
    fn new(mut options: DeviceOptions) -> Self {
        options.on_read_error = options.on_read_error.for_reads();
        options.on_write_error = options.on_write_error.for_writes();
        // Like in QEMU, `rerror=enospc` alone gives a device no I/O status.
        let stops = options.on_read_error == OnError::Stop
            || matches!(options.on_write_error, OnError::Stop | OnError::Enospc);
        let tray_open = options.has_tray.then_some(false);
        Self { options, tray_open, locked: false, io_status: stops.then_some(IoStatus::Ok) }
    }
}

/// The device slot of a backend.
#[derive(Default)]
pub(super) struct DeviceSlot(Mutex<Option<DeviceState>>);

impl DeviceSlot {
    fn lock(&self) -> MutexGuard<'_, Option<DeviceState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device that is attached to a backend. Dropping this value detaches the device, and fails the requests that are held.
#[derive(Debug)]
#[must_use]
pub struct Device(Backend);

impl Drop for Device {
    fn drop(&mut self) {
        let mut device = self.0.0.device.lock();
        self.0.0.mode.set(Mode::DEVICE, false);
        let state = device.take();
        // The slot stays locked: otherwise the requests of the next device would fail too.
        let failed = self.0.0.held.fail();
        drop(device);
        drop(state);
        failed.wake();
    }
}

impl Device {
    /// The backend of the device.
    pub fn backend(&self) -> &Backend {
        &self.0
    }

    /// Records that the tray was opened or closed, and reports [`BlockEvent::TrayMoved`] if this is a change. Without a tray,
    /// does nothing.
    pub fn set_tray_open(&self, open: bool) {
        let mut device = self.0.0.device.lock();
        let Some(state) = &mut *device else { return };
        let moved = state.tray_open.is_some_and(|now| now != open);
        if moved {
            state.tray_open = Some(open);
        }
        drop(device);
        if moved {
            let source = self.0.event_source();
            self.0.0.graph.events().raise(&BlockEvent::TrayMoved { source, tray_open: open });
        }
    }

    /// Records whether the guest has locked the medium in the device.
    pub fn set_locked(&self, locked: bool) {
        if let Some(state) = &mut *self.0.0.device.lock() {
            state.locked = locked;
        }
    }
}

/// What happens to a request that has failed.
pub(super) enum Failure<'a> {
    Report,
    Ignore,
    Hold(Held<'a>),
}

impl Backend {
    /// Attaches a device. Its policies apply to the requests of this backend that begin afterwards, except for copies
    /// ([`Self::copy_to`]) and status queries, and except for requests that the backend itself refuses: outside of the disk,
    /// without permission, without a medium. A device usually also switches accounting on ([`Self::set_accounting`]).
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy) if another device is attached; `ENOMEDIUM` if the backend is closed.
    pub fn attach_device(&self, options: DeviceOptions) -> Result<Device> {
        let mut device = self.0.device.lock();
        if self.is_closed() {
            return Err(no_medium());
        }
        if device.is_some() {
            let text = format!("Drive '{}' is already in use by another block device", self.name());
            return Err(Error::new(ErrorKind::Busy, text));
        }
        *device = Some(DeviceState::new(options));
        self.0.mode.set(Mode::DEVICE, true);
        drop(device);
        Ok(Device(self.clone()))
    }

    /// The attached device.
    pub fn device(&self) -> Option<DeviceState> {
        self.0.device.lock().clone()
    }

    /// The I/O status of the attached device, if it has one.
    pub fn io_status(&self) -> Option<IoStatus> {
        self.0.device.lock().as_ref()?.io_status
    }

    /// Number of requests that are held after an error.
    pub fn held_requests(&self) -> usize {
        self.0.held.len()
    }

    /// Begins the held requests again, in the order in which they were held, and sets the I/O status to `ok`. If requests are
    /// held back by a drain, they begin after it. A request that fails again is held again.
    pub fn resume(&self) {
        let mut device = self.0.device.lock();
        if let Some(state) = &mut *device {
            state.io_status = state.io_status.map(|_| IoStatus::Ok);
        }
        // The device stays locked: another request that is held now would set the status, and would be resumed with the others.
        let resumed = self.0.held.resume();
        drop(device);
        resumed.wake();
    }

    /// Applies the policy of the device to a request that has failed, and reports [`BlockEvent::IoError`]. `root` is the root node
    /// of the attempt: the backend may have another medium now. `None`: there is no device.
    pub(super) fn handle_failure(
        &self,
        operation: IoOperation,
        error: &Error,
        root: &Node,
        round: Round,
    ) -> Option<Failure<'_>> {
        let (errno, is_nospace) = (error.raw_errno(), error.raw_errno() == Errno::NOSPC);
        let mut device = self.0.device.lock();
        let state = device.as_mut()?;
        let policy = match operation {
            IoOperation::Read => state.options.on_read_error,
            IoOperation::Write => state.options.on_write_error,
        };
        let failure = match policy.action(errno) {
            IoErrorAction::Report => Failure::Report,
            IoErrorAction::Ignore => Failure::Ignore,
            // If the medium was removed during the request, the device gets the error.
            IoErrorAction::Stop => self.0.held.hold(round).map_or(Failure::Report, Failure::Hold),
        };
        let action = match &failure {
            Failure::Report => IoErrorAction::Report,
            Failure::Ignore => IoErrorAction::Ignore,
            Failure::Hold(_) => IoErrorAction::Stop,
        };
        // The first error stays until the requests are resumed.
        if action == IoErrorAction::Stop && state.io_status == Some(IoStatus::Ok) {
            state.io_status = Some(if is_nospace { IoStatus::NoSpace } else { IoStatus::Failed });
        }
        let nospace = state.io_status.map(|_| is_nospace);
        let source = self.source_with(Some(state.options.id.clone()));
        drop(device);
        // The request is held already, so a listener may resume it.
        self.0.graph.events().raise(&BlockEvent::IoError {
            source,
            node_name: root.name().to_owned(),
            operation,
            action,
            nospace,
            errno,
            reason: error.to_string(),
        });
        Some(failure)
    }

    /// Makes the held requests fail with their errors.
    pub(crate) fn fail_held(&self) {
        self.0.held.fail().wake();
    }

    /// This backend, for events.
    pub(crate) fn event_source(&self) -> EventSource {
        let id = self.0.device.lock().as_ref().map(|state| state.options.id.clone());
        self.source_with(id)
    }

    fn source_with(&self, id: Option<String>) -> EventSource {
        EventSource { backend: self.id(), device: self.name().to_owned(), id }
    }
}
