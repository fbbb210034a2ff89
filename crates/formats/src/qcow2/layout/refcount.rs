//! Refcounts in a refcount block ("Refcount block entry"). They are 1 to 64 bits wide and big-endian. Refcounts narrower than a
//! byte fill a byte from the least significant bit upwards.

use std::fmt;

/// Why a refcount was not set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefcountError {
    /// The index lies behind the block's end, or the width is invalid.
    OutOfBlock,
    /// The value does not fit the width.
    TooLarge,
}

impl fmt::Display for RefcountError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfBlock => "refcount index outside the block",
            Self::TooLarge => "refcount too large for its width",
        })
    }
}

impl std::error::Error for RefcountError {}

/// The largest refcount of 2^`order` bits.
#[inline]
pub fn refcount_max(order: u32) -> u64 {
    match order {
        0..=5 => (1 << (1u32 << order)) - 1,
        _ => u64::MAX,
    }
}

/// Byte position of the refcount at `index`, and its bit shift in that byte.
fn position(index: u64, order: u32) -> Option<(usize, u32)> {
    let bit = index.checked_mul(1u64.checked_shl(order)?)?;
    let shift = u32::try_from(bit % 8).ok()?;
    Some((usize::try_from(bit / 8).ok()?, shift))
}

/// The refcount at `index` of a block. `None` if the index lies behind the block's end, or if the width is invalid.
#[inline]
pub fn refcount_get(block: &[u8], index: u64, order: u32) -> Option<u64> {
    let (at, shift) = position(index, order)?;
    let bytes = block.get(at..)?;
    Some(match order {
        0..=2 => u64::from(*bytes.first()?) >> shift & refcount_max(order),
        3 => (*bytes.first()?).into(),
        4 => u16::from_be_bytes(*bytes.first_chunk()?).into(),
        5 => u32::from_be_bytes(*bytes.first_chunk()?).into(),
        6 => u64::from_be_bytes(*bytes.first_chunk()?),
        _ => return None,
    })
}

/// Sets the refcount at `index` of a block.
///
/// # Errors
/// When the index lies behind the block's end, the value does not fit, or the width is invalid. The block is then unchanged.
pub fn refcount_set(
    block: &mut [u8],
    index: u64,
    order: u32,
    value: u64,
) -> Result<(), RefcountError> {
    if value > refcount_max(order) {
        return Err(RefcountError::TooLarge);
    }
    let (at, shift) = position(index, order).ok_or(RefcountError::OutOfBlock)?;
    let width = 1usize.checked_shl(order.saturating_sub(3)).unwrap_or(usize::MAX);
    let end = at.checked_add(width).ok_or(RefcountError::OutOfBlock)?;
    let bytes = block.get_mut(at..end).ok_or(RefcountError::OutOfBlock)?;
    if let (0..=2, [byte]) = (order, &mut *bytes) {
        let mask = (1u8 << (1u32 << order)) - 1;
        let [.., low] = value.to_be_bytes();
        *byte = *byte & !(mask << shift) | low << shift;
        return Ok(());
    }
    let value = value.to_be_bytes();
    let from = value.len().checked_sub(width).and_then(|start| value.get(start..));
    bytes.copy_from_slice(from.ok_or(RefcountError::OutOfBlock)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_a_refcount_of_any_width_does_not_change_the_others() {
        for order in 0..=6 {
            let mut block = [0; 64];
            let count: u64 = (64 * 8) >> order;
            for index in 0..count {
                let value = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & refcount_max(order);
                refcount_set(&mut block, index, order, value).unwrap();
            }
            for index in 0..count {
                let value = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) & refcount_max(order);
                assert_eq!(refcount_get(&block, index, order), Some(value), "{order} {index}");
            }
            assert_eq!(refcount_get(&block, count, order), None);
            assert_eq!(refcount_set(&mut block, count, order, 0), Err(RefcountError::OutOfBlock));
            assert_eq!(refcount_get(&block, u64::MAX, order), None);
        }
    }

    #[test]
    fn narrow_refcounts_begin_at_the_least_significant_bit() {
        let mut block = [0; 2];
        refcount_set(&mut block, 1, 0, 1).unwrap();
        refcount_set(&mut block, 5, 1, 3).unwrap();
        assert_eq!(block, [0b10, 0b1100]);
    }

    #[test]
    fn a_refcount_that_does_not_fit_is_refused() {
        let mut block = [0; 8];
        assert_eq!(refcount_set(&mut block, 0, 0, 2), Err(RefcountError::TooLarge));
        assert_eq!(refcount_set(&mut block, 0, 4, 0x1_0000), Err(RefcountError::TooLarge));
        refcount_set(&mut block, 0, 6, u64::MAX).unwrap();
        assert_eq!(block, [0xff; 8]);
        assert_eq!(refcount_get(&block, 0, 7), None);
    }
}
