//! The options of the filter.

use oxblk_core::{Edge, Error, Options, Result};

pub(super) const SECTOR: u64 = 512;
const DEFAULT_ALIGN: u64 = 1 << 20;
const DEFAULT_SIZE: u64 = 128 << 20;

/// How much space is preallocated, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Settings {
    /// The length of the file becomes a multiple of this number.
    align: u64,
    /// The file becomes at least this much longer than needed.
    size: u64,
}

impl Settings {
    /// Takes the options for the file below.
    ///
    /// # Errors
    /// When an option is no size, or the alignment does not fit the file.
    pub(super) fn take(options: &mut Options, file: &Edge) -> Result<Self> {
        let align = options.take_size("prealloc-align")?.unwrap_or(DEFAULT_ALIGN);
        let size = options.take_size("prealloc-size")?.unwrap_or(DEFAULT_SIZE);
        let what = "prealloc-align parameter of preallocate filter is not aligned to";
        if !align.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!("{what} {SECTOR}")));
        }
        let below = file.node().limits().request_alignment;
        if !align.is_multiple_of(u64::from(below.max(1))) {
            let text = format!("{what} underlying node request alignment ({below})");
            return Err(Error::invalid(text));
        }
        Ok(Self { align, size })
    }

    /// The length of the file after a write up to `end` has made it longer. `None`: the file would be too long.
    pub(super) fn length(self, end: u64) -> Option<u64> {
        let length = end.checked_add(self.size)?.checked_next_multiple_of(self.align.max(1))?;
        i64::try_from(length).is_ok().then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_includes_the_size_and_is_aligned() {
        let settings = Settings { align: 1 << 20, size: 10 << 20 };
        assert_eq!(settings.length(393_216), Some(11 << 20));
        assert_eq!(Settings { align: 0, size: 0 }.length(5), Some(5));
        assert_eq!(settings.length(u64::MAX), None);
    }
}
