//! Copies of disks through the library, on simulated disks that fail.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oxblk::copy::{Copy, CopyError, CopyOptions, Observer, Stage, run};
use oxblk_core::{Backend, Errno, Error, Graph, Perm, Permissions, WriteFlags};
use oxblk_ring::IoBuf;
use oxblk_ring::sim::{self, Disk, FailRule, FaultOp, Faults};
use oxblk_tests::sim_disk::{self, Pace};

const KIB: u64 = 1024;

fn backend(graph: &Graph, name: &str, disk: &Disk) -> Backend {
    let node = sim_disk::add(graph, name, disk, false, Pace::AtOnce).unwrap();
    let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    Backend::new(graph, "", node, permissions).unwrap()
}

/// Returns bytes that depend on their offset. No byte is zero.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at / 512 % 255).unwrap() + 1).collect()
}

/// Makes every operation of one kind in a range of the disk fail.
fn fail(disk: &Disk, op: FaultOp, range: Range<u64>, errno: i32) {
    let rule = FailRule { op, nth: None, range: Some(range), errno, once: false };
    disk.set_faults(Faults { fail: vec![rule], ..Faults::default() });
}

#[derive(Default)]
struct Heard(Mutex<Vec<u64>>);

impl Observer for Heard {
    fn salvaged(&self, offset: u64, error: &Error) {
        assert_eq!(error.raw_errno(), Errno::IO);
        self.0.lock().unwrap().push(offset);
    }
}

/// Copies `sources` to `target` without a progress observer.
fn copy(seed: u64, sources: &[Disk], target: &Disk, options: CopyOptions) -> Result<(), CopyError> {
    copy_watched(seed, sources, target, options, Arc::new(()), false)
}

fn copy_watched(
    seed: u64,
    sources: &[Disk],
    target: &Disk,
    options: CopyOptions,
    observer: Arc<dyn Observer>,
    stop: bool,
) -> Result<(), CopyError> {
    sim::run(seed, async move {
        let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
        let into = backend(&graph, "target", target);
        let named = sources.iter().enumerate();
        let from = named.map(|(i, disk)| backend(&graph, &format!("source{i}"), disk)).collect();
        let stop = Arc::new(AtomicBool::new(stop));
        run(Copy { sources: from, range: None, target: into, options, observer, stop }, &[]).await
    })
}

#[test]
fn several_sources_are_joined_with_padding_to_whole_sectors() {
    let (a, b) = (pattern(3000), pattern(200_000));
    let sources = [Disk::from_bytes(3, &a), Disk::from_bytes(4, &b)];
    let mut expected = a;
    expected.resize(3072, 0);
    expected.extend(&b);
    expected.resize(3072 + 200_192, 0);
    for options in [
        CopyOptions { target_is_zero: true, ..CopyOptions::default() },
        CopyOptions { chunk: 4096, parallel: 3, ..CopyOptions::default() },
        CopyOptions { sparse: 0, chunk: 512, ..CopyOptions::default() },
    ] {
        // The copy must replace the old contents of the target, unless the options say that the target is empty.
        let old = if options.target_is_zero { 0 } else { 0xff };
        let target = Disk::from_bytes(2, &vec![old; expected.len()]);
        copy(7, &sources, &target, options.clone()).unwrap();
        assert!(target.bytes() == expected, "{options:?}");
    }
}

#[test]
fn a_failed_read_ends_the_copy_and_the_error_has_its_offset() {
    let source = Disk::from_bytes(1, &pattern(256 << 10));
    fail(&source, FaultOp::Read, 100 * KIB..101 * KIB, Errno::IO);
    let options = CopyOptions { chunk: 64 << 10, ..CopyOptions::default() };
    let failure = copy(7, &[source], &Disk::new(2, 256 * KIB), options).unwrap_err();
    assert_eq!((failure.stage, failure.offset), (Stage::Reading, 64 * KIB));
    assert_eq!(failure.to_string(), "error while reading at byte 65536: Input/output error");
}

#[test]
fn a_failed_write_ends_the_copy_and_the_error_has_its_offset() {
    let target = Disk::new(2, 256 * KIB);
    fail(&target, FaultOp::Write, 100 * KIB..101 * KIB, Errno::NOSPC);
    let options = CopyOptions { chunk: 64 << 10, ..CopyOptions::default() };
    let source = Disk::from_bytes(1, &pattern(256 << 10));
    let failure = copy(7, &[source], &target, options).unwrap_err();
    assert_eq!((failure.stage, failure.offset), (Stage::Writing, 64 * KIB));
    assert_eq!(failure.to_string(), "error while writing at byte 65536: No space left on device");
}

#[test]
fn of_several_failures_the_one_at_the_lowest_offset_is_reported() {
    for seed in 0..20 {
        let target = Disk::new(seed, 512 * KIB);
        let range = Some(100 * KIB..512 * KIB);
        let fail = vec![FailRule {
            op: FaultOp::Write,
            nth: None,
            range,
            errno: Errno::NOSPC,
            once: false,
        }];
        let delay = Duration::ZERO..Duration::from_millis(1);
        target.set_faults(Faults { fail, delay: delay.clone(), ..Faults::default() });
        let source = Disk::from_bytes(!seed, &pattern(512 << 10));
        source.set_faults(Faults { delay, ..Faults::default() });
        let options = CopyOptions { chunk: 16 << 10, parallel: 12, ..CopyOptions::default() };
        let failure = copy(seed, &[source], &target, options).unwrap_err();
        assert_eq!((failure.stage, failure.offset), (Stage::Writing, 96 * KIB), "seed {seed}");
    }
}

#[test]
fn a_copy_between_failing_disks_reports_an_error_or_is_complete() {
    let faulty = |fail_rate| Faults {
        fail_rate,
        short_reads: 0.1,
        short_writes: 0.1,
        delay: Duration::ZERO..Duration::from_millis(1),
        ..Faults::default()
    };
    let (mut whole, mut failed) = (0, 0);
    for seed in 0..60 {
        let mut bytes = pattern(192 << 10);
        bytes[50 << 10..70 << 10].fill(0);
        let (source, target) = (Disk::from_bytes(seed, &bytes), Disk::new(!seed, 192 * KIB));
        source.set_faults(faulty(0.01));
        target.set_faults(faulty(0.01));
        let options = CopyOptions { chunk: 8 << 10, parallel: 4, ..CopyOptions::default() };
        match copy(seed, &[source], &target, options) {
            Ok(()) => {
                assert!(target.bytes() == bytes, "seed {seed}: a whole copy differs");
                whole += 1;
            }
            Err(failure) => {
                assert_eq!(failure.error.raw_errno(), Errno::IO, "seed {seed}: {failure}");
                assert_ne!(failure.stage, Stage::Stopped, "seed {seed}: the copy was not stopped");
                failed += 1;
            }
        }
    }
    assert!(whole >= 5 && failed >= 5, "both must be met: {whole} whole, {failed} failed");
}

#[test]
fn salvage_writes_zeroes_for_exactly_the_unreadable_ranges() {
    let bytes = pattern(256 << 10);
    let source = Disk::from_bytes(1, &bytes);
    fail(&source, FaultOp::Read, 100 * KIB..101 * KIB, Errno::IO);
    let target = Disk::from_bytes(2, &vec![0xff; 256 << 10]);
    let options = CopyOptions { salvage: true, ..CopyOptions::default() };
    let heard = Arc::new(Heard::default());
    let observer: Arc<dyn Observer> = Arc::<Heard>::clone(&heard);
    copy_watched(7, &[source], &target, options, observer, false).unwrap();
    let mut expected = bytes;
    expected[100 << 10..101 << 10].fill(0);
    assert!(target.bytes() == expected);
    assert_eq!(*heard.0.lock().unwrap(), [100 * KIB, 100 * KIB + 512]);
}

#[test]
fn a_stopped_copy_writes_nothing_more() {
    let (source, target) = (Disk::from_bytes(1, &pattern(256 << 10)), Disk::new(2, 256 * KIB));
    let options = CopyOptions::default();
    let outcome = copy_watched(7, &[source], &target, options, Arc::new(()), true);
    assert_eq!(outcome.unwrap_err().stage, Stage::Stopped);
    assert!(target.bytes().iter().all(|byte| *byte == 0));
}

#[test]
fn a_stopped_copy_never_reports_success_if_it_is_incomplete() {
    let mut bytes = pattern(16 << 10);
    bytes[8 << 10..].fill(0);
    let slow = || Faults {
        delay: Duration::from_millis(1)..Duration::from_millis(2),
        ..Faults::default()
    };
    for tenth in 0..60 {
        // The source has no holes, so the copy finds zeroes only by reading the data.
        let source = Disk::from_bytes(1, &vec![1; 16 << 10]);
        let target = Disk::from_bytes(2, &vec![0xff; 16 << 10]);
        let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
        let stop = Arc::new(AtomicBool::new(false));
        let outcome = sim::run(tenth, async {
            let from = backend(&graph, "source", &source);
            from.write(0, IoBuf::from(bytes.clone()), WriteFlags::empty()).await.unwrap();
            source.set_faults(slow());
            target.set_faults(slow());
            let later = Arc::clone(&stop);
            let stopper = oxblk_ring::spawn(async move {
                oxblk_ring::sleep(Duration::from_micros(tenth * 100)).await;
                later.store(true, Relaxed);
            });
            let copy = Copy {
                sources: vec![from],
                range: None,
                target: backend(&graph, "target", &target),
                options: CopyOptions { parallel: 1, ..CopyOptions::default() },
                observer: Arc::new(()),
                stop: Arc::clone(&stop),
            };
            let outcome = run(copy, &[]).await;
            stopper.await;
            outcome
        });
        match outcome {
            Ok(()) => assert!(target.bytes() == bytes, "stopped after {tenth} tenths of a ms"),
            Err(failure) => assert_eq!(failure.stage, Stage::Stopped),
        }
    }
}
