//! The offsets of data and tables in a new image are the same as in images that the QEMU tools write.

use oxblk::core::snapshot::SnapshotInfo;
use oxblk::core::{Gate, Graph, OpenFlags, Options, WriteFlags};
use oxblk::ring::block_on;
use oxblk_tests::differential::Differential;
use oxblk_tests::program::Program;
use oxblk_tests::program::Tool::{Img, Io};

#[test]
fn sequential_writes_give_the_same_bytes_as_with_qemu() {
    for (options, unit) in [
        ("cluster_size=64k", 64),
        ("cluster_size=4k", 4),
        ("cluster_size=2M", 2048),
        ("compat=0.10", 64),
        ("extended_l2=on", 64),
        ("cluster_size=512", 1),
    ] {
        let both = Differential::new();
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", options, "a", "64M"]);
        for (number, start) in [0, 1, 2, 7, 9, 3].into_iter().enumerate() {
            let line = format!("write -q -P {} {}k {unit}k", number + 1, start * unit);
            both.same(Io, &["-c", &line, "a"]);
        }
        both.same(Io, &["-c", "write -q -P 9 32M 70k", "-c", "write -q -P 8 40M 3k", "a"]);
        both.same_bytes("a");
    }
}

#[test]
fn large_and_preallocated_images_have_the_same_bytes_as_with_qemu() {
    let both = Differential::new();
    for (options, size) in
        [("cluster_size=512", "1G"), ("cluster_size=512,refcount_bits=64", "200M")]
    {
        both.same(Img, &["create", "-q", "-f", "qcow2", "-o", options, "a", size]);
        both.same_bytes("a");
    }
    for (cluster, other, size) in [
        ("512", "refcount_bits=16", "9M"),
        ("512", "refcount_bits=64", "1000448"),
        ("1k", "compat=0.10", "3M"),
        ("4k", "refcount_bits=64", "9M"),
        ("64k", "refcount_bits=1", "1000448"),
        ("64k", "extended_l2=on", "1000448"),
        ("64k", "data_file=d", "3M"),
        ("512", "data_file=d,data_file_raw=on", "3M"),
        ("2M", "lazy_refcounts=on", "0"),
    ] {
        for mode in ["metadata", "falloc", "full"] {
            let options = format!("cluster_size={cluster},{other},preallocation={mode}");
            both.same(Img, &["create", "-q", "-f", "qcow2", "-o", &options, "a", size]);
            both.same_bytes("a");
        }
    }
}

#[test]
fn refcount_blocks_and_tables_grow_at_the_same_offsets_as_with_qemu() {
    for (options, len) in [
        // The first refcount block covers 8 MiB. One write crosses this offset, and another write ends there.
        ("cluster_size=4k", "1000k"),
        ("cluster_size=4k", "64k"),
        ("cluster_size=4k", "4k"),
        // The refcount table becomes too small.
        ("cluster_size=512", "100k"),
        ("cluster_size=512,refcount_bits=64", "512"),
    ] {
        let both = Differential::new();
        both.qemu(Img, &["create", "-q", "-f", "qcow2", "-o", options, "a", "12M"]);
        let unit: u64 = len.trim_end_matches('k').parse().expect("a number");
        let bytes = if len.ends_with('k') { unit << 10 } else { unit };
        // Writes are short only near the offset where the structures grow.
        let dense = if options.contains("refcount_bits") { 1 << 20 } else { 7 << 20 };
        let start = dense / bytes * bytes;
        let mut words = vec![format!("write -q -P 7 0 {start}")];
        words.extend(
            (0..160)
                .map(|index| start + index * bytes)
                .filter(|at| at + bytes <= 12 << 20)
                .map(|at| format!("write -q -P {} {at} {bytes}", at / bytes % 255 + 1)),
        );
        let words: Vec<&str> =
            words.iter().flat_map(|word| ["-c", word.as_str()]).chain(["a"]).collect();
        both.same(Io, &words);
        both.same_bytes("a");
    }
}

#[test]
fn a_write_skips_gaps_that_are_too_small() {
    let both = Differential::new();
    both.qemu(Img, &["create", "-q", "-f", "qcow2", "a", "64M"]);
    both.qemu(
        Io,
        &["-c", "write -q -P 1 0 4M", "-c", "discard 1M 128k", "-c", "discard 2M 64k", "a"],
    );
    both.same(Io, &["-c", "write -q -P 2 8M 1M", "-c", "write -q -P 3 16M 64k", "a"]);
    both.same_bytes("a");
    both.same(Io, &["-c", "write -q -P 4 20M 128k", "-c", "write -q -P 5 24M 64k", "a"]);
    both.same_bytes("a");
    // The first cluster of this write is allocated. The remainder of the write fits exactly into the free clusters that follow
    // in the file.
    both.qemu(Io, &["-c", "discard 512k 192k", "a"]);
    both.same(Io, &["-c", "write -q -P 6 448k 256k", "a"]);
    both.same_bytes("a");
}

#[test]
fn gaps_are_used_before_a_file_that_cannot_grow_is_full() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let path = scratch.path().join("image");
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"];
    let mut tried = 0;
    for clusters in 13..24 {
        Program::new("qemu-img").args(create).arg(&path).arg("256k").succeed();
        let options = format!(
            "driver=qcow2,file.driver=raw,file.size={},file.file.driver=file,file.file.filename={}",
            clusters * 512,
            path.display()
        );
        std::fs::File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(clusters * 512))
            .expect("the image");
        block_on(async {
            let graph = Graph::new(oxblk::drivers(), Gate::Anything);
            let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
            let options = Options::from_dotted(&options, None).expect("options");
            let disk = graph.open_backend(None, options, flags).await.expect("an image");
            let write = async |at: u64, len: usize| {
                disk.write(at, vec![1; len].into(), WriteFlags::empty()).await
            };
            let mut has_room = true;
            for at in 0..6 {
                has_room &= write(at * 512, 512).await.is_ok();
            }
            for at in [0, 2, 4] {
                disk.discard(at * 512, 512).await.expect("a discard");
            }
            disk.flush().await.expect("a flush");
            disk.flush().await.expect("a flush");
            // After the flush, the discarded clusters are free.
            has_room &= write(8 << 10, 512).await.is_ok();
            disk.flush().await.expect("a flush");
            // This write needs two adjacent clusters, so it does not fit between the allocated clusters.
            has_room &= write(4 << 10, 1024).await.is_ok();
            if has_room {
                tried += 1;
                // The snapshot needs two tables of one cluster each.
                let new = SnapshotInfo { name: "one".to_owned(), ..SnapshotInfo::default() };
                let taken = disk.create_snapshot(&new).await;
                taken.unwrap_or_else(|error| panic!("{clusters}: {error}"));
            }
            disk.close().await.expect("it closes");
        });
    }
    assert!(tried > 4);
}
