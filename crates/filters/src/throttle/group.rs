//! A throttle group: limits that several nodes share.
//!
//! Requests that may not pass at once wait in a queue of their node, one queue for reads and one for writes. One waiting
//! request of each direction has the turn: it waits until the buckets let it pass, adds its units to the buckets, and gives
//! the turn to the next node. So the nodes take turns, and the requests of a node keep their order. All I/O threads may use a
//! group.
//!
//! While a node is drained, its requests do not wait. Their units are added to the buckets too, so later requests wait longer.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{
    AtomicBool, AtomicIsize, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::select;
use oxblk_ring::{Event, now, sleep};

use super::bucket::{Bucket, as_f64};
use super::limits::GroupLimits;

/// Whether a request reads or writes. Zero writes and discards are writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// A read.
    Read,
    /// A write.
    Write,
}

impl Direction {
    /// The buckets of a request with this direction, as positions in [`GroupLimits::buckets`]: requests, then bytes.
    fn buckets(self) -> [usize; 4] {
        match self {
            Self::Read => [0, 1, 3, 4],
            Self::Write => [0, 2, 3, 5],
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }
}

/// Identifies a node in its group.
type MemberId = u64;

/// Limits that several nodes share.
#[derive(Debug)]
pub struct Group {
    name: String,
    is_limited: AtomicBool,
    next_member: AtomicU64,
    state: Mutex<State>,
    /// The limits have changed.
    changed: Event,
}

#[derive(Debug)]
struct State {
    limits: GroupLimits,
    buckets: [Bucket; 6],
    /// The time at which the buckets last leaked.
    leaked: Duration,
    /// The waiting reads, and the waiting writes.
    queues: [Queue; 2],
}

/// The waiting requests of one direction.
#[derive(Debug, Default)]
struct Queue {
    /// The nodes with waiting requests, in the order of their identifiers.
    members: Vec<(MemberId, VecDeque<Arc<Ticket>>)>,
    /// Whether a waiting request has the turn.
    is_taken: bool,
}

/// A waiting request.
#[derive(Debug, Default)]
struct Ticket {
    has_turn: AtomicBool,
    turn: Event,
}

impl Queue {
    fn push(&mut self, member: MemberId, ticket: &Arc<Ticket>) {
        match self.members.binary_search_by_key(&member, |(id, _)| *id) {
            Ok(at) => {
                if let Some((_, waiting)) = self.members.get_mut(at) {
                    waiting.push_back(Arc::clone(ticket));
                }
            }
            Err(at) => self.members.insert(at, (member, VecDeque::from([Arc::clone(ticket)]))),
        }
    }

    fn remove(&mut self, member: MemberId, ticket: &Arc<Ticket>) {
        if let Ok(at) = self.members.binary_search_by_key(&member, |(id, _)| *id)
            && let Some((_, waiting)) = self.members.get_mut(at)
        {
            waiting.retain(|other| !Arc::ptr_eq(other, ticket));
            if waiting.is_empty() {
                self.members.remove(at);
            }
        }
    }

    /// The first request of the node that follows `member`.
    fn after(&self, member: MemberId) -> Option<&Arc<Ticket>> {
        let next = self.members.iter().find(|(id, _)| *id > member);
        next.or_else(|| self.members.first()).and_then(|(_, waiting)| waiting.front())
    }

    /// Gives the turn to the first request of the node that follows `member`. The caller notifies the returned ticket after it has
    /// unlocked the group: a notification may run code of the executor that wakes the request.
    #[must_use]
    fn give_turn_to_next_node(&mut self, member: MemberId) -> Option<Arc<Ticket>> {
        let next = self.after(member).cloned();
        self.is_taken = next.is_some();
        if let Some(next) = &next {
            next.has_turn.store(true, Relaxed);
        }
        next
    }
}

impl State {
    fn leak(&mut self) {
        let now = now();
        let elapsed = now.saturating_sub(self.leaked);
        self.leaked = now;
        for bucket in &mut self.buckets {
            bucket.leak(elapsed);
        }
    }

    /// Adds the units of a request if it may pass now. Otherwise returns the time to wait.
    fn pass(&mut self, direction: Direction, bytes: u64) -> Result<(), Duration> {
        self.leak();
        let own = direction.buckets();
        let waits = own.iter().filter_map(|at| self.buckets.get(*at)).map(Bucket::wait);
        let wait = waits.max().unwrap_or_default();
        if !wait.is_zero() {
            return Err(wait);
        }
        self.add_units(direction, bytes);
        Ok(())
    }

    /// Adds the units of a request.
    fn add_units(&mut self, direction: Direction, bytes: u64) {
        let size = self.limits.iops_size;
        let requests = if size > 0 && bytes > size { as_f64(bytes) / as_f64(size) } else { 1.0 };
        let units = [requests, requests, as_f64(bytes), as_f64(bytes)];
        for (at, units) in direction.buckets().into_iter().zip(units) {
            if let Some(bucket) = self.buckets.get_mut(at) {
                bucket.add_units(units);
            }
        }
    }

    fn queue(&mut self, direction: Direction) -> Option<&mut Queue> {
        self.queues.get_mut(direction.index())
    }
}

impl Group {
    /// A group with the identifier `name` of its object.
    pub fn new(name: &str, limits: GroupLimits) -> Arc<Self> {
        let state = State {
            limits,
            buckets: limits.buckets.map(Bucket::new),
            leaked: now(),
            queues: Default::default(),
        };
        Arc::new(Self {
            name: name.to_owned(),
            is_limited: AtomicBool::new(limits.is_limited()),
            next_member: AtomicU64::new(0),
            state: Mutex::new(state),
            changed: Event::new(),
        })
    }

    /// The identifier of the group's object.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the group has any limit.
    pub fn is_limited(&self) -> bool {
        self.is_limited.load(Relaxed)
    }

    /// The limits.
    pub fn limits(&self) -> GroupLimits {
        self.lock().limits
    }

    /// Changes the limits. All buckets are empty afterwards. Requests that wait use the new limits.
    pub fn set_limits(&self, limits: GroupLimits) {
        let mut state = self.lock();
        state.limits = limits;
        state.buckets = limits.buckets.map(Bucket::new);
        state.leaked = now();
        self.is_limited.store(limits.is_limited(), Relaxed);
        drop(state);
        self.changed.notify(usize::MAX);
    }

    /// Wakes the waiting requests of a node, which is drained.
    fn release(&self, member: MemberId) {
        let state = self.lock();
        let queues = state.queues.iter().flat_map(|queue| &queue.members);
        let own = queues.filter(|(id, _)| *id == member);
        let tickets: Vec<_> = own.flat_map(|(_, waiting)| waiting).cloned().collect();
        drop(state);
        for ticket in tickets {
            ticket.turn.notify(usize::MAX);
        }
        // A request that has the turn may wait for the buckets.
        self.changed.notify(usize::MAX);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A node that is in a group.
#[derive(Debug)]
pub struct Member {
    group: Arc<Group>,
    id: MemberId,
    /// The number of drains whose requests pass this node. During a drain, the limits do not hold for the node.
    drains: Arc<AtomicIsize>,
}

impl Member {
    /// Adds a node to the group.
    pub fn new(group: Arc<Group>) -> Self {
        Self::in_drains(group, Arc::default())
    }

    /// Moves a node to another group.
    #[must_use]
    pub fn moved_to(&self, group: Arc<Group>) -> Self {
        Self::in_drains(group, Arc::clone(&self.drains))
    }

    fn in_drains(group: Arc<Group>, drains: Arc<AtomicIsize>) -> Self {
        let id = group.next_member.fetch_add(1, Relaxed);
        Self { group, id, drains }
    }

    /// Lets the waiting requests of the node pass, and all its requests until [`Self::end_drain`].
    pub fn begin_drain(&self) {
        self.drains.fetch_add(1, SeqCst);
        self.group.release(self.id);
    }

    /// Undoes [`Self::begin_drain`].
    pub fn end_drain(&self) {
        self.drains.fetch_sub(1, SeqCst);
    }

    fn is_drained(&self) -> bool {
        self.drains.load(SeqCst) > 0
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Lets a request of `bytes` bytes pass now. Returns `false` if the request must wait ([`Self::admit`]).
    pub fn try_admit(&self, direction: Direction, bytes: u64) -> bool {
        !self.group.is_limited() || self.pass_now(&mut self.group.lock(), direction, bytes)
    }

    /// Waits until a request of `bytes` bytes may pass. If the returned future is dropped earlier, the request no longer waits.
    pub async fn admit(&self, direction: Direction, bytes: u64) {
        if !self.group.is_limited() {
            return;
        }
        let Some(waiting) = self.enter(direction, bytes) else { return };
        waiting.turn().await;
        loop {
            let changed = self.group.changed.listen();
            if self.is_drained() {
                self.group.lock().add_units(direction, bytes);
                return;
            }
            let passed = self.group.lock().pass(direction, bytes);
            match passed {
                Ok(()) => return,
                Err(wait) => {
                    select(pin!(sleep(wait)), pin!(changed)).await;
                }
            }
        }
    }

    /// Lets the request pass if the node is drained, or if no request waits and the buckets let the request pass.
    fn pass_now(&self, state: &mut State, direction: Direction, bytes: u64) -> bool {
        if self.is_drained() {
            state.add_units(direction, bytes);
            return true;
        }
        let is_first = state.queue(direction).is_none_or(|queue| !queue.is_taken);
        is_first && state.pass(direction, bytes).is_ok()
    }

    /// Lets the request pass at once, or puts it into the queue.
    fn enter(&self, direction: Direction, bytes: u64) -> Option<Waiting<'_>> {
        let mut state = self.group.lock();
        if self.pass_now(&mut state, direction, bytes) {
            return None;
        }
        let ticket = Arc::<Ticket>::default();
        let queue = state.queue(direction)?;
        queue.push(self.id, &ticket);
        if !queue.is_taken {
            queue.is_taken = true;
            ticket.has_turn.store(true, Relaxed);
        }
        Some(Waiting { member: self, direction, ticket })
    }
}

/// A request in the queue. Dropping this value removes the request, and gives the turn to the next request if this request has
/// the turn.
struct Waiting<'a> {
    member: &'a Member,
    direction: Direction,
    ticket: Arc<Ticket>,
}

impl Waiting<'_> {
    /// Waits until this request has the turn.
    async fn turn(&self) {
        loop {
            let turn = self.ticket.turn.listen();
            if self.ticket.has_turn.load(Relaxed) || self.member.is_drained() {
                return;
            }
            turn.await;
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.member.group.lock();
        let next = state.queue(self.direction).and_then(|queue| {
            queue.remove(self.member.id, &self.ticket);
            let had_turn = self.ticket.has_turn.load(Relaxed);
            if had_turn { queue.give_turn_to_next_node(self.member.id) } else { None }
        });
        drop(state);
        if let Some(next) = next {
            next.turn.notify(usize::MAX);
        }
    }
}
