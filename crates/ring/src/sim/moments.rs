//! Copies of disks at some of their write boundaries, so that a test of power cuts needs one run only.

use std::sync::{Mutex, PoisonError, Weak};

use super::disk::{Disk, State};
use super::rng::Rng;

/// A uniform sample of the boundaries that disks have passed. The disks own it; it holds weak references to them.
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

    /// Called before a boundary is passed: copies the disks, possibly in place of an earlier copy. The caller holds
    /// no disk's lock.
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

    /// The copies kept, in order of the boundaries of the first disk.
    pub(super) fn kept(&self) -> Vec<(u64, Vec<Disk>)> {
        let sample = self.sample.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = sample.kept.clone();
        kept.sort_by_key(|(boundary, _)| *boundary);
        kept
    }
}
