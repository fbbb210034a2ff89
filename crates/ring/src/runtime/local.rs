//! What belongs to one I/O thread, and its loop.
//!
//! One turn: take the mail → poll the main future → run ready tasks → fire timers → one call into the driver that submits
//! everything queued, sleeps when nothing is ready, and harvests all completions.
//!
//! Tasks never outlive the thread's context: when the loop ends, every task is dropped here (also when the main future
//! panicked), then all operations in flight are awaited, and only then is the ring closed.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use async_task::{Runnable, Task};

use super::quiet::Quiet;
use super::shared::{Message, Shared};
use super::thread::Handle;
use super::timer::{Timers, real_now};
use crate::reactor::{Reactor, Wait};
use crate::sim::Scheduler;

/// How many tasks are run before completions are looked at again.
const BUDGET: usize = 256;

/// How long a simulation that has nothing else to do waits for a socket whose peer may be outside of it.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an I/O thread sleeps on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, or, where that is refused, the fallback (which is said once).
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// `poll` and a pool of blocking threads.
    Threads,
}

/// How to make an I/O thread.
#[derive(Clone, Debug)]
pub struct Config {
    /// Entries of the submission queue, rounded up to a power of two by the kernel.
    pub entries: u32,
    /// How long to look for completions before going to sleep.
    pub poll: Option<Duration>,
    /// What to sleep on.
    pub engine: Engine,
    /// Bytes of buffer memory to register with the ring; 0 for none.
    pub registered_buffers: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config { entries: 128, poll: None, engine: Engine::Auto, registered_buffers: 1 << 20 }
    }
}

/// The thread's own part of an I/O thread.
pub(crate) struct Local {
    pub(crate) shared: Arc<Shared>,
    handle: RefCell<Weak<Handle>>,
    ready: RefCell<VecDeque<Runnable>>,
    /// Wakers of all living tasks, so that they can be dropped when the loop ends.
    living: RefCell<Living>,
    pub(crate) timers: RefCell<Timers>,
    pub(crate) reactor: Reactor,
    main: Arc<MainWaker>,
    poll: Option<Duration>,
    /// Present in simulation: decides order and time.
    pub(crate) scheduler: Option<Scheduler>,
    closing: Cell<bool>,
    quiet: Quiet,
}

#[derive(Default)]
struct Living {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
    count: usize,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

/// Runs `f` with the current I/O thread, if the caller is on one.
pub(crate) fn try_with<R>(f: impl FnOnce(&Rc<Local>) -> R) -> Option<R> {
    CURRENT.try_with(|current| current.borrow().as_ref().map(f)).ok().flatten()
}

/// The current I/O thread.
///
/// # Panics
/// When the caller is not on one.
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
struct MainWaker {
    woken: AtomicBool,
    shared: Arc<Shared>,
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

/// Turns the current thread into an I/O thread until `f` is done. Tasks that are left then are dropped.
///
/// # Panics
/// When the thread already is an I/O thread, when no ring and no fallback can be made, or when `f` panics.
pub fn block_on<F: Future>(f: F) -> F::Output {
    match block_on_with(Config::default(), f) {
        Ok(value) => value,
        Err(error) => panic!("cannot start an I/O thread: {error}"),
    }
}

/// [`block_on`] with a choice of engine.
///
/// # Errors
/// When the ring cannot be made.
///
/// # Panics
/// When the thread already is an I/O thread, or when `f` panics.
#[expect(clippy::needless_pass_by_value, reason = "a configuration is made for one thread")]
pub fn block_on_with<F: Future>(config: Config, f: F) -> io::Result<F::Output> {
    let entered = Entered::new(&config, None)?;
    let handle = Handle::borrowed(Arc::clone(&entered.local.shared));
    *entered.local.handle.borrow_mut() = Arc::downgrade(&handle);
    Ok(entered.local.run(pin!(f)))
}

/// [`block_on`] under a scheduler that decides order and time.
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

/// The thread is an I/O thread while this exists.
struct Entered {
    local: Rc<Local>,
}

impl Entered {
    fn new(config: &Config, scheduler: Option<Scheduler>) -> io::Result<Entered> {
        assert!(try_with(|_| ()).is_none(), "this thread already is an I/O thread");
        let shared = Shared::register()?;
        let reactor = match Reactor::new(config, &shared) {
            Ok(reactor) => reactor,
            Err(error) => {
                shared.unregister();
                return Err(error);
            }
        };
        let main =
            Arc::new(MainWaker { woken: AtomicBool::new(true), shared: Arc::clone(&shared) });
        let local = Rc::new(Local {
            shared,
            handle: RefCell::new(Weak::new()),
            ready: RefCell::default(),
            living: RefCell::default(),
            timers: RefCell::default(),
            reactor,
            main,
            poll: config.poll,
            scheduler,
            closing: Cell::new(false),
            quiet: Quiet::default(),
        });
        CURRENT.set(Some(Rc::clone(&local)));
        Ok(Entered { local })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.local.drop_all_tasks();
        self.local.reactor.close(&self.local);
        self.local.shared.unregister();
        // Nothing new can be sent now except by those who hold the shared part already; what came late is dropped here.
        self.local.shared.mailbox.drain(drop);
        let local = CURRENT.take();
        drop(local);
    }
}

impl Local {
    pub(crate) fn handle(&self) -> Option<Arc<Handle>> {
        self.handle.borrow().upgrade()
    }

    /// The virtual time, in simulation.
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
                self.quiet.note();
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

    /// In simulation the main future takes its turn among the tasks by chance.
    fn main_may_run(&self) -> bool {
        self.scheduler.as_ref().is_none_or(|s| self.ready.borrow().is_empty() || s.pick(2) == 0)
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
            // The main future's flag is published before the sleep flag is read, like a message.
            let timer = self.timers.borrow().next_deadline();
            let wait = match [timer, self.quiet.deadline()].into_iter().flatten().min() {
                _ if !self.is_idle() => Wait::No,
                Some(deadline) => Wait::Until(deadline),
                None => Wait::Forever,
            };
            self.reactor.turn(wait);
            self.shared.mailbox.awake();
            self.quiet.slept();
        }
    }

    /// Looks for completions for a while instead of sleeping; true when there was something.
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
        self.ready.borrow().is_empty() && !self.main.woken.load(Ordering::Acquire)
    }

    /// How many tasks are ready to run.
    pub(crate) fn ready_tasks(&self) -> usize {
        self.ready.borrow().len()
    }

    fn run_ready(&self) {
        for _ in 0..BUDGET {
            let Some(task) = self.ready.borrow_mut().pop_front() else { break };
            self.quiet.note();
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
            waker.wake();
        }
    }

    /// One step of the simulation: one ready task, or else the next event in virtual time.
    fn simulated_turn(self: &Rc<Self>, scheduler: &Scheduler) {
        let ready = self.ready.borrow().len();
        if ready > 0 {
            let task = self.ready.borrow_mut().swap_remove_back(scheduler.pick(ready));
            if let Some(task) = task {
                task.run();
            }
            return;
        }
        if self.main.woken.load(Ordering::Acquire) || !self.shared.mailbox.is_empty() {
            return;
        }
        // Real sockets are quicker than virtual time.
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
                let living = self.living.borrow().count;
                panic!(
                    "deadlock at {:?}: the main future and {living} tasks wait, and nothing can wake them",
                    scheduler.now()
                );
            }
        }
        self.fire_timers();
    }

    pub(crate) fn take_mail(self: &Rc<Self>) {
        self.shared.mailbox.drain(|message| match message {
            Message::Run(task) => self.ready.borrow_mut().push_back(task),
            Message::Call(f) => {
                if !self.closing.get() {
                    f();
                }
            }
            Message::Complete(key, result) => self.reactor.complete(key, result),
            Message::Unregister(id, keep) => self.reactor.unregister_file(id, keep),
            Message::Nudge => self.main.woken.store(true, Ordering::Release),
        });
    }

    /// Drops all tasks, waiting for those that are on their way from another thread.
    fn drop_all_tasks(self: &Rc<Self>) {
        self.closing.set(true);
        loop {
            self.take_mail();
            // Waking a task puts its runnable in the queue; dropping that drops the future.
            let wakers: Vec<Waker> =
                self.living.borrow_mut().wakers.iter_mut().filter_map(Option::take).collect();
            for waker in wakers {
                waker.wake();
            }
            loop {
                let task = self.ready.borrow_mut().pop_front();
                let Some(task) = task else { break };
                drop(task);
            }
            if self.living.borrow().count == 0 {
                break;
            }
            // A waker on another thread holds the runnable and is about to send it.
            std::thread::yield_now();
        }
    }

    fn schedule(shared: &Arc<Shared>, task: Runnable) {
        let mut task = Some(task);
        try_with(|local| {
            if Arc::ptr_eq(&local.shared, shared)
                && let Some(task) = task.take()
            {
                local.ready.borrow_mut().push_back(task);
            }
        });
        if let Some(task) = task {
            shared.send(Message::Run(task));
        }
    }
}

/// Counts a task as living while its future exists.
struct LivingTask {
    local: Rc<Local>,
    id: usize,
}

impl LivingTask {
    fn new(local: Rc<Local>) -> LivingTask {
        let mut living = local.living.borrow_mut();
        living.count += 1;
        let id = living.free.pop().unwrap_or_else(|| {
            living.wakers.push(None);
            living.wakers.len() - 1
        });
        drop(living);
        LivingTask { local, id }
    }
}

impl Drop for LivingTask {
    fn drop(&mut self) {
        let mut living = self.local.living.borrow_mut();
        living.count -= 1;
        living.free.push(self.id);
        let waker = living.wakers[self.id].take();
        drop(living);
        drop(waker);
    }
}

/// Starts a task on the current I/O thread. Dropping the handle cancels it; a panic resumes where the handle is awaited.
///
/// # Panics
/// When the caller is not on an I/O thread.
pub fn spawn<F: Future + 'static>(future: F) -> Task<F::Output> {
    let local = current();
    let shared = Arc::clone(&local.shared);
    let guard = LivingTask::new(Rc::clone(&local));
    let id = guard.id;
    let body = async move {
        let guard = guard;
        let output = future.await;
        drop(guard);
        output
    };
    let schedule = move |task| Local::schedule(&shared, task);
    // SAFETY: the future is not `Send`, so its runnable must only be run and dropped here. `schedule` puts it in this
    // thread's queue or mailbox; both are emptied only by this thread, which does not leave its context before all
    // futures are gone (`drop_all_tasks`). The future and the schedule function are `'static`, and the latter is `Send + Sync`.
    let (task, handle) = unsafe {
        async_task::Builder::new().propagate_panic(true).spawn_unchecked(|()| body, schedule)
    };
    local.living.borrow_mut().wakers[id] = Some(task.waker());
    task.schedule();
    handle
}

/// Waits until the file operations of this I/O thread whose futures were dropped so far have come to their end: what
/// they read from or write to may be used otherwise from then on.
pub async fn settled() {
    let mut keys = current().reactor.detached();
    while !keys.is_empty() {
        crate::sleep(Duration::from_millis(1)).await;
        let local = current();
        keys.retain(|key| local.reactor.is_in_flight(*key));
    }
}

/// Lets other tasks run.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
