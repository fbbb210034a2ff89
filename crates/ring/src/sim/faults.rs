//! Faults of a simulated disk.

use std::ops::Range;
use std::time::Duration;

use super::damage::DamageRule;

/// Kinds of operations to which a [`FailRule`] applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOp {
    /// All operations except closing.
    Any,
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Allocating, zeroing and punching holes.
    Fallocate,
    /// Changes of size.
    Truncate,
    /// Flushes.
    Sync,
    /// Closing a handle.
    Close,
}

/// A rule that makes operations fail. A condition that is `None` always holds.
#[derive(Clone, Debug)]
pub struct FailRule {
    /// The kind of operation.
    pub op: FaultOp,
    /// Only the n-th (counted from 1) and later ones of the operations that satisfy the other conditions.
    pub nth: Option<u64>,
    /// Only operations that touch these bytes.
    pub range: Option<Range<u64>>,
    /// The error, for example `libc::ENOSPC`.
    pub errno: i32,
    /// Whether the rule makes only one operation fail.
    pub once: bool,
}

/// The behaviour of a simulated disk. By default no operation fails, and operations take 10 µs to 1 ms.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Probability that a read of several bytes is cut short.
    pub short_reads: f64,
    /// Probability that a write of several bytes is cut short.
    pub short_writes: f64,
    /// The duration of operations in virtual time. Each operation gets a random duration in this range, so operations
    /// complete out of order.
    pub delay: Range<Duration>,
    /// Operations that fail and have no effect.
    pub fail: Vec<FailRule>,
    /// Operations that take effect, but report an error.
    pub fail_late: Vec<FailRule>,
    /// Probability that an operation other than a close fails with `EIO` and has no effect.
    pub fail_rate: f64,
    /// Operations that succeed, but damage the medium or return wrong data. The first rule that applies to an operation
    /// takes effect.
    pub damage: Vec<DamageRule>,
}

impl Default for Faults {
    fn default() -> Self {
        Faults {
            short_reads: 0.0,
            short_writes: 0.0,
            delay: Duration::from_micros(10)..Duration::from_millis(1),
            fail: Vec::new(),
            fail_late: Vec::new(),
            fail_rate: 0.0,
            damage: Vec::new(),
        }
    }
}

/// A rule, and the state of its conditions.
pub(super) struct ArmedRule {
    errno: i32,
    trigger: Trigger,
}

impl ArmedRule {
    pub(super) fn new(rule: FailRule) -> ArmedRule {
        let trigger = Trigger::new(rule.op, rule.nth, rule.range, rule.once);
        ArmedRule { errno: rule.errno, trigger }
    }

    /// The error of this operation, if the rule makes it fail.
    pub(super) fn errno_for(&mut self, op: FaultOp, touched: &Range<u64>) -> Option<i32> {
        self.trigger.is_met(op, touched).then(|| {
            self.trigger.fire();
            self.errno
        })
    }
}

/// The conditions of a rule, and the number of operations that satisfied them (without `nth`).
pub(super) struct Trigger {
    op: FaultOp,
    nth: Option<u64>,
    range: Option<Range<u64>>,
    once: bool,
    hits: u64,
    has_fired: bool,
}

impl Trigger {
    pub(super) fn new(
        op: FaultOp,
        nth: Option<u64>,
        range: Option<Range<u64>>,
        once: bool,
    ) -> Trigger {
        Trigger { op, nth, range, once, hits: 0, has_fired: false }
    }

    /// Whether an operation satisfies the conditions. Counts the operation.
    pub(super) fn is_met(&mut self, op: FaultOp, touched: &Range<u64>) -> bool {
        let any = self.op == FaultOp::Any && op != FaultOp::Close;
        let kind = any || self.op == op;
        let place =
            self.range.as_ref().is_none_or(|r| r.start < touched.end && touched.start < r.end);
        if !kind || !place || (self.once && self.has_fired) {
            return false;
        }
        self.hits += 1;
        self.nth.is_none_or(|n| self.hits >= n)
    }

    /// Records that the rule took effect.
    pub(super) fn fire(&mut self) {
        self.has_fired = true;
    }
}
