//! What an I/O thread costs that has nothing to do.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::fs;
use std::time::{Duration, Instant};

use oxblk_ring::{Config, IoBufMut, IoThread, spawn};

const MIB: usize = 1 << 20;

/// A number of `/proc/self/…/status`.
fn status(path: &str, field: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One test, since the threads of others would keep the process from falling quiet.
#[test]
fn a_quiet_thread_gives_its_memory_back_and_is_not_woken_again() {
    // The shadow of a sanitizer (it takes terabytes of addresses) and what it keeps of freed memory are not ours.
    if status("/proc/self/status", "VmSize:") > 1 << 30 {
        return;
    }
    let anonymous = || status("/proc/self/status", "RssAnon:") << 10;
    let thread = IoThread::start("quiet", Config::default()).unwrap();
    let work = || {
        let bufs: Vec<_> = (0..12).map(|_| IoBufMut::filled(MIB, 1)).collect();
        let small: Vec<_> = (0..100).map(|_| IoBufMut::filled(64 << 10, 1)).collect();
        async move {
            spawn(async move { drop((bufs, small)) }).await;
            fs::read_link("/proc/thread-self").unwrap()
        }
    };
    let before = anonymous();
    let task = thread.spawn(work).wait().unwrap();
    let (kept, slack) = (anonymous(), 2 * MIB as u64);
    assert!(kept >= before + 10 * MIB as u64, "nothing is kept for reuse: {before} {kept}");
    until("the memory is given back", || anonymous() <= before + slack);
    let task = format!("/proc/{}/status", task.display());
    let slept = || status(&task, "voluntary_ctxt_switches:");
    // One wake-up may be left over from the last look.
    std::thread::sleep(Duration::from_secs(2));
    let settled = slept();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(slept(), settled, "the thread was woken for nothing");
    // It still works, and does all of it once more.
    thread.spawn(work).wait().unwrap();
    until("the memory is given back again", || anonymous() <= before + slack);
}
