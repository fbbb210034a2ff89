//! Accounting of the memory of one connection.
//!
//! The memory for the data of a client's requests is accounted here before it is used: the buffers of reads until the
//! reply has been sent, the payloads of writes as they arrive, and the receive blocks that contain payloads. Each
//! connection may hold [`ALLOWANCE`] bytes that are not part of the budget. More memory is taken from the [`Budget`],
//! if possible in multiples of [`STEP`], so that ordinary requests do not access the counters that all connections use.
//!
//! No connection waits for memory forever, for three reasons. Small requests need nothing from the budget. One
//! connection at a time may overdraw the budget. If a connection has taken memory from the budget and another
//! connection waits for memory, the first connection must make progress: if its client sends and receives too little
//! for [`ServerOptions::stall_timeout`], the first connection is [stalled](Account::is_stalled) and is closed.
//!
//! [`ServerOptions::stall_timeout`]: super::ServerOptions::stall_timeout

use super::MAX_REQUEST;
use super::budget::Budget;
use oxblk_ring::{EventListener, Task, sleep, spawn};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// Number of bytes that every connection may hold without taking memory from the budget.
pub(super) const ALLOWANCE: usize = 256 << 10;
/// While the budget has enough memory left, memory is taken in multiples of this number of bytes.
const STEP: usize = 256 << 10;
/// Maximum overdraft of the budget in bytes.
const MAX_OVERDRAFT: usize = MAX_REQUEST as usize + STEP;

/// If other connections wait for memory, the client of a connection must transfer at least this number of bytes in
/// every [`ServerOptions::stall_timeout`] (both directions together), or as many bytes as the connection has taken from
/// the budget if these are fewer.
///
/// [`ServerOptions::stall_timeout`]: super::ServerOptions::stall_timeout
const MIN_PROGRESS: usize = 1 << 20;

/// Number of bytes of memory that a buffer of `len` bytes takes from the pool.
pub(super) fn footprint(len: usize) -> usize {
    match len {
        0 => 0,
        1..=4096 => 4096,
        4097..=0x4000 => 16 << 10,
        0x4001..=0x1_0000 => 64 << 10,
        len => len,
    }
}

pub(super) struct Account {
    budget: Arc<Budget>,
    /// Time for which a client may hold memory without progress while other connections wait for memory.
    stall_timeout: Duration,
    held: Cell<usize>,
    granted: Cell<usize>,
    overdraft: Cell<usize>,
    waiting: Cell<bool>,
    /// Number of requests being executed.
    running: Cell<usize>,
    /// Bytes that the client has sent and received.
    progress: Cell<usize>,
    watched: Cell<bool>,
    /// The task that detects a stalled client. The task is cancelled when the account is dropped.
    watcher: RefCell<Option<Task<()>>>,
    stalled: Cell<bool>,
}

impl Account {
    pub(super) fn new(budget: Arc<Budget>, stall_timeout: Duration) -> Rc<Account> {
        Rc::new(Account {
            budget,
            stall_timeout,
            held: Cell::default(),
            granted: Cell::default(),
            overdraft: Cell::default(),
            waiting: Cell::default(),
            running: Cell::default(),
            progress: Cell::default(),
            watched: Cell::default(),
            watcher: RefCell::default(),
            stalled: Cell::default(),
        })
    }

    /// Number of bytes that the connection has taken from the budget, including the overdraft.
    fn taken(&self) -> usize {
        self.granted.get() + self.overdraft.get()
    }

    fn try_hold(&self, bytes: usize) -> bool {
        let held = self.held.get().saturating_add(bytes);
        let missing = held.saturating_sub(ALLOWANCE).saturating_sub(self.taken());
        if missing > 0 && !self.grow(missing) {
            return false;
        }
        self.held.set(held);
        true
    }

    fn grow(&self, missing: usize) -> bool {
        for bytes in [missing.next_multiple_of(STEP), missing] {
            if self.budget.take(bytes) {
                self.granted.set(self.granted.get() + bytes);
                return true;
            }
        }
        let after = self.overdraft.get().saturating_add(missing);
        let allowed =
            after <= MAX_OVERDRAFT && (self.overdraft.get() > 0 || self.budget.overdraw());
        if allowed {
            self.overdraft.set(after);
        }
        allowed
    }

    /// Takes `bytes` bytes more for the connection. Waits until the memory is available.
    pub(super) async fn hold(&self, bytes: usize) {
        if self.try_hold(bytes) {
            return;
        }
        let waiting = self.budget.wait();
        self.waiting.set(true);
        let mut listener: Option<EventListener> = None;
        poll_fn(|cx| {
            while !self.try_hold(bytes) {
                match &mut listener {
                    None => listener = Some(waiting.listen()),
                    Some(freed) => match Pin::new(freed).poll(cx) {
                        Poll::Ready(()) => listener = None,
                        Poll::Pending => return Poll::Pending,
                    },
                }
            }
            Poll::Ready(())
        })
        .await;
        self.waiting.set(false);
    }

    /// Releases `bytes` bytes.
    pub(super) fn release(&self, bytes: usize) {
        let held = self.held.get().saturating_sub(bytes);
        self.held.set(held);
        let need = held.saturating_sub(ALLOWANCE);
        let spare = self.taken().saturating_sub(need);
        let repaid = spare.min(self.overdraft.get());
        if repaid > 0 {
            self.overdraft.set(self.overdraft.get() - repaid);
            if self.overdraft.get() == 0 {
                self.budget.repay();
            }
        }
        let spare = spare - repaid;
        // Keep a part of the memory, so that the next request does not have to take memory from the budget again.
        let keep = match self.budget.is_short() {
            true => 0,
            false if held > ALLOWANCE / 2 => 2 * STEP,
            false => 0,
        };
        if spare > keep {
            self.granted.set(self.granted.get() - spare);
            self.budget.give_back(spare);
        } else if self.waiting.get() {
            self.budget.notify();
        }
    }

    /// Records that the client has sent or received `bytes` bytes.
    pub(super) fn progressed(&self, bytes: usize) {
        self.progress.set(self.progress.get().wrapping_add(bytes));
    }

    /// Whether the client has made too little progress while it held memory and other connections waited for memory.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled.get()
    }

    /// Records the number of requests that are being executed. If the connection has taken memory from the budget, this
    /// function also starts the task that wakes `waker` when the client is stalled.
    pub(super) fn watch(self: &Rc<Self>, running: usize, waker: &Waker) {
        self.running.set(running);
        if self.taken() == 0 || self.watched.replace(true) {
            return;
        }
        let (account, waker) = (Rc::downgrade(self), waker.clone());
        let period = self.stall_timeout;
        let watcher = async move {
            let mut seen = None;
            loop {
                sleep(period).await;
                let Some(account) = account.upgrade() else { return };
                if account.taken() == 0 {
                    account.watched.set(false);
                    return;
                }
                let now = account.blocked_at();
                if account.budget.is_short() && account.is_too_slow(seen, now) {
                    account.stalled.set(true);
                    return waker.wake_by_ref();
                }
                seen = now;
            }
        };
        self.watcher.replace(Some(spawn(watcher)));
    }

    /// The progress of the client, if the connection waits only for the client; otherwise `None`.
    fn blocked_at(&self) -> Option<usize> {
        let blocked = self.running.get() == 0 && !self.waiting.get();
        blocked.then(|| self.progress.get())
    }

    /// Whether the client made too little progress between two checks.
    fn is_too_slow(&self, before: Option<usize>, now: Option<usize>) -> bool {
        let (Some(before), Some(now)) = (before, now) else { return false };
        now.wrapping_sub(before) < self.taken().min(MIN_PROGRESS)
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if self.overdraft.get() > 0 {
            self.budget.repay();
        }
        self.budget.give_back(self.granted.get());
    }
}

/// The accounted bytes of one receive block. Each payload in the block refers to this value.
pub(super) struct Hold {
    account: Rc<Account>,
    bytes: usize,
}

impl Hold {
    pub(super) async fn new(account: &Rc<Account>, bytes: usize) -> Rc<Hold> {
        account.hold(bytes).await;
        Rc::new(Hold { account: Rc::clone(account), bytes })
    }

    /// The first memory of a connection. This memory does not exceed the allowance, so no waiting is needed.
    pub(super) fn first(account: &Rc<Account>, bytes: usize) -> Rc<Hold> {
        debug_assert!(account.held.get() + bytes <= ALLOWANCE, "more than the allowance");
        account.held.set(account.held.get() + bytes);
        Rc::new(Hold { account: Rc::clone(account), bytes })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.account.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const MIB: usize = 1 << 20;

    fn account(budget: &Arc<Budget>) -> Rc<Account> {
        Account::new(Arc::clone(budget), Duration::from_secs(30))
    }

    fn holds(account: &Account, bytes: usize) -> bool {
        account.hold(bytes).now_or_never().is_some()
    }

    #[test]
    fn holding_the_allowance_takes_nothing_from_the_budget() {
        let budget = Budget::new(0);
        let account = account(&budget);
        assert!(budget.overdraw());
        assert!(holds(&account, ALLOWANCE));
        assert!(!holds(&account, 1));
        account.release(ALLOWANCE);
        assert!(holds(&account, 1));
    }

    #[test]
    fn all_connections_but_one_stay_within_the_budget_and_return_all_memory() {
        let budget = Budget::new(4 * MIB);
        let accounts = [account(&budget), account(&budget), account(&budget)];
        assert!(holds(&accounts[0], 3 * MIB));
        // One connection may overdraw the budget. Another connection may do so only after the first one has repaid the
        // overdraft.
        assert!(holds(&accounts[1], 2 * MIB));
        assert!(!holds(&accounts[2], 2 * MIB));
        accounts[1].release(2 * MIB);
        assert!(holds(&accounts[2], 2 * MIB));
        assert!(budget.used() <= 4 * MIB);
        for (account, bytes) in accounts.iter().zip([3, 0, 2]) {
            account.release(bytes * MIB);
        }
        assert_eq!(budget.used(), 0);
        assert!(budget.overdraw(), "the overdraft was not repaid");
    }

    #[test]
    fn an_overdraft_is_limited() {
        let budget = Budget::new(0);
        let account = account(&budget);
        assert!(holds(&account, MAX_REQUEST as usize));
        assert!(!holds(&account, 4 * MIB));
    }

    #[test]
    fn a_connection_that_ends_returns_all_memory() {
        let budget = Budget::new(MIB);
        let first = account(&budget);
        assert!(holds(&first, 5 * MIB));
        drop(first);
        assert_eq!(budget.used(), 0);
        assert!(budget.overdraw());
    }

    #[test]
    fn repeated_requests_do_not_take_from_the_budget_each_time() {
        let budget = Budget::new(64 * MIB);
        let account = account(&budget);
        assert!(holds(&account, MIB));
        let used = budget.used();
        for _ in 0..10 {
            assert!(holds(&account, 64 << 10));
            account.release(64 << 10);
        }
        assert!(budget.used() <= used + STEP);
    }
}
