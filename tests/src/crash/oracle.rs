//! The contents that a disk may have after a power cut.
//!
//! For each sector, the oracle keeps the versions that a power cut may leave: the last version that is known to survive a power
//! cut, and every version issued since. A completed flush protects the writes that had completed when the flush was issued. A
//! completed write with FUA is protected without a flush. A version is stored as the seed of its write, so a long history needs
//! little memory. Operations are aligned to sectors, and concurrent operations never touch the same sector.

use std::collections::BTreeSet;
use std::sync::Arc;

use oxblk_ring::is_zero;

use crate::model::ops::{Op, content};

/// Size of a sector in bytes. A disk writes a sector completely or not at all.
pub const SECTOR: u64 = 512;

/// The content of a sector.
#[derive(Clone, Copy, Debug)]
enum Content {
    /// The content at the beginning.
    Old,
    /// Zeroes.
    Zeroes,
    /// The data of a write with this seed.
    Seed(u64),
}

/// One change of a sector.
#[derive(Clone, Copy, Debug)]
struct Version {
    content: Content,
    /// Whether the sector may stay unchanged although the operation completed (a discard).
    optional: bool,
    /// The time at which the operation completed, on the oracle's clock.
    completed: Option<u64>,
}

/// The versions that each sector may have, oldest first. The first version is never optional.
#[derive(Clone, Debug)]
pub struct CrashOracle {
    sectors: Vec<Vec<Version>>,
    /// The sectors with more than one version.
    unsettled: BTreeSet<usize>,
    clock: u64,
    /// The content of the disk at the beginning.
    old: Arc<[u8]>,
}

/// An operation in flight. The caller returns the ticket when the operation completes.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    issued: u64,
}

fn sectors_of(op: &Op) -> std::ops::Range<usize> {
    let range = op.range();
    let slot = |position: u64| usize::try_from(position / SECTOR).expect("a small disk");
    slot(range.start)..slot(range.end)
}

impl CrashOracle {
    /// Makes the oracle of a disk with this flushed content. The length must be a multiple of the sector size.
    pub fn new(content: Arc<[u8]>) -> Self {
        let first = Version { content: Content::Old, optional: false, completed: Some(0) };
        let sectors = vec![vec![first]; content.len() / 512];
        Self { sectors, unsettled: BTreeSet::new(), clock: 0, old: content }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Records that an operation is about to be issued.
    pub fn issue(&mut self, op: &Op) -> Ticket {
        let version = match *op {
            Op::Write { seed, .. } | Op::WriteCompressed { seed, .. } => {
                Some((Content::Seed(seed), false))
            }
            Op::WriteZeroes { .. } => Some((Content::Zeroes, false)),
            Op::Discard { .. } => Some((Content::Zeroes, true)),
            Op::Read { .. } | Op::Status { .. } | Op::Flush => None,
        };
        if let Some((content, optional)) = version {
            for sector in sectors_of(op) {
                self.sectors[sector].push(Version { content, optional, completed: None });
                self.unsettled.insert(sector);
            }
        }
        Ticket { issued: self.tick() }
    }

    /// Records that an operation has completed without an error.
    pub fn complete(&mut self, op: &Op, ticket: Ticket) {
        let now = self.tick();
        match op {
            Op::Flush => self.make_durable(ticket.issued),
            _ if op.changes() => {
                for sector in sectors_of(op) {
                    if let Some(version) = self.sectors[sector].last_mut() {
                        version.completed = Some(now);
                    }
                    if matches!(op, Op::Write { fua: true, .. }) {
                        self.forget_before(sector, now);
                    }
                }
            }
            _ => {}
        }
    }

    /// Records that changes that completed at `mark` or earlier survive a power cut.
    fn make_durable(&mut self, mark: u64) {
        for sector in std::mem::take(&mut self.unsettled) {
            self.forget_before(sector, mark);
            if self.sectors[sector].len() > 1 {
                self.unsettled.insert(sector);
            }
        }
    }

    /// Drops the versions that a power cut cannot leave, because all changes that completed at `mark` or earlier survive it.
    fn forget_before(&mut self, sector: usize, mark: u64) {
        let versions = &mut self.sectors[sector];
        let durable = |version: &Version| {
            !version.optional && version.completed.is_some_and(|completed| completed <= mark)
        };
        if let Some(last) = versions.iter().rposition(durable) {
            versions.drain(..last);
        }
    }

    /// Does the same as [`complete`](CrashOracle::complete) for a disk without power cuts: the completed change becomes the
    /// only version.
    pub fn complete_for_good(&mut self, op: &Op, ticket: Ticket) {
        self.complete(op, ticket);
        if op.changes() {
            for sector in sectors_of(op) {
                self.forget_before(sector, self.clock);
            }
        }
    }

    fn holds(&self, version: &Version, start: usize, got: &[u8]) -> bool {
        match version.content {
            Content::Old => self.old[start..start + got.len()] == *got,
            Content::Zeroes => is_zero(got),
            Content::Seed(seed) => content(seed, start as u64, SECTOR) == got,
        }
    }

    /// Checks the content of the disk.
    ///
    /// # Errors
    /// A text with the first sector that has none of its possible versions, or with the wrong length.
    pub fn check(&self, disk: &[u8]) -> Result<(), String> {
        if disk.len() != self.old.len() {
            return Err(format!("the disk has {} bytes, not {}", disk.len(), self.old.len()));
        }
        for (index, got) in disk.chunks_exact(512).enumerate() {
            self.check_sector(index, got)?;
        }
        Ok(())
    }

    fn check_sector(&self, index: usize, got: &[u8]) -> Result<(), String> {
        let (start, versions) = (index * 512, &self.sectors[index]);
        if versions.iter().any(|version| self.holds(version, start, got)) {
            return Ok(());
        }
        let zero = if is_zero(got) { " (it is zero)" } else { "" };
        Err(format!(
            "sector {index} (byte {start:#x}) has none of its {} possible versions{zero}: {versions:?}",
            versions.len()
        ))
    }

    /// Checks the data of a read of whole sectors at `offset`, on a disk without power cuts. After the call, the only versions
    /// of these sectors are those that the read returned.
    ///
    /// # Errors
    /// The errors of [`check`](CrashOracle::check).
    pub fn observe(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let first = usize::try_from(offset / SECTOR).expect("a small disk");
        for (got, index) in bytes.chunks_exact(512).zip(first..) {
            self.check_sector(index, got)?;
            if self.sectors[index].len() > 1 {
                let versions = std::mem::take(&mut self.sectors[index]);
                let holds = |version: &Version| self.holds(version, index * 512, got);
                let held = versions
                    .into_iter()
                    .filter(holds)
                    .map(|version| Version { optional: false, ..version });
                self.sectors[index] = held.collect();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(offset: u64, seed: u64, fua: bool) -> Op {
        Op::Write { offset, len: 512, seed, fua }
    }

    fn run(oracle: &mut CrashOracle, op: &Op) {
        let ticket = oracle.issue(op);
        oracle.complete(op, ticket);
    }

    fn disk(seeds: [u64; 2]) -> Vec<u8> {
        [content(seeds[0], 0, 512), content(seeds[1], 512, 512)].concat()
    }

    #[test]
    fn an_unflushed_write_may_be_lost_and_a_flushed_write_may_not() {
        let mut oracle = CrashOracle::new(vec![0; 1024].into());
        run(&mut oracle, &write(0, 5, false));
        assert_eq!(oracle.check(&disk([5, 0])), Ok(()));
        assert_eq!(oracle.check(&disk([0, 0])), Ok(()));
        run(&mut oracle, &Op::Flush);
        assert_eq!(oracle.check(&disk([5, 0])), Ok(()));
        assert!(oracle.check(&disk([0, 0])).is_err());
    }

    #[test]
    fn a_write_in_flight_when_a_flush_begins_may_still_be_lost() {
        let mut oracle = CrashOracle::new(vec![0; 1024].into());
        let (late, flush) = (write(512, 7, false), Op::Flush);
        run(&mut oracle, &write(0, 5, false));
        let late_ticket = oracle.issue(&late);
        let flush_ticket = oracle.issue(&flush);
        oracle.complete(&late, late_ticket);
        oracle.complete(&flush, flush_ticket);
        assert_eq!(oracle.check(&disk([5, 0])), Ok(()));
        assert_eq!(oracle.check(&disk([5, 7])), Ok(()));
        assert!(oracle.check(&disk([0, 7])).is_err());
    }

    #[test]
    fn a_write_with_fua_is_durable_when_it_completes() {
        let mut oracle = CrashOracle::new(vec![0; 1024].into());
        let op = write(0, 5, true);
        let ticket = oracle.issue(&op);
        assert_eq!(oracle.check(&disk([0, 0])), Ok(()));
        oracle.complete(&op, ticket);
        assert!(oracle.check(&disk([0, 0])).is_err());
        assert_eq!(oracle.check(&disk([5, 0])), Ok(()));
    }

    #[test]
    fn a_discarded_sector_keeps_its_data_or_is_zero_even_after_a_flush() {
        let mut oracle = CrashOracle::new(disk([3, 3]).into());
        run(&mut oracle, &write(0, 5, false));
        run(&mut oracle, &Op::Discard { offset: 0, len: 512 });
        run(&mut oracle, &Op::Flush);
        assert_eq!(oracle.check(&disk([0, 3])), Ok(()));
        assert_eq!(oracle.check(&disk([5, 3])), Ok(()));
        assert!(oracle.check(&disk([3, 3])).is_err());
    }

    #[test]
    fn a_cancelled_change_may_be_present_or_absent_until_it_is_read() {
        let mut oracle = CrashOracle::new(vec![0; 1024].into());
        let cancelled = write(0, 5, false);
        oracle.issue(&cancelled);
        assert_eq!(oracle.check(&disk([5, 0])), Ok(()));
        assert_eq!(oracle.observe(0, &disk([0, 0])), Ok(()));
        assert!(oracle.check(&disk([5, 0])).is_err(), "the read has excluded this version");
    }

    #[test]
    fn a_completed_change_leaves_no_other_version_while_the_power_stays_on() {
        let mut oracle = CrashOracle::new(vec![0; 1024].into());
        let (cancelled, completed) = (write(0, 5, false), write(0, 7, false));
        oracle.issue(&cancelled);
        let ticket = oracle.issue(&completed);
        oracle.complete_for_good(&completed, ticket);
        assert_eq!(oracle.check(&disk([7, 0])), Ok(()));
        assert!(oracle.check(&disk([5, 0])).is_err());
        assert!(oracle.check(&disk([0, 0])).is_err());
    }
}
