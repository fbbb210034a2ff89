//! The limits that a node reports instead of those of the node below.

use oxblk_core::{Error, Limits, Options, Result, WriteFlags, ZeroFlags};

/// The limits from options. 0: the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Overrides {
    align: u32,
    max_transfer: u32,
    opt_write_zero: u32,
    max_write_zero: u32,
    opt_discard: u32,
    max_discard: u32,
}

/// The options, which are also the strong options of the driver.
pub(super) const KEYS: [&str; 6] =
    ["align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"];

impl Overrides {
    /// Takes the limits out of the options. `below` is the request alignment of the node below.
    ///
    /// # Errors
    /// When a limit is no size, is too large, or does not fit the alignment.
    pub(super) fn take(options: &mut Options, below: u32) -> Result<Self> {
        let mut sizes = [0; KEYS.len()];
        for (size, key) in sizes.iter_mut().zip(KEYS) {
            *size = options.take_size(key)?.unwrap_or(0);
        }
        let [align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard] = sizes;
        let align = checked("align", align, u32::is_power_of_two)?;
        let block = align.max(below).max(1);
        let multiple =
            |key, size, of: u32| checked(key, size, |size| size.is_multiple_of(of.max(block)));
        let max_transfer = multiple("max-transfer", max_transfer, block)?;
        let opt_write_zero = multiple("opt-write-zero", opt_write_zero, block)?;
        let max_write_zero = multiple("max-write-zero", max_write_zero, opt_write_zero)?;
        let opt_discard = multiple("opt-discard", opt_discard, block)?;
        let max_discard = multiple("max-discard", max_discard, opt_discard)?;
        Ok(Self { align, max_transfer, opt_write_zero, max_write_zero, opt_discard, max_discard })
    }

    /// The limits of the node.
    pub(super) fn apply(&self, below: Option<&Limits>) -> Limits {
        let mut limits = below.cloned().unwrap_or_default();
        limits.request_alignment = self.align.max(1);
        limits.max_transfer = self.max_transfer.into();
        limits.write_zeroes_alignment = self.opt_write_zero.max(1);
        limits.max_write_zeroes = self.max_write_zero.into();
        limits.discard_alignment = self.opt_discard.max(1);
        limits.max_discard = self.max_discard.into();
        limits.write_flags = WriteFlags::FUA;
        limits.zero_flags = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
        limits
    }

    /// Zero writes that are shorter are not supported.
    pub(super) fn zero_alignment(&self) -> u32 {
        self.opt_write_zero
    }

    /// The whole blocks of a discard.
    pub(super) fn whole_blocks(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        let block = u64::from(self.opt_discard.max(1));
        let start = offset.checked_next_multiple_of(block)?;
        let end = offset.checked_add(len)?;
        let end = end - end % block;
        Some((start, end.checked_sub(start).filter(|len| *len > 0)?))
    }
}

fn checked(key: &str, size: u64, fits: impl Fn(u32) -> bool) -> Result<u32> {
    let small = u32::try_from(size).ok().filter(|size| *size < i32::MAX.unsigned_abs());
    let fitting = small.filter(|size| *size == 0 || fits(*size));
    fitting.ok_or_else(|| Error::invalid(format!("Cannot meet constraints with {key} {size}")))
}
