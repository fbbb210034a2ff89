//! Perturbation points: random yields and delays between the steps of lock-free code, for tests.
//!
//! A hand-over is code that passes data or a wake-up to another thread without a lock. Some races appear only if a
//! thread is delayed for milliseconds exactly between two steps of a hand-over. Therefore a hand-over calls [`point`]
//! between its steps. After a test has called `start`, each call of `point` returns immediately, yields, spins or
//! sleeps, at random. The seed also chooses about one in eight points. At a chosen point, half of the calls sleep for
//! 0.5 to 3 ms, up to 100 calls: some races appear only if one point has long delays and the other points have none.
//!
//! Points exist only in builds with the feature `perturb`, which the test crates enable. In all other builds `point`
//! is an empty function. A point never suspends a task: it delays the thread, as a busy machine does.
//!
//! A program calls [`start_from_environment`] when it starts, so that tests can run the program with perturbation. In
//! builds with the feature, the environment variable `OXBLK_PERTURB` contains the seed.

/// A place between two steps of a hand-over.
#[cfg(not(feature = "perturb"))]
#[inline(always)]
pub fn point() {}

/// No effect: this build has no perturbation.
#[cfg(not(feature = "perturb"))]
pub fn start(_seed: u64) {}

/// No effect: this build has no perturbation.
#[cfg(not(feature = "perturb"))]
pub fn start_from_environment() {}

/// Turns perturbation off.
#[cfg(not(feature = "perturb"))]
pub fn stop() {}

#[cfg(feature = "perturb")]
pub use enabled::{point, start, start_from_environment, stop};

#[cfg(feature = "perturb")]
mod enabled {
    use std::cell::Cell;
    use std::panic::Location;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    use std::time::Duration;

    /// The seed of the delays; zero while perturbation is off.
    static SEED: AtomicU64 = AtomicU64::new(0);
    /// Number of slow calls since perturbation was turned on, by hash of the point.
    static SLOW: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
    /// Maximum number of slow calls of a point.
    const MAX_SLOW: u64 = 100;
    /// Counter that gives each thread its own random sequence.
    static THREADS: AtomicU64 = AtomicU64::new(1);

    thread_local! {
        /// The seed with which the random sequence of the thread started, and the state of the sequence.
        static STATE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    }

    /// Turns perturbation on for the whole process. The seed determines which points are slow. The delays of a run
    /// cannot be reproduced exactly, because the kernel schedules the threads.
    pub fn start(seed: u64) {
        SLOW.iter().for_each(|count| count.store(0, Relaxed));
        SEED.store(seed | 1, Relaxed);
    }

    /// Turns perturbation on if the environment variable `OXBLK_PERTURB` contains a seed.
    pub fn start_from_environment() {
        let seed = std::env::var("OXBLK_PERTURB").ok();
        if let Some(seed) = seed.and_then(|seed| seed.parse().ok()) {
            start(seed);
        }
    }

    /// Turns perturbation off.
    pub fn stop() {
        SEED.store(0, Relaxed);
    }

    /// A place between two steps of a hand-over: does nothing, yields, spins or sleeps.
    #[inline]
    #[track_caller]
    pub fn point() {
        let seed = SEED.load(Relaxed);
        if seed != 0 {
            let random = next(seed);
            if is_slow(seed, Location::caller(), random) {
                std::thread::sleep(Duration::from_micros(500 + (random >> 9) % 2500));
            } else {
                delay(random);
            }
        }
    }

    /// Whether this call is slow: the seed has chosen the point, `random` has chosen the call, and the point has had
    /// fewer than [`MAX_SLOW`] slow calls.
    fn is_slow(seed: u64, point: &Location<'_>, random: u64) -> bool {
        let place = [u64::from(point.line()), u64::from(point.column()), point.file().len() as u64];
        let mix = |hash: u64, part: u64| {
            (hash ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        };
        let hash = place.into_iter().fold(seed, mix);
        let is_chosen = hash >> 13 & 7 == 0 && random >> 8 & 1 == 0;
        let count = usize::try_from(hash >> 20 & 63).ok().and_then(|index| SLOW.get(index));
        is_chosen && count.is_some_and(|count| count.fetch_add(1, Relaxed) < MAX_SLOW)
    }

    /// The next number of the random sequence of the thread (xorshift64*).
    fn next(seed: u64) -> u64 {
        STATE.with(|state| {
            let (begun_with, mut x) = state.get();
            if begun_with != seed {
                let thread = THREADS.fetch_add(1, Relaxed);
                x = seed ^ thread.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            }
            x ^= x >> 12;
            x ^= x << 25;
            x ^= x >> 27;
            state.set((seed, x));
            x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
        })
    }

    /// Of 256 calls, 200 return immediately, 40 yield, 12 spin, 3 sleep for up to 100 µs and one sleeps for 0.5 to 3
    /// ms.
    #[cold]
    fn delay(random: u64) {
        match random % 256 {
            0 => std::thread::sleep(Duration::from_micros(500 + (random >> 8) % 2500)),
            1..4 => std::thread::sleep(Duration::from_micros((random >> 8) % 100)),
            4..16 => (0..(random >> 8) % 2000).for_each(|_| std::hint::spin_loop()),
            16..56 => std::thread::yield_now(),
            _ => {}
        }
    }
}
