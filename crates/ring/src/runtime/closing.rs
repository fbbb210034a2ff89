//! Makes a thread an I/O thread, and closes the I/O thread at the end.
//!
//! Closing has three steps. Guards in futures rely on the order of these steps:
//!
//! 1. operations on sockets are cancelled, and **all operations in flight are awaited, before any task is dropped**:
//!    a guard that lives in a task (a range lock, reserved clusters) is released only after the host has finished the
//!    operations that it guards;
//! 2. tasks are dropped. Their destructors may start operations. These operations are awaited too, as in the first
//!    step, until no task and no operation is left;
//! 3. the thread ceases to be an I/O thread, its mailbox is closed, and the remaining messages are dropped.
//!
//! No panic unwinds out of closing, because destructors and wakers run in [`contained`].

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use super::Config;
use super::foreign::contained;
use super::idle_trim::IdleTrim;
use super::local::{CURRENT, Local, MainWaker, try_with};
use super::shared::Shared;
use crate::perturb;
use crate::reactor::Reactor;
use crate::sim::Scheduler;

/// The thread is an I/O thread while this value exists.
pub(super) struct Entered {
    pub(super) local: Rc<Local>,
}

impl Entered {
    pub(super) fn new(config: &Config, scheduler: Option<Scheduler>) -> io::Result<Entered> {
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
            tasks: super::tasks::Tasks::default(),
            timers: RefCell::default(),
            reactor,
            main,
            poll: config.poll,
            scheduler,
            idle_trim: IdleTrim::default(),
        });
        CURRENT.set(Some(Rc::clone(&local)));
        Ok(Entered { local })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let local = &self.local;
        local.shared.begin_to_close();
        loop {
            local.reactor.finish(local);
            local.take_mail();
            local.tasks.drop_some();
            if local.tasks.living() > 0 {
                // A waker on another thread may have a runnable that it has not yet sent.
                std::thread::yield_now();
            } else if !local.reactor.is_busy() {
                break;
            }
        }
        perturb::point();
        local.reactor.release_memory();
        local.shared.unregister();
        let current = CURRENT.take();
        perturb::point();
        // No task is left and no operation is in flight. So the remaining messages are wake-ups, calls that do not run,
        // and files that the ring unregisters when the ring is dropped.
        for message in local.shared.mailbox.close() {
            contained(|| drop(message));
        }
        contained(|| drop(current));
    }
}
