//! The state of one I/O thread, and its loop.
//!
//! One turn: take the mail → poll the main future → run ready tasks → fire timers → one call into the driver that
//! submits everything queued, sleeps if nothing is ready, and harvests all completions.
//!
//! Tasks never outlive the thread's context: [`closing`](super::closing) ensures this when the loop ends, also if the
//! main future panicked.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::closing::Entered;
use super::foreign::contained;
use super::idle_trim::IdleTrim;
use super::oneshot;
use super::shared::{Message, Shared};
use super::tasks::Tasks;
use super::thread::Handle;
use super::timer::{Timers, real_now};
use crate::perturb;
use crate::reactor::{Reactor, Wait};
use crate::sim::Scheduler;

/// How many tasks run before completions are checked again.
const BUDGET: usize = 256;

/// How long a simulation that has nothing else to do waits for a socket whose peer may be outside the simulation.
const PATIENCE: Duration = Duration::from_secs(10);

/// The mechanism by which an I/O thread executes operations and sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or the fallback if io_uring is refused (logged once per process).
    #[default]
    Auto,
    /// io_uring; an error if it is refused.
    Uring,
    /// `poll` and a pool of blocking threads.
    Threads,
}

/// Configuration of an I/O thread.
#[derive(Clone, Debug)]
pub struct Config {
    /// Entries of the submission queue, rounded up to a power of two by the kernel.
    pub entries: u32,
    /// How long to poll for completions before sleeping.
    pub poll: Option<Duration>,
    /// The engine.
    pub engine: Engine,
    /// Bytes of buffer memory to register with the ring; 0 for none.
    pub registered_buffers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config { entries: 128, poll: None, engine: Engine::Auto, registered_buffers: 1 << 20 }
    }
}

/// The part of an I/O thread that only the thread itself uses.
pub(crate) struct Local {
    pub(crate) shared: Arc<Shared>,
    pub(super) handle: RefCell<Weak<Handle>>,
    pub(super) tasks: Tasks,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) reactor: Reactor,
    pub(super) main: Arc<MainWaker>,
    pub(super) poll: Option<Duration>,
    /// Only in simulation: decides order and time.
    pub(crate) scheduler: Option<Scheduler>,
    pub(super) closing: Cell<bool>,
    pub(super) idle_trim: IdleTrim,
}

thread_local! {
    pub(super) static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// Runs `f` with the current I/O thread. Returns `None` if the caller is not on one.
pub(crate) fn try_with<R>(f: impl FnOnce(&Rc<Local>) -> R) -> Option<R> {
    CURRENT.try_with(|current| current.borrow().as_ref().map(f)).ok().flatten()
}

/// The current I/O thread.
///
/// # Panics
/// If the caller is not on one.
pub(crate) fn current() -> Rc<Local> {
    match try_with(Rc::clone) {
        Some(local) => local,
        None => panic!("not on an I/O thread: call this inside `block_on` or a task"),
    }
}

/// Whether the caller is inside [`sim::run`](crate::sim::run).
pub(crate) fn is_simulated() -> bool {
    try_with(|local| local.scheduler.is_some()).unwrap_or(false)
}

/// Wakes the future that the loop itself drives.
pub(super) struct MainWaker {
    pub(super) woken: AtomicBool,
    pub(super) shared: Arc<Shared>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        let here = try_with(|local| Arc::ptr_eq(&local.shared, &self.shared)).unwrap_or(false);
        if !here {
            self.shared.nudge();
        }
    }
}

/// Turns the current thread into an I/O thread until `f` completes. Tasks that exist then are dropped.
///
/// # Panics
/// If the thread already is an I/O thread, if neither a ring nor the fallback can be created, or if `f` panics.
pub fn block_on<F: Future>(f: F) -> F::Output {
    match block_on_with(Config::default(), f) {
        Ok(value) => value,
        Err(error) => panic!("cannot start an I/O thread: {error}"),
    }
}

/// [`block_on`] with a choice of engine.
///
/// # Errors
/// If the ring cannot be created.
///
/// # Panics
/// If the thread already is an I/O thread, or if `f` panics.
#[expect(clippy::needless_pass_by_value, reason = "a configuration is made for one thread")]
pub fn block_on_with<F: Future>(config: Config, f: F) -> io::Result<F::Output> {
    let entered = Entered::new(&config, None)?;
    let handle = Handle::borrowed(Arc::clone(&entered.local.shared));
    *entered.local.handle.borrow_mut() = Arc::downgrade(&handle);
    Ok(entered.local.run(pin!(f)))
}

/// [`block_on`] with a scheduler that decides order and time.
pub(crate) fn simulate<F: Future>(scheduler: Scheduler, f: F) -> F::Output {
    let config = Config { engine: Engine::Threads, registered_buffers: 0, ..Config::default() };
    let entered = match Entered::new(&config, Some(scheduler)) {
        Ok(entered) => entered,
        Err(error) => panic!("cannot start a simulated I/O thread: {error}"),
    };
    let handle = Handle::borrowed(Arc::clone(&entered.local.shared));
    *entered.local.handle.borrow_mut() = Arc::downgrade(&handle);
    entered.local.run(pin!(f))
}

/// Body of a started I/O thread: runs until no handle is left.
pub(crate) fn serve(
    config: &Config,
    ready: impl FnOnce(Arc<Shared>) -> Weak<Handle>,
) -> io::Result<()> {
    let entered = Entered::new(config, None)?;
    let shared = Arc::clone(&entered.local.shared);
    *entered.local.handle.borrow_mut() = ready(Arc::clone(&shared));
    let stopped = std::future::poll_fn(|_| {
        if shared.stop.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    });
    entered.local.run(pin!(stopped));
    Ok(())
}

impl Local {
    pub(crate) fn handle(&self) -> Option<Arc<Handle>> {
        self.handle.borrow().upgrade()
    }

    /// The virtual time; `None` outside a simulation.
    pub(crate) fn virtual_now(&self) -> Option<Duration> {
        self.scheduler.as_ref().map(Scheduler::now)
    }

    fn now(&self) -> Duration {
        self.virtual_now().unwrap_or_else(real_now)
    }

    fn run<F: Future>(self: &Rc<Self>, mut main: Pin<&mut F>) -> F::Output {
        let waker = Waker::from(Arc::clone(&self.main));
        let mut cx = Context::from_waker(&waker);
        loop {
            self.take_mail();
            if self.main_may_run() && self.main.woken.swap(false, Ordering::Acquire) {
                self.idle_trim.note();
                if let Poll::Ready(value) = main.as_mut().poll(&mut cx) {
                    return value;
                }
            }
            match &self.scheduler {
                None => self.turn(),
                Some(scheduler) => self.simulated_turn(scheduler),
            }
        }
    }

    /// In simulation, chance decides when the main future runs among the tasks.
    fn main_may_run(&self) -> bool {
        self.scheduler
            .as_ref()
            .is_none_or(|s| self.tasks.ready.borrow().is_empty() || s.pick(2) == 0)
    }

    fn turn(self: &Rc<Self>) {
        self.run_ready();
        self.fire_timers();
        if !self.is_idle() {
            self.reactor.turn(Wait::No);
            return;
        }
        if self.spin() {
            return;
        }
        if self.shared.mailbox.prepare_sleep() {
            perturb::point();
            // The waker of the main future sets its flag before it reads the sleep flag, as a sender publishes its
            // message first.
            let timer = self.timers.borrow().next_deadline();
            let wait = match [timer, self.idle_trim.deadline()].into_iter().flatten().min() {
                _ if !self.is_idle() => Wait::No,
                Some(deadline) => Wait::Until(deadline),
                None => Wait::Forever,
            };
            self.reactor.turn(wait);
            self.shared.mailbox.awake();
            self.idle_trim.slept();
        }
    }

    /// Polls for completions for a while before the thread sleeps. Returns true if there was something to do.
    fn spin(self: &Rc<Self>) -> bool {
        let Some(limit) = self.poll else { return false };
        let until = real_now().saturating_add(limit);
        while self.is_idle() {
            self.reactor.turn(Wait::No);
            self.take_mail();
            self.fire_timers();
            if real_now() >= until {
                break;
            }
        }
        !self.is_idle()
    }

    fn is_idle(&self) -> bool {
        self.tasks.ready.borrow().is_empty() && !self.main.woken.load(Ordering::Acquire)
    }

    /// How many tasks are ready to run.
    pub(crate) fn ready_tasks(&self) -> usize {
        self.tasks.ready.borrow().len()
    }

    fn run_ready(&self) {
        for _ in 0..BUDGET {
            let Some(task) = self.tasks.ready.borrow_mut().pop_front() else { break };
            self.idle_trim.note();
            task.run();
        }
    }

    fn fire_timers(&self) {
        if self.timers.borrow().next_deadline().is_none() {
            return;
        }
        let now = self.now();
        loop {
            let due = self.timers.borrow_mut().take_due(now);
            let Some(waker) = due else { break };
            contained(|| waker.wake());
        }
    }

    /// One step of the simulation: one ready task, or else the next event in virtual time.
    fn simulated_turn(self: &Rc<Self>, scheduler: &Scheduler) {
        let ready = self.tasks.ready.borrow().len();
        if ready > 0 {
            let task = self.tasks.ready.borrow_mut().swap_remove_back(scheduler.pick(ready));
            if let Some(task) = task {
                task.run();
            }
            return;
        }
        if self.main.woken.load(Ordering::Acquire) || !self.shared.mailbox.is_empty() {
            return;
        }
        // A real socket may become ready before virtual time advances.
        let sockets = self.reactor.waits_for_sockets();
        if sockets {
            self.reactor.turn(Wait::No);
            if !self.is_idle() {
                return;
            }
        }
        let timer = self.timers.borrow().next_deadline();
        if let Some(event) = scheduler.next_event(timer) {
            self.reactor.finish_simulated(&event);
        } else if timer.is_none() {
            if sockets {
                self.reactor.turn(Wait::Until(real_now().saturating_add(PATIENCE)));
            }
            if self.is_idle() && self.shared.mailbox.is_empty() {
                let living = self.tasks.living();
                panic!(
                    "deadlock at {:?}: the main future and {living} tasks wait, and nothing can wake them",
                    scheduler.now()
                );
            }
        }
        self.fire_timers();
    }

    /// Handles the messages of other threads. If one panics, the others are still handled.
    pub(crate) fn take_mail(self: &Rc<Self>) {
        for message in self.shared.mailbox.take() {
            match message {
                Message::Run(task) => self.tasks.ready.borrow_mut().push_back(task),
                Message::Call(f) if self.closing.get() => contained(|| drop(f)),
                Message::Call(f) => contained(f),
                Message::Complete(key, result) => self.reactor.complete(key, result),
                Message::Unregister(id, keep) => self.reactor.unregister_file(id, keep),
                Message::Nudge => self.main.woken.store(true, Ordering::Release),
            }
        }
    }
}

/// Keeps `value` until all file operations in flight on this I/O thread have completed, then drops it on this thread.
/// If nothing is in flight, or if the caller is not on an I/O thread, `value` is dropped at once.
///
/// When a future is dropped, the operations that it has started continue on the host, which still reads from or
/// writes to their files. So a value that marks something as in use (a count, an epoch, a lock) is kept until these
/// operations have completed. It is also kept when the thread closes, because closing waits for the operations in
/// flight.
///
/// Operations of other tasks are waited for as well. Operations on sockets and pipes, which may take for ever, are
/// not.
pub fn keep_until_settled<T: 'static>(value: T) {
    let mut value = Some(value);
    try_with(|local| value.take().and_then(|value| local.reactor.keep(Box::new(value))));
    drop(value);
}

/// A value that is kept when it is dropped; see [`keep_until_settled`].
#[derive(Debug)]
pub struct UntilSettled<T: 'static>(Option<T>);

impl<T: 'static> UntilSettled<T> {
    /// Wraps a value.
    pub fn new(value: T) -> Self {
        UntilSettled(Some(value))
    }

    /// Returns the value. For callers who know that no operation which the value guards is in flight.
    pub fn release(mut self) -> Option<T> {
        self.0.take()
    }
}

impl<T: 'static> Drop for UntilSettled<T> {
    fn drop(&mut self) {
        if let Some(value) = self.0.take() {
            keep_until_settled(value);
        }
    }
}

/// Waits until the file operations in flight on this I/O thread have completed, including those whose futures were
/// dropped. After that, the ranges of their files may be used for other purposes.
pub async fn settled() {
    let (sender, receiver) = oneshot::channel::<()>();
    keep_until_settled(sender);
    // The sender was dropped.
    let _ = receiver.await;
}
