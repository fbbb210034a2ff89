//! Signals that stop a command.
//!
//! A command that must not stop halfway (`serve`, a copy) catches the usual signals whose default action ends the process
//! (`ENDING`). After such a signal, the command completes the requests in flight, closes the images and removes its sockets.
//!
//! The same signal often arrives twice within milliseconds: `timeout` signals its child and then its process group, and
//! a terminal that hangs up signals both the shell and its jobs. Therefore a repeated signal has no effect until the
//! time [`REPEAT_AFTER`] has passed since the first signal. After this time, SIGHUP, SIGINT, SIGQUIT and SIGTERM have
//! their default action. A separate thread measures the time, so this works also if the command hangs. If this thread
//! cannot be started, a repeated signal has its default action at any time.
//!
//! Signals that the parent process had set to be ignored stay ignored (`nohup`). SIGINT and SIGTERM are always caught:
//! a shell without job control starts background commands with SIGINT ignored, but supervisors end such commands with
//! SIGINT.

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

/// Signals whose default action ends the process. The list has no signals of faults in the program, no real-time signals,
/// SIGPWR or SIGSTKFLT. SIGUSR1 is not in the list, because it makes the tools print their progress. SIGPIPE and SIGXFSZ are
/// not in the list either: the system call that causes them fails instead.
const ENDING: [c_int; 10] =
    [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU, SIGALRM, SIGVTALRM, SIGPROF, SIGUSR2, SIGIO];

/// Signals that end the process immediately when they are repeated. Signals of timers and limits are not in the list,
/// because the kernel repeats them.
const ENDING_WHEN_REPEATED: [c_int; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// After this time since the first signal, another signal of `ENDING_WHEN_REPEATED` ends the process immediately.
const REPEAT_AFTER: Duration = Duration::from_secs(1);

/// Sends a byte to a socket for each signal, until the value is dropped.
pub(crate) type Delivery = SignalDelivery<UnixStream, SignalOnly>;

/// A flag that the signals of `ENDING` set.
pub(crate) fn stop_flag() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    catch_stop(&stop);
    stop
}

/// Makes the signals of `ENDING` set `stop`. A signal that cannot be caught keeps its default action.
pub(crate) fn catch_stop(stop: &Arc<AtomicBool>) {
    drop(catch(stop, &[]));
}

/// Makes the signals of `ENDING`, and those of `more`, set `stop`. Works without free descriptors.
///
/// # Errors
/// If a signal handler cannot be installed.
pub(crate) fn catch(stop: &Arc<AtomicBool>, more: &[c_int]) -> io::Result<()> {
    let caught = signals_to_catch(more);
    let insistent = || caught.iter().filter(|signal| ENDING_WHEN_REPEATED.contains(signal));
    let repeated = Arc::new(AtomicBool::new(false));
    // Handlers run in the order of registration. These handlers come first, so `repeated` is not set yet when the first
    // signal runs them.
    for &signal in insistent() {
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&repeated))?;
    }
    for &signal in &caught {
        signal_hook::flag::register(signal, Arc::clone(stop))?;
    }
    if watch(&caught, Arc::clone(&repeated)).is_err() {
        // Without the thread, a second signal ends the process at any time.
        for &signal in insistent() {
            signal_hook::flag::register(signal, Arc::clone(&repeated))?;
        }
    }
    Ok(())
}

/// Makes the signals of `ENDING`, and those of `more`, send a byte to `to`. `from` is the other end of the socket. All
/// signals share the two descriptors.
///
/// # Errors
/// If a signal handler cannot be installed.
pub(crate) fn deliver(more: &[c_int], from: UnixStream, to: UnixStream) -> io::Result<Delivery> {
    SignalDelivery::with_pipe(from, to, SignalOnly, signals_to_catch(more))
}

/// Starts the thread that sets `repeated` when [`REPEAT_AFTER`] has passed since the first of the signals `caught`.
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

/// The signals of `ENDING` and of `more`, without those that the parent process has set to be ignored. SIGINT and SIGTERM are
/// always included.
fn signals_to_catch(more: &[c_int]) -> Vec<c_int> {
    let ignored = ignored_signals();
    let all = ENDING.iter().chain(more).copied();
    all.filter(|signal| matches!(*signal, SIGINT | SIGTERM) || !is_in(ignored, *signal)).collect()
}

/// The set of signals that this process ignores, one bit each. Empty if `/proc/self/status` cannot be read.
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
