//! Signals that ask a command to end.
//!
//! A command that must not stop halfway (`serve`, a copy) treats every signal whose default action would end the
//! process as a request to end in good order: finish what is in flight, close the images, remove the sockets.
//!
//! The same signal often arrives twice within moments: `timeout` signals its child and then its process group, and a terminal
//! that hangs up signals both the shell and its jobs. Therefore a repeated signal counts only [`REPEAT_AFTER`] the
//! first one. From then on SIGHUP, SIGINT, SIGQUIT and SIGTERM have their default action. A thread of its own
//! measures that time, so that it passes also when the command hangs.
//!
//! Signals that the parent process had set to be ignored stay ignored (`nohup`). SIGINT and SIGTERM are exceptions: a
//! shell without job control starts background commands with SIGINT ignored, and supervisors use it nevertheless.

use std::ffi::c_int;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR2, SIGVTALRM, SIGXCPU,
};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// Signals whose default action ends the process, and which are no fault of the program. SIGUSR1 is missing: the
/// tools show their progress. SIGPIPE and SIGXFSZ are missing: the call that causes them fails instead.
const ENDING: [c_int; 10] =
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU, SIGALRM, SIGVTALRM, SIGPROF, SIGUSR2, SIGIO];

/// Signals that end the process immediately when they are repeated. Signals of timers and limits are missing: they repeat
/// by themselves.
const INSISTENT: [c_int; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// After this time since the first signal, another signal ends the process immediately.
const REPEAT_AFTER: Duration = Duration::from_secs(1);

/// Sends a byte to a socket for each signal, until it is dropped.
pub(crate) type Delivery = SignalDelivery<UnixStream, SignalOnly>;

/// A flag that these signals set.
pub(crate) fn stop_flag() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    // A signal that cannot be caught keeps its default action.
    drop(catch(&stop, &[]));
    stop
}

/// Makes the signals of `ENDING`, and those of `more`, set `stop`. It works without free descriptors.
///
/// # Errors
/// If the system refuses.
pub(crate) fn catch(stop: &Arc<AtomicBool>, more: &[c_int]) -> io::Result<()> {
    let caught = signals_to_catch(more);
    let insistent = || caught.iter().filter(|signal| INSISTENT.contains(signal));
    let repeated = Arc::new(AtomicBool::new(false));
    // Handlers run in the order of registration: the first signal must find the flag clear.
    for &signal in insistent() {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&repeated))?;
    }
    for &signal in &caught {
        signal_hook::flag::register(signal, Arc::clone(stop))?;
    }
    if watch(&caught, Arc::clone(&repeated)).is_err() {
        // Nothing measures the time: the second signal ends the process whenever it comes.
        for &signal in insistent() {
            signal_hook::flag::register(signal, Arc::clone(&repeated))?;
        }
    }
    Ok(())
}

/// Makes the signals of `ENDING`, and those of `more`, send a byte to `to`. `from` is the other end of that socket. All
/// signals share the two descriptors.
///
/// # Errors
/// If the system refuses.
pub(crate) fn deliver(more: &[c_int], from: UnixStream, to: UnixStream) -> io::Result<Delivery> {
    SignalDelivery::with_pipe(from, to, SignalOnly, signals_to_catch(more))
}

/// Starts the thread that sets `repeated` some time after the first of these signals.
fn watch(caught: &[c_int], repeated: Arc<AtomicBool>) -> io::Result<()> {
    let (mut from, to) = UnixStream::pair()?;
    let delivery: Delivery = SignalDelivery::with_pipe(from.try_clone()?, to, SignalOnly, caught)?;
    let work = move || {
        let first = from.read_exact(&mut [0]);
        drop(delivery);
        if first.is_ok() {
            std::thread::sleep(REPEAT_AFTER);
            repeated.store(true, Relaxed);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(work).map(drop)
}

/// The signals to catch: not those that the parent process had set to be ignored.
fn signals_to_catch(more: &[c_int]) -> Vec<c_int> {
    let ignored = ignored_signals();
    let all = ENDING.iter().chain(more).copied();
    all.filter(|signal| matches!(*signal, SIGINT | SIGTERM) || !is_in(ignored, *signal)).collect()
}

/// The set of signals that this process ignores, one bit each. It is empty if it cannot be read.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn is_in(set: u64, signal: c_int) -> bool {
    let bit = signal.checked_sub(1).and_then(|bit| u32::try_from(bit).ok());
    bit.and_then(|bit| set.checked_shr(bit)).is_some_and(|bits| bits & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_found_in_a_set() {
        assert!(is_in(1, SIGHUP));
        assert!(!is_in(1, SIGINT));
        assert!(is_in(1 << (SIGIO - 1), SIGIO));
        assert!(!is_in(u64::MAX, 65));
        assert!(!is_in(u64::MAX, 0));
    }
}
