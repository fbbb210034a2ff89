//! `img convert` writes the same bytes as qemu-img, also in a data file.

use oxblk_tests::differential::{Differential, check_clean};
use oxblk_tests::program::Tool::Img;

/// Returns a disk of random bytes with zero ranges that begin and end within clusters.
fn disk() -> Vec<u8> {
    let mut state = 1_u64;
    let mut bytes = vec![0; 3 << 20];
    for (index, block) in bytes.chunks_mut(40_000).enumerate() {
        if index % 7 < 2 {
            continue;
        }
        for byte in block {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = state.to_be_bytes()[0];
        }
    }
    bytes
}

/// Creates a raw disk, and qcow2 images of it: one uncompressed, one compressed.
fn sources() -> Differential {
    let both = Differential::new();
    both.file("disk.raw", &disk());
    both.qemu(Img, &["convert", "-q", "-O", "qcow2", "-S", "0", "disk.raw", "plain.qcow2"]);
    both.qemu(Img, &["convert", "-q", "-O", "qcow2", "-c", "disk.raw", "packed.qcow2"]);
    both
}

#[test]
fn a_conversion_with_copy_offloading_keeps_stored_zeroes() {
    let both = sources();
    for options in ["", "-o cluster_size=4k", "-o compat=0.10", "-o extended_l2=on"] {
        for source in ["disk.raw", "plain.qcow2", "packed.qcow2"] {
            let line = format!("convert -C -O qcow2 {options} {source} out");
            both.same(Img, &line.split_whitespace().collect::<Vec<_>>());
            both.same_bytes("out");
        }
    }
    both.same(
        Img,
        &["convert", "-C", "-O", "qcow2", "-o", "data_file=out.data", "disk.raw", "out"],
    );
    both.same_bytes("out");
    both.same_bytes("out.data");
}

#[test]
fn a_compressed_image_ends_with_a_whole_sector() {
    let both = sources();
    for options in ["cluster_size=64k", "cluster_size=4k", "compression_type=zstd"] {
        both.same(Img, &["convert", "-c", "-O", "qcow2", "-o", options, "disk.raw", "out"]);
        for directory in both.our_directories() {
            let image = directory.join("out");
            let len = std::fs::metadata(&image).expect("an image").len();
            assert_eq!(len % 512, 0, "[{options}]: {len} bytes");
            check_clean(&image);
        }
    }
}
