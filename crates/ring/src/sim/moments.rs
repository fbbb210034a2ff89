//! Disks as they were at some of their write boundaries, for power cuts without a run of their own.

use std::sync::{Mutex, PoisonError, Weak};

use super::disk::{Disk, State};
use super::rng::Rng;

/// A fair sample of the boundaries that disks have passed. The disks keep it, so that it does not keep them.
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

    /// Before a boundary is passed: keeps the disks as they are, perhaps in place of an earlier moment. No disk is locked.
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
        let moment = (boundaries.first().copied().unwrap_or(0), disks);
        match sample.kept.get_mut(place) {
            Some(slot) => *slot = moment,
            None => sample.kept.push(moment),
        }
    }

    /// The moments kept, in order of the boundaries of the first disk.
    pub(super) fn kept(&self) -> Vec<(u64, Vec<Disk>)> {
        let sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = sample.kept.clone();
        kept.sort_by_key(|(boundary, _)| *boundary);
        kept
    }
}
