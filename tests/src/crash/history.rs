//! What was asked of a disk and what it answered, so that the oracle can be had for any moment.
//!
//! Each entry tells how many write boundaries of the disk had been passed when it was made. The oracle
//! of a cut at a boundary is the replay of the entries made up to it: what was issued by then may be on
//! the disk, and what had completed by then was carried out by no later boundary. Entries are made from
//! several threads, an issue before its operation begins and a completion after it has ended.

use std::sync::{Arc, Mutex, PoisonError};

use oxblk_ring::sim::Disk;

use super::oracle::{CrashOracle, Ticket};
use crate::model::ops::Op;

/// One entry.
#[derive(Clone, Debug)]
enum Event {
    Issued(Op),
    /// The operation issued by the entry of this number.
    Completed(usize),
}

/// The entries so far; cloning makes another handle to the same ones.
#[derive(Clone)]
pub struct History {
    disk: Disk,
    entries: Arc<Mutex<Vec<(u64, Event)>>>,
}

impl History {
    /// An empty history of what happens to `disk`.
    pub fn new(disk: &Disk) -> Self {
        Self { disk: disk.clone(), entries: Arc::default() }
    }

    fn note(&self, event: Event) -> usize {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that the numbers never fall.
        entries.push((self.disk.write_boundaries(), event));
        entries.len() - 1
    }

    /// An operation is about to be issued; gives its number.
    pub fn issue(&self, op: &Op) -> usize {
        self.note(Event::Issued(op.clone()))
    }

    /// The operation of this number has completed without an error.
    pub fn complete(&self, number: usize) {
        self.note(Event::Completed(number));
    }

    /// The operations issued.
    pub fn operations(&self) -> u64 {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().filter(|(_, event)| matches!(event, Event::Issued(_))).count() as u64
    }

    /// Goes through the history from its beginning.
    pub fn replay(&self, start: CrashOracle) -> Replay {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let tickets = vec![None; entries.len()];
        Replay { entries, tickets, next: 0, oracle: start }
    }
}

/// A history under way.
pub struct Replay {
    entries: Vec<(u64, Event)>,
    tickets: Vec<Option<Ticket>>,
    next: usize,
    oracle: CrashOracle,
}

impl Replay {
    /// What the disk may hold after a cut at this boundary, which is not before the one asked for last.
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

    /// What the disk may hold once everything has been done.
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
    fn a_cut_before_a_flush_knows_nothing_of_it() {
        let disk = Disk::new(1, 512);
        let history = History::new(&disk);
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
        assert_eq!(replay.at(1).check(&[0; 512]), Ok(()), "the flush had not been carried out");
        assert_eq!(replay.at(1).check(&content(3, 0, 512)), Ok(()));
        assert!(replay.at(2).check(&[0; 512]).is_err());
        assert_eq!(replay.at_the_end().check(&content(3, 0, 512)), Ok(()));
    }
}
