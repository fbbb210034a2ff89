//! qcow2 images: every cluster size, and each feature that changes where data and metadata are stored.

use oxblk_core::Options;

use super::variant::Variant;
use super::{SECRET, TestFormat};
use crate::hostile::{self, Table};

/// The format.
#[derive(Debug)]
pub(super) struct Qcow2;

const fn plain(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant {
        backing: true,
        compress: true,
        check: true,
        snapshots: true,
        ..Variant::new(&Qcow2, name, options, cluster)
    }
}

const fn encrypted(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant { encrypted: true, compress: false, ..plain(name, options, cluster) }
}

/// The clusters of a data file have no refcounts, so they can be neither compressed nor shared with snapshots.
const fn data_file(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant { compress: false, snapshots: false, data_file: true, ..plain(name, options, cluster) }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

static VARIANTS: [Variant; 27] = [
    plain("qcow2-64k", "", 64 * KIB),
    plain("qcow2-512", "cluster_size=512", 512),
    plain("qcow2-1k", "cluster_size=1k", KIB),
    plain("qcow2-2k", "cluster_size=2k", 2 * KIB),
    plain("qcow2-4k", "cluster_size=4k", 4 * KIB),
    plain("qcow2-8k", "cluster_size=8k", 8 * KIB),
    plain("qcow2-16k", "cluster_size=16k", 16 * KIB),
    plain("qcow2-32k", "cluster_size=32k", 32 * KIB),
    plain("qcow2-128k", "cluster_size=128k", 128 * KIB),
    plain("qcow2-256k", "cluster_size=256k", 256 * KIB),
    plain("qcow2-512k", "cluster_size=512k", 512 * KIB),
    plain("qcow2-1m", "cluster_size=1M", MIB),
    plain("qcow2-2m", "cluster_size=2M", 2 * MIB),
    plain("qcow2-v2", "compat=0.10,cluster_size=4k", 4 * KIB),
    plain("qcow2-refcount1", "refcount_bits=1,cluster_size=4k", 4 * KIB),
    plain("qcow2-refcount64", "refcount_bits=64,cluster_size=4k", 4 * KIB),
    plain("qcow2-zstd", "compression_type=zstd,cluster_size=16k", 16 * KIB),
    plain("qcow2-ext-16k", "extended_l2=on,cluster_size=16k", 16 * KIB),
    plain("qcow2-ext-64k", "extended_l2=on", 64 * KIB),
    plain("qcow2-ext-2m", "extended_l2=on,cluster_size=2M", 2 * MIB),
    // With short keys, the LUKS header is small. With few iterations, an image opens without delay.
    encrypted(
        "qcow2-luks",
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,cluster_size=4k",
        4 * KIB,
    ),
    encrypted(
        "qcow2-aes-ext",
        "encrypt.format=aes,encrypt.key-secret=s0,extended_l2=on,cluster_size=16k",
        16 * KIB,
    ),
    data_file("qcow2-datafile", "cluster_size=4k", 4 * KIB),
    data_file("qcow2-datafile-ext", "extended_l2=on,cluster_size=16k", 16 * KIB),
    Variant {
        // Images of this kind cannot have a backing file.
        backing: false,
        raw_data: true,
        ..data_file("qcow2-datafile-raw", "data_file_raw=on,cluster_size=4k", 4 * KIB)
    },
    Variant {
        repairs_on_open: true,
        ..plain("qcow2-lazy", "lazy_refcounts=on,cluster_size=4k", 4 * KIB)
    },
    Variant { bitmaps: true, ..plain("qcow2-bitmaps", "cluster_size=4k", 4 * KIB) },
];

/// The header field with the size of the disk, in bytes (the qcow2 specification, "Header").
const SIZE: std::ops::Range<usize> = 24..32;

impl TestFormat for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn variants(&self) -> &'static [Variant] {
        &VARIANTS
    }

    fn add_open_options(&self, variant: &Variant, options: &mut Options) {
        if variant.encrypted {
            let mut encrypt = Options::new();
            encrypt.insert("key-secret", SECRET);
            options.insert("encrypt", encrypt.to_json());
        }
    }

    fn limit_caches(&self, variant: &Variant, options: &mut Options) {
        if variant.cluster <= 16 * KIB {
            options.insert("l2-cache-entry-size", 512);
            options.insert("l2-cache-size", 3 * 512);
        }
    }

    fn is_image(&self, start: &[u8]) -> bool {
        start.starts_with(b"QFI\xfb")
    }

    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        bytes[SIZE].copy_from_slice(&size.to_be_bytes());
        true
    }

    fn hostile(&self) -> Vec<Table> {
        use hostile::{qcow2, qcow2_subclusters};
        vec![
            Table { name: "clusters", good: qcow2::good(), cases: qcow2::cases() },
            Table {
                name: "subclusters",
                good: qcow2_subclusters::good(),
                cases: qcow2_subclusters::cases(),
            },
        ]
    }
}
