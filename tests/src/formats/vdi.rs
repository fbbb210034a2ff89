//! VDI images: dynamic and static.

use super::TestFormat;
use super::variant::Variant;
use crate::hostile::{self, Table};
use crate::random::Random;

/// The format.
#[derive(Debug)]
pub(super) struct Vdi;

const fn variant(name: &'static str, options: &'static str) -> Variant {
    Variant {
        check: true,
        // QEMU reports an error if the header counts blocks to which no entry of the block map refers (gaps). When oxblk closes
        // a writable image, it fills the gaps if there are at most 64.
        repairs_on_open: true,
        resizes: false,
        discards_by_qemu: false,
        measured_by_qemu: false,
        ..Variant::new(&Vdi, name, options, 1 << 20)
    }
}

static VARIANTS: [Variant; 2] =
    [variant("vdi", ""), Variant { zeroes_by_qemu: false, ..variant("vdi-static", "static=on") }];

/// The header field with the size of the disk, in bytes.
const SIZE: std::ops::Range<usize> = 0x170..0x178;

impl TestFormat for Vdi {
    fn name(&self) -> &'static str {
        "vdi"
    }

    fn variants(&self) -> &'static [Variant] {
        &VARIANTS
    }

    fn is_image(&self, start: &[u8]) -> bool {
        start.get(0x40..).is_some_and(|rest| rest.starts_with(&[0x7f, 0x10, 0xda, 0xbe]))
    }

    fn damage(&self, _variant: &Variant, random: &mut Random, bytes: &mut [u8]) {
        hostile::vdi::damage(random, bytes);
    }

    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        bytes[SIZE].copy_from_slice(&size.to_le_bytes());
        true
    }

    fn hostile(&self) -> Vec<Table> {
        vec![Table { name: "blocks", good: hostile::vdi::good(), cases: hostile::vdi::cases() }]
    }
}
