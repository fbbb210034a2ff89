//! Test of an idle I/O thread: it frees its memory and does not wake.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::fs;
use std::time::{Duration, Instant};

use oxblk_ring::{Config, IoBufMut, IoThread, spawn};

const MIB: usize = 1 << 20;

/// Reads a number from `/proc/self/…/status`.
fn status(path: &str, field: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// This file has only one test, because the threads of other tests would keep the process busy.
#[test]
fn an_idle_thread_frees_its_cached_memory_and_is_not_woken_again() {
    // A sanitizer does not return freed memory, so skip the test. A sanitizer is recognised by its shadow memory: more than
    // 1 TiB of address space.
    if status("/proc/self/status", "VmSize:") > 1 << 30 {
        return;
    }
    let anonymous = || status("/proc/self/status", "RssAnon:") << 10;
    let thread = IoThread::start("idle", Config::default()).unwrap();
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
    assert!(kept >= before + 10 * MIB as u64, "no freed memory is kept for reuse: {before} {kept}");
    until("the memory is freed", || anonymous() <= before + slack);
    let task = format!("/proc/{}/status", task.display());
    let slept = || status(&task, "voluntary_ctxt_switches:");
    // The timer of the last idle check may still wake the thread once.
    std::thread::sleep(Duration::from_secs(2));
    let settled = slept();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(slept(), settled, "the idle thread was woken without work");
    // The thread still works, and becomes idle again.
    thread.spawn(work).wait().unwrap();
    until("the memory is freed again", || anonymous() <= before + slack);
}
