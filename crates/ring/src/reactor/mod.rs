//! Operations and the backends that execute them.
//!
//! An operation lives in a slot ([`slots`]) from its start until it has completed **and** its future has taken the
//! result or was dropped. The slot owns all memory that the kernel or a worker thread may touch. [`Pending`] is the
//! future of an operation.
//!
//! | backend | for | module |
//! |---|---|---|
//! | io_uring | files and sockets | [`uring`] |
//! | a system call inline | small transfers of files in memory (tmpfs), see [`in_place`] | [`blocking`] |
//! | Linux AIO | files opened with `aio=native` | [`native`] |
//! | blocking threads | files with `aio=threads`, and all files whose backend the kernel refuses | [`blocking`] |
//! | poll | sockets if io_uring is refused | [`fallback`] |
//! | simulation | files of a simulated disk | [`crate::sim`] |
//!
//! The borrow rule of this module: no `RefCell` is borrowed while a waker, the drop of a payload or other foreign
//! code runs.

mod blocking;
mod fallback;
mod in_place;
mod kept;
mod native;
mod slots;
mod uring;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Once};
use std::task::{Context, Poll};
use std::time::Duration;

pub(crate) use blocking::BlockingOp;
pub(crate) use kept::Kept;
pub(crate) use slots::{Key, Op, Payload, Slot};

use crate::aio::Aio;
use crate::file::File;
use crate::runtime::foreign::contained;
use crate::runtime::local::{Local, current};
use crate::runtime::offload::BLOCKING;
use crate::runtime::real_now;
use crate::runtime::shared::{Message, Shared};
use crate::runtime::{Config, Engine, Job};
use fallback::Fallback;
use in_place::{DEFAULT_LIMITS, InlineLimits, MIN_MOVED};
pub use in_place::{InPlace, transfer_in_place};
use native::Native;
use slots::{Done, Slots};
use uring::Uring;

/// The file or descriptor of an operation. It stays open until the operation has completed.
pub(crate) enum Target {
    /// A file that is registered with the ring under this index. The ring keeps the file open until it is
    /// unregistered.
    Fixed(u32),
    /// A file that this handle keeps open.
    File(File),
    /// A descriptor that this reference keeps open.
    Fd(Arc<OwnedFd>),
    /// Another object keeps the file open: the event of a simulated disk, or the closure of a call.
    Elsewhere,
}

impl Target {
    fn fd(&self) -> RawFd {
        match self {
            Target::File(file) => file.raw_fd(),
            Target::Fd(fd) => fd.as_raw_fd(),
            Target::Fixed(_) | Target::Elsewhere => -1,
        }
    }
}

/// The time for which one iteration of the loop may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Do not sleep.
    No,
    /// Sleep until an event.
    Forever,
    /// Sleep until an event, or until the clock ([`real_now`]) shows this time.
    Until(Duration),
}

impl Wait {
    /// A short sleep, for loops that check again afterwards.
    fn briefly() -> Wait {
        Wait::Until(real_now().saturating_add(Duration::from_millis(100)))
    }
}

#[expect(clippy::large_enum_variant, reason = "one per I/O thread")]
enum Driver {
    Uring(Uring),
    Fallback(Fallback),
}

/// The part of an I/O thread that starts operations and processes their completions.
pub(crate) struct Reactor {
    slots: RefCell<Slots>,
    driver: RefCell<Driver>,
    native: RefCell<Option<Native>>,
    shared: Arc<Shared>,
    /// Reused memory of `turn`, for completions that are harvested and not yet processed.
    harvest: RefCell<Vec<(Key, i32)>>,
    /// Bytes that were transferred inline since the last `turn`.
    moved: Cell<usize>,
    /// Which transfers are executed inline.
    inline_limits: Cell<InlineLimits>,
}

/// If at least this number of tasks is ready and fewer than [`HANDED_OVER`] operations are in flight, transfers on
/// tmpfs are passed to kernel workers. Limits above the default ([`transfer_in_place`]) turn this off.
const QUEUED: usize = 4;
/// See [`QUEUED`].
const HANDED_OVER: usize = 8;

/// A thread that has passed many transfers on tmpfs to kernel workers does not wake for each completion. It sleeps until
/// some of these transfers have completed: their number divided by `PER_WAKE_UP`.
const PER_WAKE_UP: usize = 4;
/// Maximum number of completed transfers for which the thread waits.
const MAX_PER_WAKE_UP: usize = 8;
/// Maximum length of these transfers, in bytes. Each of them takes little time, so other events wait for at most some
/// 100 µs.
const SOON: usize = 128 << 10;

impl Reactor {
    pub(crate) fn new(config: &Config, shared: &Arc<Shared>) -> io::Result<Reactor> {
        let driver = match config.engine {
            Engine::Uring => Driver::Uring(Uring::new(config, shared)?),
            Engine::Threads => Driver::Fallback(Fallback::new(shared)),
            Engine::Auto => match Uring::new(config, shared) {
                Ok(uring) => Driver::Uring(uring),
                Err(error) => {
                    fallback::log_once(&error);
                    Driver::Fallback(Fallback::new(shared))
                }
            },
        };
        Ok(Reactor {
            slots: RefCell::default(),
            driver: RefCell::new(driver),
            native: RefCell::new(None),
            shared: Arc::clone(shared),
            harvest: RefCell::default(),
            moved: Cell::new(0),
            inline_limits: Cell::new(DEFAULT_LIMITS),
        })
    }

    /// Submits the queued operations, waits for an event, and processes the completions.
    pub(crate) fn turn(&self, wait: Wait) {
        self.moved.set(0);
        let mut done = std::mem::take(&mut *self.harvest.borrow_mut());
        if let Some(native) = &mut *self.native.borrow_mut() {
            native.submit(&mut done);
            native.reap(&mut done);
        }
        let wait = if done.is_empty() { wait } else { Wait::No };
        match &mut *self.driver.borrow_mut() {
            Driver::Uring(uring) => {
                let least = self.slots.borrow().soon() / PER_WAKE_UP;
                uring.turn(wait, least.min(MAX_PER_WAKE_UP), &mut done);
            }
            Driver::Fallback(fallback) => fallback.turn(&self.slots, wait, &mut done),
        }
        if let Some(native) = &mut *self.native.borrow_mut() {
            native.reap(&mut done);
        }
        for (key, result) in done.drain(..) {
            if !(result == -libc::ECANCELED || result == -libc::EAGAIN)
                || !self.retry_on_blocking_thread(key)
            {
                self.complete(key, result);
            }
        }
        *self.harvest.borrow_mut() = done;
    }

    /// Passes an operation on a file to a blocking thread, or executes it here if no thread can be started. Returns
    /// false if the operation is not on a file, or if the thread does not use io_uring. The kernel ends an operation
    /// on a file with `ECANCELED` or `EAGAIN` if it cannot start a worker thread (`RLIMIT_NPROC`). The engine itself
    /// never cancels operations on files.
    fn retry_on_blocking_thread(&self, key: Key) -> bool {
        let file = {
            let slots = self.slots.borrow();
            let Some(slot) = slots.try_get(key).filter(|slot| slot.op.is_on_file()) else {
                return false;
            };
            match (&slot.target, &*self.driver.borrow()) {
                (Some(Target::File(file)), Driver::Uring(_)) => Some(file.clone()),
                (Some(Target::Fixed(id)), Driver::Uring(uring)) => uring.file(*id),
                _ => return false,
            }
        };
        let Some(file) = file else {
            // No handle to the file is left, so the operation cannot be repeated.
            self.complete(key, -libc::EIO);
            return true;
        };
        let mut slots = self.slots.borrow_mut();
        slots.takes_long(key);
        let slot = slots.get_mut(key);
        slot.target = Some(Target::File(file));
        let job = BlockingOp::new(key, slot, &self.shared);
        drop(slots);
        BLOCKING.submit(Job::Io(job));
        true
    }

    /// Records the completion of an operation and wakes its future.
    pub(crate) fn complete(&self, key: Key, result: i32) {
        let (done, kept) = self.slots.borrow_mut().complete(key, result);
        match done {
            Done::Wake(waker) => contained(|| waker.wake()),
            Done::Free(content) => drop(content),
            Done::Nothing => {}
        }
        for value in kept {
            contained(|| drop(value));
        }
    }

    /// Keeps a value until the file operations in flight have completed. Returns the value if no such operation is in
    /// flight.
    pub(crate) fn keep(&self, value: Kept) -> Option<Kept> {
        self.slots.borrow_mut().keep(value)
    }

    /// Starts an operation on a file.
    pub(crate) fn start_file(local: &Rc<Local>, file: &File, op: Op, payload: Payload) -> Pending {
        let reactor = &local.reactor;
        if let Some(disk) = file.disk() {
            return crate::sim::start(local, disk, op, payload);
        }
        if file.aio() == Aio::Native
            && op.is_transfer()
            && local.scheduler.is_none()
            && reactor.has_native(local)
        {
            let mut slots = reactor.slots.borrow_mut();
            let key = slots.insert(op, Target::File(file.clone()), payload);
            if let Some(native) = &mut *reactor.native.borrow_mut() {
                native.start(key, slots.get_mut(key));
            }
            return Pending::new(local, key);
        }
        if file.is_in_memory() && op.is_transfer() && reactor.runs_inline(local, payload.len()) {
            return reactor.perform_inline(local, file, op, payload);
        }
        let mut driver = reactor.driver.borrow_mut();
        if let Driver::Uring(uring) = &mut *driver
            && file.aio() == Aio::IoUring
        {
            let target =
                uring.fixed(file).map_or_else(|| Target::File(file.clone()), Target::Fixed);
            let soon = file.is_in_memory() && op.is_transfer() && payload.len() <= SOON;
            let mut slots = reactor.slots.borrow_mut();
            let key = slots.insert(op, target, payload);
            if soon {
                slots.ends_soon(key);
            }
            uring.start(key, slots.get_mut(key));
            return Pending::new(local, key);
        }
        drop(driver);
        if local.scheduler.is_some() {
            return reactor.perform_inline(local, file, op, payload);
        }
        let (key, job) = reactor.blocking_op(local, file, op, payload);
        BLOCKING.submit(Job::Io(job));
        Pending::new(local, key)
    }

    /// Whether this thread executes a transfer of `len` bytes on tmpfs inline.
    fn runs_inline(&self, local: &Local, len: usize) -> bool {
        let InlineLimits { longest, .. } = self.inline_limits.get();
        len <= longest
            && (longest > DEFAULT_LIMITS.longest || !self.has_work_for_another_core(local))
    }

    /// Changes which transfers are executed inline.
    fn change_inline_limits(&self, change: impl FnOnce(InlineLimits) -> InlineLimits) {
        self.inline_limits.set(change(self.inline_limits.get()));
    }

    /// Whether many tasks are ready on this thread and few operations are in flight. In this case it is better to
    /// pass some transfers to kernel workers, so that several cores copy.
    fn has_work_for_another_core(&self, local: &Local) -> bool {
        local.ready_tasks() >= QUEUED && self.slots.borrow().in_flight() < HANDED_OVER
    }

    fn blocking_op(
        &self,
        local: &Local,
        file: &File,
        op: Op,
        payload: Payload,
    ) -> (Key, BlockingOp) {
        let mut slots = self.slots.borrow_mut();
        let key = slots.insert(op, Target::File(file.clone()), payload);
        let job = BlockingOp::new(key, slots.get_mut(key), &local.shared);
        (key, job)
    }

    /// Executes an operation inline. If the thread has transferred more than the budget inline since the last `turn`,
    /// the future yields once. So other tasks run even if a task only does transfers on tmpfs.
    fn perform_inline(&self, local: &Rc<Local>, file: &File, op: Op, payload: Payload) -> Pending {
        let len = payload.len().max(MIN_MOVED);
        let (key, job) = self.blocking_op(local, file, op, payload);
        let result = job.perform();
        self.complete(key, result);
        let moved = self.moved.get().saturating_add(len);
        self.moved.set(moved);
        let mut pending = Pending::new(local, key);
        pending.yields = moved > self.inline_limits.get().budget;
        pending
    }

    /// Whether the thread has an AIO context. Creates the context if there is none. If the kernel refuses AIO, blocking
    /// threads execute the operations.
    fn has_native(&self, local: &Local) -> bool {
        let mut native = self.native.borrow_mut();
        if native.is_none() {
            match Native::new(local.shared.bell()) {
                Ok(context) => *native = Some(context),
                Err(error) => {
                    static LOGGED: Once = Once::new();
                    LOGGED.call_once(|| {
                        tracing::warn!(
                            "Linux AIO is not available ({error}); using a pool of threads instead"
                        );
                    });
                }
            }
        }
        native.is_some()
    }

    /// Starts an operation on a socket, pipe or terminal.
    pub(crate) fn start_fd(
        local: &Rc<Local>,
        fd: &Arc<OwnedFd>,
        op: Op,
        payload: Payload,
    ) -> Pending {
        let reactor = &local.reactor;
        let mut slots = reactor.slots.borrow_mut();
        let key = slots.insert(op, Target::Fd(Arc::clone(fd)), payload);
        match &mut *reactor.driver.borrow_mut() {
            Driver::Uring(uring) => uring.start(key, slots.get_mut(key)),
            Driver::Fallback(fallback) => {
                if let Some(result) = fallback.start(key, slots.get_mut(key)) {
                    slots.complete(key, result);
                }
            }
        }
        Pending::new(local, key)
    }

    /// Starts a blocking call on a worker. The call is an operation on a file: a closing thread waits for it, and
    /// [kept](Self::keep) values are kept until it has completed. The closure owns the objects that it uses.
    pub(crate) fn start_call(local: &Rc<Local>, call: Box<dyn FnOnce() + Send>) -> Pending {
        let key =
            local.reactor.slots.borrow_mut().insert(Op::Call, Target::Elsewhere, Payload::None);
        if local.scheduler.is_some() {
            call();
            local.reactor.complete(key, 0);
        } else {
            let shared = Arc::clone(&local.shared);
            BLOCKING.submit(Job::Call(Box::new(move || {
                call();
                shared.send(Message::Complete(key, 0));
            })));
        }
        Pending::new(local, key)
    }

    /// Starts an operation that the simulation will finish.
    pub(crate) fn start_simulated(local: &Rc<Local>, op: Op, payload: Payload) -> Pending {
        let key = local.reactor.slots.borrow_mut().insert(op, Target::Elsewhere, payload);
        Pending::new(local, key)
    }

    /// Executes a simulated operation and completes it.
    pub(crate) fn finish_simulated(&self, event: &crate::sim::Event) {
        let result = self.slots.borrow_mut().try_get_mut(event.key).map(|slot| event.perform(slot));
        if let Some(result) = result {
            self.complete(event.key, result);
        }
    }

    /// Whether an operation waits for a socket to become ready. With io_uring the result is always false; simulations
    /// use the fallback.
    pub(crate) fn waits_for_sockets(&self) -> bool {
        match &*self.driver.borrow() {
            Driver::Fallback(fallback) => fallback.is_waiting(),
            Driver::Uring(_) => false,
        }
    }

    /// Releases the registration of a file whose last handle was dropped.
    pub(crate) fn unregister_file(&self, id: u32, keep: Arc<dyn Any + Send + Sync>) {
        if let Driver::Uring(uring) = &mut *self.driver.borrow_mut() {
            uring.unregister(id, keep);
        }
    }

    /// Cancels the operations that may wait without a limit, and waits until no operation is in flight. No task runs during
    /// this call: woken tasks stay in the queue.
    pub(crate) fn finish(&self, local: &Rc<Local>) {
        self.cancel_all();
        if let Some(scheduler) = &local.scheduler {
            while let Some(event) = scheduler.next_event(None) {
                self.finish_simulated(&event);
            }
        }
        while self.is_busy() {
            if local.shared.mailbox.prepare_sleep() {
                self.turn(Wait::briefly());
                local.shared.mailbox.awake();
            }
            local.take_mail();
        }
    }

    /// Whether operations are in flight.
    pub(crate) fn is_busy(&self) -> bool {
        self.slots.borrow().in_flight() > 0
    }

    /// Removes the arena of the thread, which is registered with its ring. No operation may be in flight.
    pub(crate) fn release_memory(&self) {
        if let Driver::Uring(_) = &*self.driver.borrow() {
            crate::buf::uninstall_arena();
        }
    }

    fn cancel_all(&self) {
        let keys = self.slots.borrow().cancellable();
        for key in keys {
            self.cancel(key);
        }
    }

    /// Requests the cancellation of an operation. The result of the operation shows whether it was cancelled.
    fn cancel(&self, key: Key) {
        let fallen = match &mut *self.driver.borrow_mut() {
            Driver::Uring(uring) => {
                uring.cancel(key);
                false
            }
            Driver::Fallback(fallback) => fallback.cancel(key),
        };
        if fallen {
            self.complete(key, -libc::ECANCELED);
        }
    }
}

/// The future of an operation in flight. If the future is dropped, the operation continues, and the slot keeps the
/// memory of the operation until the operation has completed. An operation that may wait without a limit (sockets) is also
/// cancelled.
pub(crate) struct Pending {
    local: Rc<Local>,
    key: Key,
    taken: bool,
    /// The first poll yields to other tasks and does not check the slot.
    yields: bool,
}

impl Pending {
    fn new(local: &Rc<Local>, key: Key) -> Pending {
        Pending { local: Rc::clone(local), key, taken: false, yields: false }
    }

    pub(crate) fn key(&self) -> Key {
        self.key
    }
}

impl Future for Pending {
    type Output = (i32, Payload);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<(i32, Payload)> {
        assert!(!self.taken, "polled after completion");
        if std::mem::take(&mut self.yields) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let slots = &self.local.reactor.slots;
        let (outcome, waker_is_set) = slots.borrow_mut().poll(self.key, cx.waker());
        let Poll::Ready((result, payload, target)) = outcome else {
            if !waker_is_set {
                let waker = cx.waker().clone();
                let old = slots.borrow_mut().set_waker(self.key, waker);
                drop(old);
            }
            return Poll::Pending;
        };
        self.taken = true;
        drop(target);
        Poll::Ready((result, payload))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let (content, cancel) = self.local.reactor.slots.borrow_mut().detach(self.key);
        drop(content);
        if cancel {
            self.local.reactor.cancel(self.key);
        }
    }
}

/// Starts an operation on a file, on the current I/O thread.
pub(crate) fn start_file(file: &File, op: Op, payload: Payload) -> Pending {
    Reactor::start_file(&current(), file, op, payload)
}

/// Starts an operation on a descriptor, on the current I/O thread.
pub(crate) fn start_fd(fd: &Arc<OwnedFd>, op: Op, payload: Payload) -> Pending {
    Reactor::start_fd(&current(), fd, op, payload)
}

/// Starts a blocking call on behalf of the current I/O thread.
pub(crate) fn start_call(call: Box<dyn FnOnce() + Send>) -> Pending {
    Reactor::start_call(&current(), call)
}
