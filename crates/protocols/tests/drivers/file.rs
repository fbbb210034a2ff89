//! Tests of the `file` driver on files of the host.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;
use std::sync::Arc;

use crate::common::{error, graph, open, open_file, open_with, pattern, read, text, write};
use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::{
    Backend, DriverFactory, ErrorKind, OpenFlags, Options, Perm, Permissions, Preallocation,
    StatusFlags, Want, ZeroFlags,
};
use oxblk_protocols::file::FILE;
use oxblk_ring::block_on;

const MIB: u64 = 1 << 20;

fn file_of(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

#[test]
fn every_aio_mode_reads_and_writes_the_same_bytes_with_and_without_the_page_cache() {
    for (aio, direct) in [
        ("threads", false),
        ("threads", true),
        ("io_uring", false),
        ("io_uring", true),
        ("native", true),
    ] {
        let file = file_of(MIB);
        block_on(async {
            let switch = if direct { "on" } else { "off" };
            let options = format!(",aio={aio},cache.direct={switch}");
            let disk = open_file(file.path(), &options).await.unwrap();
            let mut expected = vec![0; usize::try_from(MIB).unwrap()];
            for (offset, len) in [(0, 4096), (5000, 10), (4096, 65536), (511, 2), (700_001, 9999)] {
                let data = pattern(len, 7);
                write(&disk, offset as u64, &data).await;
                expected[offset..offset + len].copy_from_slice(&data);
            }
            assert!(read(&disk, 0, expected.len()).await == expected, "{aio} {direct}");
            assert_eq!(read(&disk, 4999, 12).await, expected[4999..5011]);
            disk.flush().await.unwrap();
            disk.close().await.unwrap();
            assert!(std::fs::read(file.path()).unwrap() == expected, "{aio} {direct}");
        });
    }
}

#[test]
fn zeroes_and_discards_make_holes_and_block_status_sees_them() {
    let file = file_of(0);
    std::fs::write(file.path(), pattern(1 << 20, 1)).unwrap();
    block_on(async {
        let disk = open_file(file.path(), "").await.unwrap();
        let status = async |offset| {
            let found = disk.block_status(offset, MIB - offset, Want::Precise).await.unwrap();
            (found.status.is_zero(), found.status.len)
        };
        assert_eq!(status(0).await, (false, MIB));
        disk.discard(65536, 65536).await.unwrap();
        assert_eq!(status(0).await, (false, 65536));
        assert_eq!(status(65536).await, (true, 65536));
        assert_eq!(status(131_072).await, (false, MIB - 131_072));
        disk.write_zeroes(524_288, 4096, ZeroFlags::MAY_UNMAP).await.unwrap();
        assert_eq!(status(131_072).await, (false, 524_288 - 131_072));
        disk.write_zeroes(262_144, 100, ZeroFlags::empty()).await.unwrap();
        assert_eq!(read(&disk, 262_144, 100).await, [0; 100]);
        assert_eq!(read(&disk, 262_244, 4).await, pattern(262_248, 1)[262_244..]);
        let allocation = disk.block_status(65536, 65536, Want::Allocation).await.unwrap().status;
        assert!(allocation.flags.contains(StatusFlags::DATA));
        disk.close().await.unwrap();
    });
    assert!(std::fs::metadata(file.path()).unwrap().blocks() * 512 < MIB);
}

#[test]
fn holes_are_cached_only_while_nobody_may_write() {
    const EXTENT: u64 = 65536;
    let file = file_of(200 * EXTENT);
    for index in (0..200).filter(|index| index % 2 == 0) {
        file.as_file().write_all_at(&[1; 65536], index * EXTENT).unwrap();
    }
    block_on(async {
        let graph = graph();
        let options = format!("driver=file,filename={}", text(file.path()));
        let node = graph
            .open(Options::from_dotted(&options, None).unwrap(), OpenFlags::default())
            .await
            .unwrap();
        graph.keep_open(Arc::clone(&node)).unwrap();
        let hole_at = async |user: &Backend, offset| {
            let found = user.block_status(offset, 200 * EXTENT, Want::Precise).await.unwrap();
            assert_eq!(found.status.len, EXTENT, "{offset}");
            found.status.is_zero()
        };
        let read_only = Permissions {
            taken: Perm::CONSISTENT_READ,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        };
        let reader = Backend::new(&graph, "", Arc::clone(&node), read_only).unwrap();
        // The first pass is in ascending order and uses the cached extents. The second pass is in descending order.
        for index in (0..200).chain((0..200).rev()) {
            assert_eq!(hole_at(&reader, index * EXTENT).await, index % 2 == 1, "{index}");
        }
        let refused =
            Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(Perm::WRITE));
        assert!(refused.is_err());
        reader.close().await.unwrap();

        let taken = Perm::CONSISTENT_READ | Perm::WRITE;
        let writer =
            Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken)).unwrap();
        for index in [199, 1, 3] {
            assert!(hole_at(&writer, index * EXTENT).await);
            write(&writer, index * EXTENT, &[2; 65536]).await;
            let found = writer.block_status(index * EXTENT, EXTENT, Want::Precise).await.unwrap();
            assert!(!found.status.is_zero(), "{index}");
        }
        writer.close().await.unwrap();
        graph.allow_close(node).await.unwrap();
    });
}

#[test]
fn a_file_grows_by_writing_and_by_resizing() {
    let file = file_of(1000);
    block_on(async {
        let disk = open_file(file.path(), "").await.unwrap();
        let root = disk.root().unwrap();
        root.write(5000, vec![9; 10].into(), oxblk_core::WriteFlags::empty()).await.unwrap();
        assert_eq!(disk.size(), 5010);
        root.write_zeroes(8000, 192, ZeroFlags::empty()).await.unwrap();
        assert_eq!(disk.size(), 8192);
        disk.resize(2 * MIB, Preallocation::Off).await.unwrap();
        disk.resize(3 * MIB, Preallocation::Falloc).await.unwrap();
        disk.resize(4 * MIB, Preallocation::Full).await.unwrap();
        assert_eq!(read(&disk, 2 * MIB, 2 << 20).await, vec![0; 2 << 20]);
        let refused = disk.resize(MIB, Preallocation::Falloc).await;
        assert_eq!(error(refused), "Cannot use preallocation for shrinking files");
        let refused = disk.resize(5 * MIB, Preallocation::Metadata).await;
        assert_eq!(error(refused), "Unsupported preallocation mode: metadata");
        assert_eq!(disk.size(), 4 * MIB);
        disk.resize(512, Preallocation::Off).await.unwrap();
        drop(root);
        disk.close().await.unwrap();
    });
    assert_eq!(file.as_file().metadata().unwrap().len(), 512);
}

#[test]
fn open_failures_are_reported_with_the_messages_of_qemus_tools() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name));
    Command::new("mkfifo").arg(path("fifo")).status().unwrap();
    std::fs::write(path("file"), "x").unwrap();
    let cases = [
        (
            format!("driver=file,filename={}", path("none")),
            format!("Could not open '{}': No such file or directory", path("none")),
        ),
        (
            format!("driver=file,filename={}", text(dir.path())),
            format!("Could not open '{}': Is a directory", text(dir.path())),
        ),
        (
            format!("driver=file,read-only=on,filename={}", text(dir.path())),
            format!("'file' driver requires '{}' to be a regular file", text(dir.path())),
        ),
        (
            format!("driver=file,filename={}", path("fifo")),
            format!("'file' driver requires '{}' to be a regular file", path("fifo")),
        ),
        (
            "driver=file,filename=/dev/null".to_owned(),
            "'file' driver requires '/dev/null' to be a regular file".to_owned(),
        ),
        (
            format!("driver=host_device,filename={}", path("file")),
            format!(
                "'host_device' driver requires '{}' to be either a character or block device",
                path("file")
            ),
        ),
        ("driver=file".to_owned(), "The 'file' block driver requires a file name".to_owned()),
        (
            format!("driver=file,filename={},aio=fast", path("file")),
            "invalid parameter value: fast".to_owned(),
        ),
        (
            format!("driver=file,filename={},locking=maybe", path("file")),
            "invalid parameter value: maybe".to_owned(),
        ),
        (
            format!("driver=file,filename={},pr-manager=p", path("file")),
            "No persistent reservation manager with id 'p'".to_owned(),
        ),
        (
            format!("driver=file,filename={},aio=native", path("file")),
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
                .to_owned(),
        ),
    ];
    block_on(async {
        for (options, message) in cases {
            assert_eq!(error(open(&options).await), message, "{options}");
        }
        let graph = graph();
        let missing =
            graph.open_protocol(&path("none"), Options::new(), OpenFlags::default()).await;
        let expected = format!("Could not open '{}': No such file or directory", path("none"));
        assert_eq!(error(missing), expected);
    });
}

#[test]
fn a_file_that_cannot_be_written_becomes_read_only_only_if_allowed() {
    // A file of sysfs. Its size is one page, and even root may not open it for writing.
    let path = "/sys/devices/system/cpu/possible";
    block_on(async {
        let refused = open(&format!("driver=file,locking=off,filename={path}")).await;
        assert_eq!(error(refused), format!("Could not open '{path}': Permission denied"));
        let options = format!("driver=file,locking=off,auto-read-only=on,filename={path}");
        let disk = open(&options).await.unwrap();
        assert!(disk.is_read_only());
        assert_eq!(read(&disk, 0, 1).await, b"0");
        disk.close().await.unwrap();
    });
}

#[test]
fn unusual_file_names_are_accepted() {
    let dir = tempfile::tempdir().unwrap();
    block_on(async {
        let long = "n".repeat(255);
        for name in
            ["with space", "com,ma", "new\nline", "ümläut 🦀", "co:lon", "json:{}", "-f", &long]
        {
            let path = dir.path().join(name);
            std::fs::write(&path, [5; 512]).unwrap();
            let disk = open_file(&path, "").await.unwrap();
            assert_eq!(read(&disk, 511, 1).await, [5], "{name}");
            assert_eq!(disk.node().unwrap().filename().unwrap(), text(&path));
            disk.close().await.unwrap();
        }
        let graph = graph();
        let name = format!("file:{}", text(&dir.path().join("co:lon")));
        let node = graph.open_protocol(&name, Options::new(), OpenFlags::default()).await.unwrap();
        assert_eq!(node.size(), 512);
        graph.release(node).await.unwrap();
        let too_long = text(&dir.path().join("n".repeat(256)));
        let refused = open(&format!("driver=file,filename={too_long}")).await;
        assert_eq!(error(refused), format!("Could not open '{too_long}': File name too long"));
        let zero = open("driver=file,filename=a\0b").await;
        assert_eq!(error(zero), "Could not open 'a\0b': Invalid argument");
    });
}

#[test]
fn create_makes_a_file_of_the_requested_size_and_preallocation() {
    let dir = tempfile::tempdir().unwrap();
    let create = async |name: &str, options: &str| {
        let options = Options::from_dotted(options, None).unwrap();
        graph().create_image(&text(&dir.path().join(name)), "file", &options).await
    };
    block_on(async {
        create("plain", "size=1000000").await.unwrap();
        create("falloc", "size=1M,preallocation=falloc").await.unwrap();
        create("full", "size=1M,preallocation=full,nocow=on,extent_size_hint=0").await.unwrap();
        let refused = create("meta", "size=1M,preallocation=metadata").await;
        assert_eq!(error(refused), "Unsupported preallocation mode: metadata");
        assert_eq!(
            error(create("x", "size=1M,preallocation=foo").await),
            "invalid parameter value: foo"
        );
        assert_eq!(
            error(create("x", "size=1M,extent_size_hint=5G").await),
            "Extent size hint is too large"
        );
        assert_eq!(error(create("x", "size=8E").await), "Could not resize file: Invalid argument");
        let nowhere = create("no/where", "size=1M").await;
        let path = text(&dir.path().join("no/where"));
        assert_eq!(error(nowhere), format!("Could not create '{path}': No such file or directory"));
        // An existing file is truncated and reused.
        std::fs::write(dir.path().join("old"), [7; 5000]).unwrap();
        create("old", "size=4096").await.unwrap();
    });
    let meta = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap();
    assert_eq!(meta("plain").len(), 1_000_448);
    assert!(meta("plain").blocks() * 512 < 65536);
    assert_eq!(meta("falloc").len(), MIB);
    assert!(meta("falloc").blocks() * 512 >= MIB);
    assert_eq!(std::fs::read(dir.path().join("full")).unwrap(), vec![0; 1 << 20]);
    assert_eq!(std::fs::read(dir.path().join("old")).unwrap(), vec![0; 4096]);
}

#[test]
fn copies_between_files_are_done_by_the_kernel() {
    let (from, to) = (file_of(0), file_of(MIB));
    std::fs::write(from.path(), pattern(1 << 20, 3)).unwrap();
    block_on(async {
        let source = open_file(from.path(), "").await.unwrap();
        let target = open_file(to.path(), "").await.unwrap();
        match source.copy_to(4096, &target, 8192, 65536).await {
            Ok(()) => assert_eq!(read(&target, 8192, 65536).await, pattern(69632, 3)[4096..]),
            // If the file system does not support the copy, the error must be "unsupported".
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported),
        }
        source.close().await.unwrap();
        target.close().await.unwrap();
    });
}

#[test]
fn a_flush_succeeds_with_cache_no_flush() {
    let file = file_of(4096);
    block_on(async {
        let disk = open_file(file.path(), ",cache.no-flush=on").await.unwrap();
        write(&disk, 0, b"x").await;
        disk.flush().await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn null_disks_read_zeroes_if_requested_and_discard_writes() {
    block_on(async {
        let disk = open("driver=null-co,size=1M,read-zeroes=on").await.unwrap();
        write(&disk, 4096, &[1; 4096]).await;
        assert_eq!(read(&disk, 4096, 8).await, [0; 8]);
        disk.discard(0, MIB).await.unwrap();
        disk.flush().await.unwrap();
        let status = disk.block_status(0, MIB, Want::Precise).await.unwrap().status;
        assert!(status.is_zero());
        disk.close().await.unwrap();
        let slow = open("driver=null-aio,size=1000,latency-ns=1000").await.unwrap();
        assert_eq!(slow.size(), 1024);
        read(&slow, 0, 512).await;
        slow.close().await.unwrap();
        assert_eq!(error(open("driver=null-co,latency-ns=-5").await), "latency-ns is invalid");
        let huge = open("driver=null-co,size=15E").await;
        assert!(error(huge).ends_with("Could not refresh total sector count: File too large"));
        let named =
            graph().open_protocol("null-co://x", Options::new(), OpenFlags::default()).await;
        assert!(
            error(named).ends_with("The only allowed filename for this driver is 'null-co://'")
        );
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let fixed = open_with(&graph(), "driver=null-co", flags).await.unwrap();
        assert_eq!(fixed.size(), 1 << 30);
        fixed.close().await.unwrap();
    });
}

#[test]
fn a_wrong_extent_size_hint_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    block_on(async {
        let options = Options::from_dotted("size=1M,extent_size_hint=5G", None).unwrap();
        let target = CreateTarget::Filename(text(&path));
        let request = CreateRequest { target, options };
        let created = FILE.create(&graph(), request).unwrap().await;
        assert_eq!(error(created), "Extent size hint is too large");
    });
    assert!(!path.exists());
}
