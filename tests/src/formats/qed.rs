//! QED images: cluster and table sizes.

use oxblk_core::Options;

use super::TestFormat;
use super::variant::Variant;
use crate::hostile::{self, Table};
use crate::random::Random;

/// The format.
#[derive(Debug)]
pub(super) struct Qed;

const fn variant(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant {
        backing: true,
        check: true,
        // QEMU ignores discards.
        discards_by_qemu: false,
        shrunk_by_qemu: false,
        measured_by_qemu: false,
        ..Variant::new(&Qed, name, options, cluster)
    }
}

/// QEMU cannot open images whose tables have one cluster.
static VARIANTS: [Variant; 3] = [
    variant("qed", "", 64 << 10),
    variant("qed-4k", "cluster_size=4k,table_size=2", 4 << 10),
    variant("qed-tables", "cluster_size=8k,table_size=16", 8 << 10),
];

/// The header field with the size of the disk, in bytes.
const SIZE: std::ops::Range<usize> = 48..56;

impl TestFormat for Qed {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn variants(&self) -> &'static [Variant] {
        &VARIANTS
    }

    fn limit_caches(&self, _variant: &Variant, options: &mut Options) {
        options.insert("l2-cache-size", 1);
    }

    fn is_image(&self, start: &[u8]) -> bool {
        start.starts_with(b"QED\0")
    }

    fn damage(&self, variant: &Variant, random: &mut Random, bytes: &mut [u8]) {
        hostile::qed::damage(variant.cluster, random, bytes);
    }

    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        bytes[SIZE].copy_from_slice(&size.next_multiple_of(512).to_le_bytes());
        true
    }

    fn hostile(&self) -> Vec<Table> {
        vec![Table { name: "tables", good: hostile::qed::good(), cases: hostile::qed::cases() }]
    }
}
