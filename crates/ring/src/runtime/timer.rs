//! The clock and the timers of an I/O thread.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::local::{self, Local};

/// Pending timers, ordered by deadline and then by creation.
#[derive(Default)]
pub(crate) struct Timers {
    pending: BTreeMap<(Duration, u64), Waker>,
    next_id: u64,
}

impl Timers {
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        self.pending.first_key_value().map(|((at, _), _)| *at)
    }

    /// Removes and returns one timer that is due.
    pub(crate) fn take_due(&mut self, now: Duration) -> Option<Waker> {
        let entry = self.pending.first_entry()?;
        (entry.key().0 <= now).then(|| entry.remove())
    }
}

/// Monotonic time since the first call in this process; virtual time inside [`sim::run`](crate::sim::run).
pub fn now() -> Duration {
    local::try_with(|local| local.virtual_now()).flatten().unwrap_or_else(real_now)
}

pub(crate) fn real_now() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// Waits for `d`.
///
/// # Panics
/// If awaited outside an I/O thread before `d` has passed.
pub async fn sleep(d: Duration) {
    Sleep { deadline: now().saturating_add(d), armed: None }.await;
}

/// One timer. It is armed at the first poll and disarmed when it is dropped.
struct Sleep {
    deadline: Duration,
    armed: Option<(Rc<Local>, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let deadline = self.deadline;
        if now() >= deadline {
            return Poll::Ready(());
        }
        let (local, id) = self.armed.get_or_insert_with(|| {
            let local = local::current();
            let mut timers = local.timers.borrow_mut();
            timers.next_id += 1;
            let id = timers.next_id;
            drop(timers);
            (local, id)
        });
        let waker = cx.waker().clone();
        let old = local.timers.borrow_mut().pending.insert((deadline, *id), waker);
        drop(old);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((local, id)) = &self.armed {
            let old = local.timers.borrow_mut().pending.remove(&(self.deadline, *id));
            drop(old);
        }
    }
}

/// The time limit of [`timeout`] has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("timed out")
    }
}

impl std::error::Error for Elapsed {}

/// Runs `f`, and drops `f` if it has not completed after `d`.
///
/// # Errors
/// [`Elapsed`] if `d` has passed before `f` completed.
pub async fn timeout<F: Future>(d: Duration, f: F) -> Result<F::Output, Elapsed> {
    let mut f = pin!(f);
    let mut sleep = pin!(sleep(d));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(value) = f.as_mut().poll(cx) {
            return Poll::Ready(Ok(value));
        }
        sleep.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}
