//! Parallels images.

use super::TestFormat;
use super::variant::Variant;
use crate::hostile::{self, Table};
use crate::random::Random;

/// The format.
#[derive(Debug)]
pub(super) struct Parallels;

const fn variant(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant {
        check: true,
        // After a power cut, the header still has the mark of an open image.
        repairs_on_open: true,
        resizes: false,
        measured_by_qemu: false,
        ..Variant::new(&Parallels, name, options, cluster)
    }
}

static VARIANTS: [Variant; 2] =
    [variant("parallels", "", 1 << 20), variant("parallels-64k", "cluster_size=64k", 64 << 10)];

/// The header field with the size of the disk, in sectors.
const SIZE: std::ops::Range<usize> = 36..44;

impl TestFormat for Parallels {
    fn name(&self) -> &'static str {
        "parallels"
    }

    fn variants(&self) -> &'static [Variant] {
        &VARIANTS
    }

    fn is_image(&self, start: &[u8]) -> bool {
        start.starts_with(b"WithouFreSpacExt") || start.starts_with(b"WithoutFreeSpace")
    }

    fn damage(&self, _variant: &Variant, random: &mut Random, bytes: &mut [u8]) {
        hostile::parallels::damage(random, bytes);
    }

    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        bytes[SIZE].copy_from_slice(&size.div_ceil(512).to_le_bytes());
        true
    }

    fn hostile(&self) -> Vec<Table> {
        vec![Table {
            name: "clusters",
            good: hostile::parallels::good(),
            cases: hostile::parallels::cases(),
        }]
    }
}
