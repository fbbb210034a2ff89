//! VPC (VHD) images: dynamic and fixed.

use super::TestFormat;
use super::variant::Variant;
use crate::hostile::{self, Table};
use crate::random::Random;

/// The format.
#[derive(Debug)]
pub(super) struct Vpc;

const fn variant(name: &'static str, options: &'static str) -> Variant {
    Variant {
        // Without this option, the size is rounded up to the size of a disk geometry.
        exact_size: "force_size=on",
        check: true,
        checked_by_qemu: false,
        // A power cut may leave a file that does not end with a footer. The next close writes the footer.
        repairs_on_open: true,
        resizes: false,
        discards_by_qemu: false,
        zeroes_by_qemu: false,
        measured_by_qemu: false,
        ..Variant::new(&Vpc, name, options, 2 << 20)
    }
}

static VARIANTS: [Variant; 2] = [variant("vpc", ""), variant("vpc-fixed", "subformat=fixed")];

impl TestFormat for Vpc {
    fn name(&self) -> &'static str {
        "vpc"
    }

    fn variants(&self) -> &'static [Variant] {
        &VARIANTS
    }

    fn is_image(&self, start: &[u8]) -> bool {
        start.starts_with(b"conectix")
    }

    fn damage(&self, variant: &Variant, random: &mut Random, bytes: &mut [u8]) {
        hostile::vpc::damage(random, bytes, variant.name == "vpc-fixed");
    }

    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        hostile::vpc::set_size(bytes, size.next_multiple_of(512));
        true
    }

    fn hostile(&self) -> Vec<Table> {
        vec![
            Table {
                name: "dynamic",
                good: hostile::vpc::good("dynamic"),
                cases: hostile::vpc::dynamic(),
            },
            Table {
                name: "fixed",
                good: hostile::vpc::good("fixed"),
                cases: hostile::vpc::fixed(),
            },
        ]
    }
}
