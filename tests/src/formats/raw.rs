//! Raw images: the file contains only the bytes of the disk.

use super::TestFormat;
use super::variant::Variant;
use crate::hostile::Table;

/// The format.
#[derive(Debug)]
pub(super) struct Raw;

static VARIANTS: [Variant; 1] = [Variant::new(&Raw, "raw", "", 4096)];

impl TestFormat for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn variants(&self) -> &'static [Variant] {
        &VARIANTS
    }

    fn is_image(&self, _start: &[u8]) -> bool {
        true
    }

    fn hostile(&self) -> Vec<Table> {
        Vec::new()
    }
}
