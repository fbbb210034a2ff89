//! Turns perturbation on during a run with several threads.

use std::sync::{Mutex, PoisonError};

use oxblk_ring::perturb;

/// The number of current runs in this process that need perturbation.
static RUNS: Mutex<usize> = Mutex::new(0);

/// Perturbation is on as long as a value of this type exists.
#[derive(Debug)]
pub struct Perturbed(());

impl Perturbed {
    /// Turns perturbation on. If no other run exists, the seed and `what` choose the delays.
    pub fn new(seed: u64, what: &str) -> Self {
        let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let seed = what.bytes().fold(seed, hash);
        let mut runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
        if *runs == 0 {
            perturb::start(seed);
        }
        *runs += 1;
        Self(())
    }
}

impl Drop for Perturbed {
    fn drop(&mut self) {
        let mut runs = RUNS.lock().unwrap_or_else(PoisonError::into_inner);
        *runs -= 1;
        if *runs == 0 {
            perturb::stop();
        }
    }
}
