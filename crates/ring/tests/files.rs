//! Tests of files. After any sequence of operations, a file has the same bytes as a vector that models the file: with
//! every engine, with every `aio` and on the simulated disk.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use oxblk_ring::sim::{self, Disk, Faults};
use oxblk_ring::{
    Aio, Config, Engine, Falloc, File, IoBufMut, IoVecMut, block_on, block_on_with, is_zero, spawn,
};
use proptest::prelude::*;

/// The largest offset. It is small, so that operations overlap often.
const SPAN: u64 = 40_000;

#[derive(Clone, Debug)]
enum Step {
    Write {
        offset: u64,
        len: usize,
        byte: u8,
        fua: bool,
    },
    WriteVectored {
        offset: u64,
        lens: Vec<usize>,
        byte: u8,
    },
    Read {
        offset: u64,
        len: usize,
    },
    ReadVectored {
        offset: u64,
        lens: Vec<usize>,
    },
    /// Disjoint writes that are all in flight concurrently.
    Scatter {
        piece: usize,
        count: usize,
        byte: u8,
    },
    Sync(bool),
    SetLen(u64),
    Fallocate(Falloc, u64, u64),
    SeekExtent(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let lens = || proptest::collection::vec(0usize..9000, 0..6);
    let falloc = prop_oneof![
        Just(Falloc::Allocate),
        Just(Falloc::AllocateKeepSize),
        Just(Falloc::PunchHole),
        Just(Falloc::ZeroRange),
        Just(Falloc::ZeroRangeKeepSize),
    ];
    prop_oneof![
        (0..SPAN, 0usize..20_000, any::<u8>(), any::<bool>())
            .prop_map(|(offset, len, byte, fua)| Step::Write { offset, len, byte, fua }),
        (0..SPAN, lens(), any::<u8>()).prop_map(|(offset, lens, byte)| Step::WriteVectored {
            offset,
            lens,
            byte
        }),
        (0..SPAN, 0usize..90_000).prop_map(|(offset, len)| Step::Read { offset, len }),
        (0..SPAN, lens()).prop_map(|(offset, lens)| Step::ReadVectored { offset, lens }),
        (1usize..3000, 0usize..40, any::<u8>()).prop_map(|(piece, count, byte)| Step::Scatter {
            piece,
            count,
            byte
        }),
        any::<bool>().prop_map(Step::Sync),
        (0..SPAN).prop_map(Step::SetLen),
        (falloc, 0..SPAN, 1u64..20_000)
            .prop_map(|(mode, offset, len)| Step::Fallocate(mode, offset, len)),
        (0..SPAN).prop_map(Step::SeekExtent),
    ]
}

/// Bytes whose values depend on their position.
fn pattern(byte: u8, len: usize) -> Vec<u8> {
    (0u8..=255).cycle().map(|i| i.wrapping_mul(byte | 1)).take(len).collect()
}

fn write_model(model: &mut Vec<u8>, offset: usize, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    let end = offset + data.len();
    model.resize(model.len().max(end), 0);
    model[offset..end].copy_from_slice(data);
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

async fn apply(file: &File, model: &mut Vec<u8>, step: Step) {
    match step {
        Step::Write { offset, len, byte, fua } => {
            let data = pattern(byte, len);
            write_model(model, position(offset), &data);
            file.write_all_at(data.into(), offset, fua).await.unwrap();
        }
        Step::WriteVectored { offset, lens, byte } => {
            let data = pattern(byte, lens.iter().sum());
            write_model(model, position(offset), &data);
            let mut rest = IoBufMut::from(data);
            let bufs = lens.iter().map(|&len| rest.split_to(len).freeze()).collect();
            file.write_all_vectored_at(bufs, offset, false).await.unwrap();
        }
        Step::Read { offset, len } => {
            let (back, n) = file.read_full_at(IoBufMut::filled(len, 0xee), offset).await.unwrap();
            let expected = model.get(position(offset)..).unwrap_or_default();
            assert_eq!(n, expected.len().min(len));
            assert!(back[..n] == expected[..n] && is_zero(&back[n..]) && back.len() == len);
        }
        Step::ReadVectored { offset, lens } => {
            let bufs: IoVecMut = lens.iter().map(|&len| IoBufMut::filled(len, 0xee)).collect();
            let (result, bufs) = file.read_vectored_at(bufs, offset).await;
            let n = result.unwrap();
            let expected = model.get(position(offset)..).unwrap_or_default();
            let joined: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
            assert!(
                n > 0 || expected.is_empty() || joined.is_empty(),
                "a read before the end must return data"
            );
            assert!(joined[..n] == expected[..n]);
        }
        Step::Scatter { piece, count, byte } => {
            let data = pattern(byte, piece * count);
            write_model(model, 0, &data);
            let writes: Vec<_> = data
                .chunks(piece)
                .zip((0u64..).step_by(piece))
                .map(|(chunk, at)| {
                    let (file, buf) = (file.clone(), IoBufMut::copy_from(chunk).freeze());
                    spawn(async move { file.write_all_at(buf, at, false).await })
                })
                .collect();
            for write in writes {
                write.await.unwrap();
            }
        }
        Step::Sync(data_only) => file.sync(data_only).await.unwrap(),
        other => apply_to_space(file, model, other).await,
    }
}

async fn apply_to_space(file: &File, model: &mut Vec<u8>, step: Step) {
    match step {
        Step::SetLen(len) => {
            file.set_len(len).await.unwrap();
            model.resize(position(len), 0);
        }
        Step::Fallocate(mode, offset, len) => {
            match file.fallocate(mode, offset, len).await {
                // Not every file system supports every mode.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
                result => result.unwrap(),
            }
            let (start, end) = (position(offset), position(offset + len));
            if matches!(mode, Falloc::Allocate | Falloc::ZeroRange) {
                model.resize(model.len().max(end), 0);
            }
            if !matches!(mode, Falloc::Allocate | Falloc::AllocateKeepSize) {
                let end = end.min(model.len());
                model.get_mut(start..end).unwrap_or_default().fill(0);
            }
        }
        Step::SeekExtent(offset) => match file.seek_extent(offset).await {
            Ok(extent) => {
                assert!(extent.end > offset && position(extent.end) <= model.len());
                assert!(extent.is_data || is_zero(&model[position(offset)..position(extent.end)]));
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
                assert!(position(offset) >= model.len());
            }
        },
        _ => {}
    }
}

async fn follow(file: File, steps: Vec<Step>) {
    let mut model = Vec::new();
    for step in steps {
        apply(&file, &mut model, step).await;
        assert_eq!(position(file.len().await.unwrap()), model.len());
    }
    let (back, n) = file.read_full_at(IoBufMut::new(model.len() + 1), 0).await.unwrap();
    assert_eq!(n, model.len());
    assert!(back[..n] == model[..]);
}

fn on_host(engine: Engine, aio: Aio, steps: Vec<Step>) {
    let file = File::from_fd(OwnedFd::from(tempfile::tempfile().unwrap()), aio);
    block_on_with(Config { engine, ..Config::default() }, follow(file, steps)).unwrap();
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(), 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_equals_its_model_on_io_uring(steps in steps()) {
        on_host(Engine::Uring, Aio::IoUring, steps);
    }

    #[test]
    fn a_file_equals_its_model_on_worker_threads_beside_io_uring(steps in steps()) {
        on_host(Engine::Uring, Aio::Threads, steps);
    }

    #[test]
    fn a_file_equals_its_model_on_the_fallback(steps in steps()) {
        on_host(Engine::Threads, Aio::IoUring, steps);
    }

    #[test]
    fn a_file_equals_its_model_on_linux_aio(steps in steps()) {
        on_host(Engine::Uring, Aio::Native, steps);
    }

    #[test]
    fn a_file_equals_its_model_on_linux_aio_beside_the_fallback(steps in steps()) {
        on_host(Engine::Threads, Aio::Native, steps);
    }

    #[test]
    fn a_simulated_disk_equals_its_model_with_short_transfers_and_delays(seed in any::<u64>(), steps in steps()) {
        let disk = Disk::new(seed, 0);
        let delay = Duration::ZERO..Duration::from_millis(5);
        disk.set_faults(Faults { short_reads: 0.4, short_writes: 0.4, delay, ..Faults::default() });
        sim::run(seed, follow(File::sim(&disk), steps));
    }
}

#[test]
fn a_copy_inside_the_kernel_succeeds_or_fails_with_the_kernels_error() {
    block_on_with(Config::default(), async {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let (from, to) =
            (File::from_fd(from.into(), Aio::IoUring), File::from_fd(to.into(), Aio::IoUring));
        from.write_all_at(pattern(3, 100_000).into(), 0, false).await.unwrap();
        match from.copy_range_to(4096, &to, 8192, 50_000).await {
            Ok(n) => {
                let n = position(n);
                assert!(n > 0 && n <= 50_000);
                let (back, _) = to.read_full_at(IoBufMut::new(n), 8192).await.unwrap();
                assert!(back[..] == pattern(3, 100_000)[4096..4096 + n]);
            }
            Err(error) => assert!(matches!(
                error.raw_os_error(),
                Some(libc::EOPNOTSUPP | libc::EXDEV | libc::EINVAL)
            )),
        }
    })
    .unwrap();
}

#[test]
fn errors_keep_their_errno() {
    for engine in [Engine::Uring, Engine::Threads] {
        block_on_with(Config { engine, ..Config::default() }, async {
            let path = tempfile::NamedTempFile::new().unwrap();
            for aio in [Aio::IoUring, Aio::Threads, Aio::Native] {
                let file = File::from_fd(std::fs::File::open(path.path()).unwrap().into(), aio);
                let error: io::Error =
                    file.write_all_at(vec![1; 512].into(), 0, false).await.unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EBADF), "{engine:?} {aio:?}");
            }
        })
        .unwrap();
    }
}

#[test]
fn extents_are_found_up_to_the_wanted_number_of_data_extents() {
    const UNIT: u64 = 1 << 20;
    let host = tempfile::tempfile_in("/dev/shm").unwrap();
    for unit in [1, 3] {
        host.write_all_at(&vec![7; position(UNIT)], unit * UNIT).unwrap();
    }
    host.set_len(5 * UNIT).unwrap();
    let file = File::from_fd(OwnedFd::from(host), Aio::IoUring);
    block_on(async move {
        let all = [(false, 1), (true, 2), (false, 3), (true, 4), (false, 5)];
        for (wanted, found) in [(1, &all[..2]), (2, &all[..4]), (3, &all[..]), (9, &all[..])] {
            let extents = file.seek_extents(0, wanted).await.unwrap();
            let extents: Vec<_> = extents.iter().map(|e| (e.is_data, e.end / UNIT)).collect();
            assert_eq!(extents, found);
        }
        let error = file.seek_extents(5 * UNIT, 1).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
    });
}
