//! The rules of a node: what happens at an event, and which requests fail.
//!
//! The node has a state, a number that is 1 at first. A rule belongs to an event, and applies in one state or in all states. If
//! several rules apply at an event, the newest rule acts first. All of them act in the state before the event.
//!
//! An error becomes active at its event. The errors that one event makes active replace all errors that were active before. A
//! request fails with the first active error that fits its type and range. The error stays active, unless its rule acts only once.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oxblk_core::DebugEvent;

use super::breakpoints::{Breakpoint, Suspended};

/// The state at first.
const FIRST_STATE: i64 = 1;
/// The state of a rule that applies in all states.
pub(super) const ANY_STATE: i64 = 0;
const SECTOR: u64 = 512;

bitflags::bitflags! {
    /// Types of requests.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) struct IoType: u8 {
        const Read = 1;
        const Write = 2;
        const WriteZeroes = 4;
        const Discard = 8;
        const Flush = 16;
        const BlockStatus = 32;
    }
}

impl IoType {
    /// The types of a rule that names none.
    pub(super) const DEFAULT: Self = Self::all().difference(Self::BlockStatus);

    pub(super) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "read" => Self::Read,
            "write" => Self::Write,
            "write-zeroes" => Self::WriteZeroes,
            "discard" => Self::Discard,
            "flush" => Self::Flush,
            "block-status" => Self::BlockStatus,
            _ => return None,
        })
    }
}

/// An error for requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Inject {
    pub(super) io: IoType,
    /// The sector that a request must access. `None`: any.
    pub(super) sector: Option<u64>,
    pub(super) once: bool,
    pub(super) fault: Fault,
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    /// The request waits for this time.
    pub(super) delay: Duration,
    /// The error. 0: the request succeeds.
    pub(super) errno: i32,
    /// The request fails before other tasks run.
    pub(super) is_immediate: bool,
}

/// What a rule does at its event.
#[derive(Debug)]
pub(super) enum Action {
    Inject(Inject),
    SetState(i64),
    Suspend(Breakpoint),
}

/// A rule.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) event: DebugEvent,
    pub(super) state: i64,
    pub(super) action: Action,
}

/// The rules and the state of a node.
#[derive(Debug)]
pub(super) struct Rules(Mutex<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    /// The newest rule is last. Each rule has a number.
    rules: Vec<(u64, Rule)>,
    next: u64,
    state: i64,
    /// The active errors with the numbers of their rules. The error that is tried first is last.
    active: Vec<(u64, Inject)>,
    pub(super) suspended: Suspended,
    /// The number of drains in progress. During a drain, no request waits for a delay or a breakpoint.
    pub(super) drains: u32,
}

impl Rules {
    pub(super) fn new(rules: Vec<Rule>) -> Self {
        let mut inner = Inner {
            rules: Vec::new(),
            next: 0,
            state: FIRST_STATE,
            active: Vec::new(),
            suspended: Suspended::default(),
            drains: 0,
        };
        for rule in rules {
            inner.add(rule);
        }
        Self(Mutex::new(inner))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies the rules of an event. Waits while breakpoints suspend the caller.
    pub(super) async fn apply_event(&self, event: DebugEvent) {
        let hits = self.lock().apply_event(event);
        self.wait_for_resume(hits).await;
    }

    /// What happens to a request, if an active error fits it. `len` is 0 for a flush.
    pub(super) fn fault(&self, io: IoType, offset: u64, len: u64) -> Option<Fault> {
        self.lock().fault(io, offset, len)
    }
}

impl Inner {
    pub(super) fn add(&mut self, rule: Rule) {
        self.rules.push((self.next, rule));
        self.next = self.next.wrapping_add(1);
    }

    /// Removes the breakpoints with a name. Returns whether there was one.
    pub(super) fn remove_breakpoints(&mut self, tag: &str) -> bool {
        let before = self.rules.len();
        self.rules.retain(|(_, rule)| match &rule.action {
            Action::Suspend(breakpoint) => breakpoint.tag != tag,
            Action::Inject(_) | Action::SetState(_) => true,
        });
        self.rules.len() < before
    }

    /// Applies the rules of an event. Returns the breakpoints that suspend the caller.
    fn apply_event(&mut self, event: DebugEvent) -> Vec<Breakpoint> {
        let applies = |rule: &Rule, state| {
            rule.event == event && (rule.state == ANY_STATE || rule.state == state)
        };
        let mut state = self.state;
        let (mut injected, mut hits) = (Vec::new(), Vec::new());
        for (number, rule) in self.rules.iter().rev().filter(|(_, rule)| applies(rule, self.state))
        {
            match &rule.action {
                Action::Inject(inject) => injected.push((*number, inject.clone())),
                Action::SetState(new) => state = *new,
                Action::Suspend(_) if self.drains > 0 => {}
                Action::Suspend(breakpoint) => hits.push((*number, breakpoint.clone())),
            }
        }
        if !injected.is_empty() {
            self.active = injected;
        }
        self.state = state;
        // A breakpoint suspends one request.
        self.rules.retain(|(number, _)| !hits.iter().any(|(hit, _)| hit == number));
        hits.into_iter().map(|(_, breakpoint)| breakpoint).collect()
    }

    fn fault(&mut self, io: IoType, offset: u64, len: u64) -> Option<Fault> {
        let end = offset.saturating_add(len);
        let fits = |inject: &Inject| {
            let inside = inject
                .sector
                .is_none_or(|sector| (offset..end).contains(&sector.saturating_mul(SECTOR)));
            inside && inject.io.intersects(io)
        };
        let (number, inject) = self.active.iter().rev().find(|(_, inject)| fits(inject))?;
        let (number, inject) = (*number, inject.clone());
        if inject.fault.errno == 0 && inject.fault.delay.is_zero() {
            return None;
        }
        if inject.once {
            self.active.retain(|(other, _)| *other != number);
            self.rules.retain(|(other, _)| *other != number);
        }
        Some(inject.fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: DebugEvent = DebugEvent::ReadAio;

    fn error(errno: i32, state: i64) -> Rule {
        let fault = Fault { delay: Duration::ZERO, errno, is_immediate: false };
        let inject = Inject { io: IoType::DEFAULT, sector: None, once: false, fault };
        Rule { event: EVENT, state, action: Action::Inject(inject) }
    }

    fn state(state: i64, new: i64) -> Rule {
        Rule { event: EVENT, state, action: Action::SetState(new) }
    }

    fn once(mut rule: Rule) -> Rule {
        if let Action::Inject(inject) = &mut rule.action {
            inject.once = true;
        }
        rule
    }

    fn at(mut rule: Rule, sector: u64) -> Rule {
        if let Action::Inject(inject) = &mut rule.action {
            inject.sector = Some(sector);
        }
        rule
    }

    fn inner(rules: Vec<Rule>) -> Inner {
        Rules::new(rules).0.into_inner().unwrap()
    }

    fn read(inner: &mut Inner) -> i32 {
        inner.apply_event(EVENT);
        inner.fault(IoType::Read, 0, 512).map_or(0, |fault| fault.errno)
    }

    #[test]
    fn an_error_stays_active_until_another_event_replaces_it() {
        let mut other = error(12, ANY_STATE);
        other.event = DebugEvent::WriteAio;
        let mut inner = inner(vec![error(28, ANY_STATE), other]);
        assert_eq!(inner.fault(IoType::Read, 0, 512), None);
        assert_eq!(read(&mut inner), 28);
        assert_eq!(inner.fault(IoType::Discard, 0, 512).map(|fault| fault.errno), Some(28));
        inner.apply_event(DebugEvent::WriteAio);
        assert_eq!(inner.fault(IoType::Flush, 0, 0).map(|fault| fault.errno), Some(12));
        assert_eq!(inner.fault(IoType::BlockStatus, 0, 512), None);
    }

    #[test]
    fn errors_that_act_once_follow_one_another_in_their_order() {
        let mut inner = inner(vec![once(error(1, ANY_STATE)), once(error(2, ANY_STATE))]);
        assert_eq!([(); 3].map(|()| read(&mut inner)), [1, 2, 0]);
    }

    #[test]
    fn rules_act_in_the_state_before_the_event() {
        let mut first = inner(vec![error(5, 1), error(28, 2), state(ANY_STATE, 2), state(2, 1)]);
        assert_eq!([(); 3].map(|()| read(&mut first)), [5, 28, 28]);
        let mut second = inner(vec![error(5, 2), state(1, 2), state(2, 1)]);
        // The error of the second event stays active.
        assert_eq!([(); 4].map(|()| read(&mut second)), [0, 5, 5, 5]);
    }

    #[test]
    fn an_error_in_a_sector_concerns_only_requests_that_access_the_sector() {
        let mut inner = inner(vec![at(error(5, ANY_STATE), 8)]);
        inner.apply_event(EVENT);
        let mut fails = |offset, len| inner.fault(IoType::Read, offset, len).is_some();
        assert!(fails(4096, 512) && fails(0, 4097) && fails(4096, 1));
        assert!(!fails(0, 4096) && !fails(4608, 512) && !fails(0, 0));
    }
}
