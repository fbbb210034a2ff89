//! Search for zeroes in a buffer. Zeroes are not written as data.

use std::ops::Range;

/// A part of a buffer that is written as data, or a part that contains only zeroes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    /// The range in the buffer.
    pub(super) range: Range<usize>,
    /// Whether the range contains only zeroes.
    pub(super) zero: bool,
}

/// Cuts `bytes` into runs of data and of zeroes. `offset` is the disk offset of the first byte. Runs begin at disk offsets that
/// are multiples of `unit`, or at the start of the buffer. A unit counts as zero only if all of its bytes are zero.
pub(super) fn runs(bytes: &[u8], offset: u64, unit: u64) -> Vec<Run> {
    let unit = unit.max(1);
    let mut runs: Vec<Run> = Vec::new();
    let mut at = 0_usize;
    while at < bytes.len() {
        let place = offset.saturating_add(u64::try_from(at).unwrap_or(u64::MAX));
        let step = usize::try_from(unit - place % unit).unwrap_or(usize::MAX);
        let end = at.saturating_add(step).min(bytes.len());
        let zero = bytes.get(at..end).is_some_and(oxblk_ring::is_zero);
        match runs.last_mut() {
            Some(last) if last.zero == zero => last.range.end = end,
            _ => runs.push(Run { range: at..end, zero }),
        }
        at = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_change_at_multiples_of_the_unit_on_the_disk() {
        let mut bytes = vec![0_u8; 20];
        if let Some(byte) = bytes.get_mut(9) {
            *byte = 1;
        }
        let found = runs(&bytes, 4, 8);
        let expected = [
            Run { range: 0..4, zero: true },
            Run { range: 4..12, zero: false },
            Run { range: 12..20, zero: true },
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_buffer_of_one_kind_is_one_run() {
        assert_eq!(runs(&[0; 100], 3, 7), [Run { range: 0..100, zero: true }]);
        assert_eq!(runs(&[1; 100], 3, 7), [Run { range: 0..100, zero: false }]);
        assert_eq!(runs(&[], 3, 7), []);
    }
}
