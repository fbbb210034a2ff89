//! Random writes to qcow2 images that `qemu-img` created. After the writes, `qemu-img` checks the images and compares their
//! contents.

use std::path::Path;
use std::process::Command;

use oxblk::core::{Backend, Graph, OpenFlags, Options, WriteFlags, ZeroFlags};
use oxblk::ring::{IoBufMut, block_on};

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    let short: String = text.chars().take(600).collect();
    assert!(output.status.success(), "qemu-img {args:?}: {short}");
}

async fn churn(disk: &Backend, oracle: &mut [u8], random: &mut Random, rounds: u32) {
    let size = oracle.len() as u64;
    for _ in 0..rounds {
        let longest = if random.next(4) == 0 { 300_000 } else { 5000 };
        let len = 1 + random.next(longest);
        let offset = random.next(size);
        let len = len.min(size - offset);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        match random.next(10) {
            0..6 => {
                let byte = u8::try_from(random.next(255) + 1).unwrap();
                oracle[range.clone()].fill(byte);
                disk.write(offset, vec![byte; range.len()].into(), WriteFlags::empty())
                    .await
                    .unwrap();
            }
            6 => {
                let flags =
                    if random.next(2) == 0 { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                oracle[range].fill(0);
                disk.write_zeroes(offset, len, flags).await.unwrap();
            }
            7 => disk.flush().await.unwrap(),
            _ => {
                let read = disk.read(offset, IoBufMut::new(range.len())).await.unwrap();
                assert!(*read == oracle[range.clone()], "read of {range:?} differs");
            }
        }
    }
}

fn run(options: &str, backing: bool, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (image, raw) = (path("disk.qcow2"), path("disk.raw"));
    let size: usize = 8 << 20;
    let mut oracle = vec![0_u8; size];
    if backing {
        let base: Vec<u8> = (0..5_000_000_u32).map(|i| (i / 777).to_le_bytes()[0]).collect();
        std::fs::write(path("base.raw"), &base).unwrap();
        oracle[..base.len()].copy_from_slice(&base);
        let options = format!("{options},backing_file={},backing_fmt=raw", path("base.raw"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, &image, "8M"]);
    } else {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &image, "8M"]);
    }
    let mut random = Random(seed);
    for _ in 0..3 {
        block_on(async {
            let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
            let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
            let disk = graph
                .open_backend(
                    Some(&image),
                    Options::from_dotted("driver=qcow2", None).unwrap(),
                    flags,
                )
                .await
                .unwrap();
            churn(&disk, &mut oracle, &mut random, 150).await;
            disk.close().await.unwrap();
        });
        std::fs::write(&raw, &oracle).unwrap();
        assert!(Path::new(&image).exists());
        qemu_img(&["check", "-q", &image]);
        qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", &image, &raw]);
    }
}

#[test]
fn images_of_every_cluster_size_stay_clean_and_equal() {
    for (seed, cluster) in (0_u64..).zip(["512", "1k", "4k", "64k", "2M"]) {
        run(&format!("cluster_size={cluster}"), false, seed);
        run(&format!("cluster_size={cluster}"), true, seed + 100);
    }
}

#[test]
fn images_of_every_refcount_width_stay_clean_and_equal() {
    for (seed, bits) in (200_u64..).zip([1, 2, 4, 8, 16, 32, 64]) {
        run(&format!("cluster_size=4k,refcount_bits={bits}"), true, seed);
    }
}

#[test]
fn version_2_images_stay_clean_and_equal() {
    run("compat=0.10", false, 300);
    run("compat=0.10,cluster_size=1k", true, 301);
}

#[test]
fn images_with_subclusters_stay_clean_and_equal() {
    for (seed, cluster) in (400_u64..).zip(["16k", "64k", "2M"]) {
        run(&format!("extended_l2=on,cluster_size={cluster}"), false, seed);
        run(&format!("extended_l2=on,cluster_size={cluster}"), true, seed + 100);
    }
    run("extended_l2=on,preallocation=metadata", false, 410);
}
