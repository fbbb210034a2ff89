//! The state of one I/O thread, and its loop.
//!
//! One iteration of the loop: take the messages → poll the main future → run ready tasks → fire timers → one call
//! that submits all queued operations, sleeps if nothing is ready, and harvests all completions.
//!
//! No task outlives the [`Local`] of its thread: [`closing`](super::closing) drops all tasks when the loop ends, also
//! after a panic of the main future.

use std::cell::RefCell;
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

/// The maximum number of tasks that run before completions are checked again.
const BUDGET: usize = 256;

/// The time for which a simulation waits for a socket, if it has nothing else to do. The peer may be outside the
/// simulation.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(10);

/// The mechanism by which an I/O thread executes operations and sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or `Threads` if the kernel refuses io_uring (logged once per process).
    #[default]
    Auto,
    /// io_uring; an error if the kernel refuses it.
    Uring,
    /// `poll` and a pool of blocking threads.
    Threads,
}

/// Configuration of an I/O thread.
#[derive(Clone, Debug)]
pub struct Config {
    /// Entries of the submission queue. Values outside 8 to 4096 are replaced by the nearest of these limits. The kernel
    /// rounds the number up to a power of two.
    pub entries: u32,
    /// The time for which the thread polls for completions before it sleeps; `None`: it sleeps immediately.
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

/// The part of an I/O thread that other threads cannot access.
pub(crate) struct Local {
    pub(crate) shared: Arc<Shared>,
    pub(super) handle: RefCell<Weak<Handle>>,
    pub(super) tasks: Tasks,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) reactor: Reactor,
    pub(super) main: Arc<MainWaker>,
    pub(super) poll: Option<Duration>,
    /// Decides order and time in a simulation; `None` outside a simulation.
    pub(crate) scheduler: Option<Scheduler>,
    pub(super) idle_trim: IdleTrim,
}

thread_local! {
    pub(super) static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// Runs `f` with the current I/O thread. Returns `None` if the caller is not on an I/O thread.
pub(crate) fn try_with<R>(f: impl FnOnce(&Rc<Local>) -> R) -> Option<R> {
    CURRENT.try_with(|current| current.borrow().as_ref().map(f)).ok().flatten()
}

/// The current I/O thread.
///
/// # Panics
/// If the caller is not on an I/O thread.
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
            self.shared.wake_if_asleep();
        }
    }
}

/// Runs `f` on the current thread, which is an I/O thread until `f` completes. Tasks that then still exist are dropped.
///
/// # Panics
/// If the thread already is an I/O thread, if the I/O thread cannot be created, or if `f` panics.
pub fn block_on<F: Future>(f: F) -> F::Output {
    match block_on_with(Config::default(), f) {
        Ok(value) => value,
        Err(error) => panic!("cannot start an I/O thread: {error}"),
    }
}

/// [`block_on`] with a configuration.
///
/// # Errors
/// If the I/O thread cannot be created: no io_uring ([`Engine::Uring`]), no descriptor, or
/// [`MAX_IO_THREADS`](super::MAX_IO_THREADS) threads exist.
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

/// The body of a started I/O thread. Returns when no handle to the thread is left.
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

    /// Whether the main future runs before the ready tasks. In a simulation with ready tasks, the seed decides this.
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
            // The waker of the main future sets `woken` before it reads the sleep flag. The sleep flag is now set, so
            // the check of `woken` below cannot miss a wake-up that rings no bell.
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

    /// Polls for completions for the configured time before the thread sleeps. Returns true if a task or the main future is
    /// ready to run.
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

    /// The number of tasks that are ready to run.
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

    /// One step of the simulation: runs one ready task. If no task is ready, executes the next event in virtual time,
    /// or fires the next timers.
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
                self.reactor.turn(Wait::Until(real_now().saturating_add(SOCKET_TIMEOUT)));
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

    /// Handles the messages of other threads. If the handling of a message panics, the other messages are still
    /// handled.
    pub(crate) fn take_mail(self: &Rc<Self>) {
        for message in self.shared.mailbox.take() {
            match message {
                Message::Run(task) => self.tasks.ready.borrow_mut().push_back(task),
                Message::Call(f) if self.shared.is_closing() => contained(|| drop(f)),
                Message::Call(f) => contained(f),
                Message::Complete(key, result) => self.reactor.complete(key, result),
                Message::Unregister(id, keep) => self.reactor.unregister_file(id, keep),
                Message::Wake => self.main.woken.store(true, Ordering::Release),
            }
        }
    }
}

/// Keeps `value` until all file operations in flight on this I/O thread have completed, then drops it on this thread.
/// If no such operation is in flight, or if the caller is not on an I/O thread, `value` is dropped immediately.
///
/// When a future is dropped, the operations that the future has started continue: the kernel still reads from or
/// writes to their files. So a value that marks an object as in use (a count, an epoch, a lock) must exist until
/// these operations have completed. This also holds when the thread closes, because closing waits for the operations
/// in flight.
///
/// The value is also kept for the operations of other tasks. It is not kept for operations on sockets and pipes,
/// because these may never complete.
pub fn keep_until_settled<T: 'static>(value: T) {
    let mut value = Some(value);
    try_with(|local| value.take().and_then(|value| local.reactor.keep(Box::new(value))));
    drop(value);
}

/// A wrapper that passes its value to [`keep_until_settled`] when it is dropped.
#[derive(Debug)]
pub struct UntilSettled<T: 'static>(Option<T>);

impl<T: 'static> UntilSettled<T> {
    /// Wraps a value.
    pub fn new(value: T) -> Self {
        UntilSettled(Some(value))
    }

    /// Returns the value. The caller must know that no operation that the value guards is in flight.
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

/// Waits until the file operations that are now in flight on this I/O thread have completed, including operations whose
/// futures were dropped. After that, other operations may use the same ranges of the files.
pub async fn settled() {
    let (sender, receiver) = oneshot::channel::<()>();
    keep_until_settled(sender);
    // The receiver becomes ready because the sender is dropped.
    let _ = receiver.await;
}
