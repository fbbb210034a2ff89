//! Copies of disks before some of their write boundaries, so that a test of power cuts needs only one run.

use std::sync::{Mutex, PoisonError, Weak};

use super::disk::{Disk, State};
use super::rng::Rng;

/// A uniform sample of the boundaries that disks have passed. The disks own the sample, which has weak references to
/// the disks.
pub(super) struct Moments {
    disks: Vec<Weak<Mutex<State>>>,
    most: usize,
    sample: Mutex<Sample>,
}

struct Sample {
    rng: Rng,
    seen: usize,
    kept: Vec<(u64, Vec<Disk>)>,
}

impl Moments {
    pub(super) fn new(disks: Vec<Weak<Mutex<State>>>, seed: u64, most: usize) -> Moments {
        let sample = Sample { rng: Rng::new(seed), seen: 0, kept: Vec::new() };
        Moments { disks, most, sample: Mutex::new(sample) }
    }

    /// Records a boundary that a disk is about to pass. If the boundary is chosen, copies the disks. If `most`
    /// boundaries already have copies, these copies replace the copies of an earlier boundary. The caller must not hold
    /// the lock of a disk.
    pub(super) fn pass(&self) {
        let mut sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        sample.seen += 1;
        let seen = sample.seen;
        let place =
            if sample.kept.len() < self.most { sample.kept.len() } else { sample.rng.index(seen) };
        if place >= self.most {
            return;
        }
        let disks = self.disks.iter().filter_map(Weak::upgrade);
        let (boundaries, disks): (Vec<u64>, _) = disks.map(|disk| Disk::keep(&disk)).unzip();
        let moment = (boundaries.into_iter().sum(), disks);
        match sample.kept.get_mut(place) {
            Some(slot) => *slot = moment,
            None => sample.kept.push(moment),
        }
    }

    /// The copies, in the order in which they were made.
    pub(super) fn kept(&self) -> Vec<(u64, Vec<Disk>)> {
        let sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = sample.kept.clone();
        kept.sort_by_key(|(boundary, _)| *boundary);
        kept
    }
}
