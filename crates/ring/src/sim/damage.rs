//! Damage of the medium: faults that the disk does not report when they happen.

use std::ops::Range;

use super::faults::{FaultOp, Trigger};
use super::media::{Media, SECTOR};
use super::rng::Rng;

/// A fault of the medium. The operation that it hits reports success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// One sector of a write gets other content than the data. Reads return this content until the sector is written
    /// again.
    Corruption,
    /// One sector of a write cannot be read: every read of it fails with `EIO` until the complete sector is written
    /// again.
    LatentError,
    /// A write changes the bytes at another offset, and not those at its own offset. `to` is the other offset. `None`:
    /// the seed of the disk chooses a multiple of 512 bytes from the write's offset.
    MisdirectedWrite {
        /// The offset of the first byte that changes.
        to: Option<u64>,
    },
    /// A read returns the bytes at another offset. `from` is the other offset. `None`: the seed of the disk chooses a
    /// multiple of 512 bytes from the read's offset.
    MisdirectedRead {
        /// The offset of the first byte that is returned.
        from: Option<u64>,
    },
}

impl Damage {
    /// The kind of the operations that have this fault.
    fn op(self) -> FaultOp {
        match self {
            Damage::Corruption | Damage::LatentError | Damage::MisdirectedWrite { .. } => {
                FaultOp::Write
            }
            Damage::MisdirectedRead { .. } => FaultOp::Read,
        }
    }
}

/// A rule that makes operations damage the medium, or return wrong data. A condition that is `None` always holds.
#[derive(Clone, Debug)]
pub struct DamageRule {
    /// The fault. It chooses the kind of operation: reads or writes.
    pub damage: Damage,
    /// Only the n-th (counted from 1) and later ones of the operations that satisfy the other conditions.
    pub nth: Option<u64>,
    /// Only operations that touch these bytes. A sector is corrupted or becomes unreadable only inside this range.
    pub range: Option<Range<u64>>,
    /// The probability of the fault in each operation that satisfies the conditions. 1 means always.
    pub chance: f64,
    /// Whether only one operation has the fault.
    pub once: bool,
}

impl DamageRule {
    /// A rule without conditions.
    pub fn always(damage: Damage) -> DamageRule {
        DamageRule { damage, nth: None, range: None, chance: 1.0, once: false }
    }
}

/// A rule, and the state of its conditions.
pub(super) struct ArmedDamage {
    rule: DamageRule,
    trigger: Trigger,
}

impl ArmedDamage {
    pub(super) fn new(rule: DamageRule) -> ArmedDamage {
        let trigger = Trigger::new(rule.damage.op(), rule.nth, rule.range.clone(), rule.once);
        ArmedDamage { rule, trigger }
    }

    /// The damage of an operation, if the rule says so. `len` is the size of the disk in bytes.
    pub(super) fn damage_for(
        &mut self,
        op: FaultOp,
        touched: &Range<u64>,
        len: u64,
        rng: &mut Rng,
    ) -> Option<Hit> {
        if !self.trigger.is_met(op, touched) || !rng.chance(self.rule.chance) {
            return None;
        }
        let hit = match self.rule.damage {
            Damage::Corruption => Hit::Corrupts(self.sector(touched, rng)?),
            Damage::LatentError => Hit::Spoils(self.sector(touched, rng)?),
            Damage::MisdirectedWrite { to } => Hit::Moves(other_place(to, touched, len, rng)?),
            Damage::MisdirectedRead { from } => Hit::Moves(other_place(from, touched, len, rng)?),
        };
        self.trigger.fire();
        Some(hit)
    }

    /// One of the sectors that the operation touches in the range of the rule.
    fn sector(&self, touched: &Range<u64>, rng: &mut Rng) -> Option<u64> {
        let range = self.rule.range.clone().unwrap_or(0..u64::MAX);
        let (start, end) = (touched.start.max(range.start), touched.end.min(range.end));
        let (first, last) = (start / SECTOR, end.div_ceil(SECTOR));
        let count = last.checked_sub(first).filter(|count| *count > 0)?;
        first.checked_add(rng.below(count))
    }
}

/// The damage of one operation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hit {
    /// This sector gets other content.
    Corrupts(u64),
    /// This sector becomes unreadable.
    Spoils(u64),
    /// The operation uses the bytes from this offset on.
    Moves(u64),
}

impl Hit {
    /// The offset at which an operation reads or writes instead of `offset`.
    pub(super) fn place(self, offset: u64) -> u64 {
        match self {
            Hit::Moves(other) => other,
            Hit::Corrupts(_) | Hit::Spoils(_) => offset,
        }
    }

    /// Damages the sector after a write.
    pub(super) fn after_write(self, media: &mut Media, fua: bool, rng: &mut Rng) {
        match self {
            Hit::Corrupts(sector) => media.corrupt_written(sector, fua, rng),
            Hit::Spoils(sector) => media.spoil_written(sector, fua),
            Hit::Moves(_) => {}
        }
    }
}

/// The offset of an operation that goes to another place. `None` if the operation or the other place is not completely
/// inside the disk, or if there is no other place.
fn other_place(chosen: Option<u64>, touched: &Range<u64>, len: u64, rng: &mut Rng) -> Option<u64> {
    let count = touched.end.checked_sub(touched.start).filter(|count| *count > 0)?;
    let last = len.checked_sub(count).filter(|last| touched.start <= *last)?;
    let other = match chosen {
        Some(other) => other,
        None => {
            // The distance from the sector boundary stays the same.
            let within = touched.start % SECTOR;
            let places = last.checked_sub(within)? / SECTOR;
            // The place of the operation itself is left out.
            let number = rng.below(places);
            let number = if number < touched.start / SECTOR { number } else { number + 1 };
            if places == 0 {
                return None;
            }
            number * SECTOR + within
        }
    };
    (other <= last && other != touched.start).then_some(other)
}
