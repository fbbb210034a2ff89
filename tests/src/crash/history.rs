//! A record of the requests to a disk and of their completions. The record can construct the oracle for any moment of the run.
//!
//! Each entry has the number of write boundaries that the disks together had passed when the entry was made. The oracle of a
//! power cut at a boundary replays the entries up to that boundary. The data of an operation that was issued before the
//! boundary may be on the disk. All writes of an operation that completed before the boundary were executed before this
//! boundary. Several threads add entries. The issue entry is added before an operation begins, and the completion entry
//! after the operation has ended.

use std::sync::{Arc, Mutex, PoisonError};

use oxblk_ring::sim::Disk;

use super::oracle::{CrashOracle, Ticket};
use crate::model::ops::Op;

/// One entry.
#[derive(Clone, Debug)]
enum Event {
    Issued(Op),
    /// The operation whose issue entry has this number has completed.
    Completed(usize),
}

/// The list of entries. Clones are handles to the same list.
#[derive(Clone)]
pub struct History {
    /// The disks that lose power together.
    disks: Vec<Disk>,
    entries: Arc<Mutex<Vec<(u64, Event)>>>,
}

impl History {
    /// Makes an empty history of disks that lose power together.
    pub fn new(disks: &[&Disk]) -> Self {
        Self { disks: disks.iter().copied().cloned().collect(), entries: Arc::default() }
    }

    fn note(&self, event: Event) -> usize {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // Read the boundary while the lock is held, so that the numbers never decrease.
        let passed = self.disks.iter().map(Disk::write_boundaries).sum();
        entries.push((passed, event));
        entries.len() - 1
    }

    /// Records that an operation is about to be issued. Returns the number of the entry.
    pub fn issue(&self, op: &Op) -> usize {
        self.note(Event::Issued(op.clone()))
    }

    /// Records that the operation of the issue entry `number` has completed without an error.
    pub fn complete(&self, number: usize) {
        self.note(Event::Completed(number));
    }

    /// Returns the number of issued operations.
    pub fn operations(&self) -> u64 {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().filter(|(_, event)| matches!(event, Event::Issued(_))).count() as u64
    }

    /// Starts a replay of the history from its beginning.
    pub fn replay(&self, start: CrashOracle) -> Replay {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let tickets = vec![None; entries.len()];
        Replay { entries, tickets, next: 0, oracle: start }
    }
}

/// A replay that has processed the entries of a history up to a boundary.
pub struct Replay {
    entries: Vec<(u64, Event)>,
    tickets: Vec<Option<Ticket>>,
    next: usize,
    oracle: CrashOracle,
}

impl Replay {
    /// Returns the oracle of the disk after a power cut at this boundary. The boundary must not be lower than the boundary of
    /// the previous call.
    pub fn at(&mut self, boundary: u64) -> &CrashOracle {
        while let Some((when, event)) = self.entries.get(self.next) {
            if *when > boundary {
                break;
            }
            match event {
                Event::Issued(op) => self.tickets[self.next] = Some(self.oracle.issue(op)),
                Event::Completed(number) => {
                    let issued = (&self.entries[*number].1, self.tickets[*number]);
                    let (Event::Issued(op), Some(ticket)) = issued else {
                        panic!("entry {number} completed and was not issued");
                    };
                    self.oracle.complete(op, ticket);
                }
            }
            self.next += 1;
        }
        &self.oracle
    }

    /// Returns the oracle of the disk after all entries of the history.
    pub fn at_the_end(&mut self) -> &CrashOracle {
        self.at(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use oxblk_ring::{File, IoBufMut, sim};

    use super::*;
    use crate::model::ops::content;

    #[test]
    fn a_power_cut_before_a_flush_may_lose_the_data() {
        let disk = Disk::new(1, 512);
        let history = History::new(&[&disk]);
        sim::run(1, async {
            let file = File::sim(&disk);
            let write = history.issue(&Op::Write { offset: 0, len: 512, seed: 3, fua: false });
            let mut data = IoBufMut::zeroed(512);
            data.copy_from_slice(&content(3, 0, 512));
            file.write_all_at(data.freeze(), 0, false).await.expect("a write");
            history.complete(write);
            let flush = history.issue(&Op::Flush);
            file.sync(true).await.expect("a flush");
            history.complete(flush);
        });
        assert_eq!(disk.write_boundaries(), 2);
        let mut replay = history.replay(CrashOracle::new(vec![0; 512].into()));
        assert_eq!(
            replay.at(1).check(&[0; 512]),
            Ok(()),
            "a power cut at this boundary precedes the flush"
        );
        assert_eq!(replay.at(1).check(&content(3, 0, 512)), Ok(()));
        assert!(replay.at(2).check(&[0; 512]).is_err());
        assert_eq!(replay.at_the_end().check(&content(3, 0, 512)), Ok(()));
    }
}
