//! Latency histograms.

use std::sync::Arc;

use crate::{Error, Result};

/// The maximum number of boundaries: each thread has a counter for each bin.
const MAX_BOUNDARIES: usize = 1024;

/// Boundaries between the bins of a latency histogram, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boundaries(Arc<[u64]>);

impl Boundaries {
    /// `boundaries` in nanoseconds. The list may be empty: the histogram then has one bin.
    ///
    /// # Errors
    /// [`Invalid`](crate::ErrorKind::Invalid) if the boundaries are not greater than 0 and in ascending order, or if there
    /// are more than 1024 boundaries.
    pub fn new(boundaries: &[u64]) -> Result<Self> {
        if boundaries.len() > MAX_BOUNDARIES {
            let text = format!("A latency histogram has at most {MAX_BOUNDARIES} boundaries");
            return Err(Error::invalid(text));
        }
        let mut last = 0;
        for boundary in boundaries {
            if *boundary <= last {
                return Err(Error::invalid(
                    "Histogram boundaries must be greater than 0 and in ascending order",
                ));
            }
            last = *boundary;
        }
        Ok(Self(boundaries.into()))
    }
}

/// Numbers of requests by latency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatencyHistogram {
    boundaries: Boundaries,
    bins: Vec<u64>,
}

impl LatencyHistogram {
    pub(super) fn new(boundaries: &Boundaries) -> Self {
        Self { boundaries: boundaries.clone(), bins: vec![0; boundaries.0.len().saturating_add(1)] }
    }

    /// The boundaries between the bins in nanoseconds. A latency that equals a boundary belongs to the bin above it.
    pub fn boundaries(&self) -> &[u64] {
        &self.boundaries.0
    }

    /// The number of requests in each bin. There is one bin more than boundaries.
    pub fn bins(&self) -> &[u64] {
        &self.bins
    }

    pub(super) fn count(&mut self, nanos: u64) {
        let bin = self.boundaries.0.partition_point(|boundary| *boundary <= nanos);
        if let Some(count) = self.bins.get_mut(bin) {
            *count = count.saturating_add(1);
        }
    }

    /// Adds the bins of a histogram with the same boundaries.
    pub(super) fn add(&mut self, other: &Self) {
        for (sum, count) in self.bins.iter_mut().zip(&other.bins) {
            *sum = sum.saturating_add(*count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boundary_belongs_to_the_bin_above_it() {
        let mut histogram = LatencyHistogram::new(&Boundaries::new(&[10, 50, 100]).unwrap());
        for nanos in [0, 9, 10, 49, 50, 99, 100, u64::MAX] {
            histogram.count(nanos);
        }
        assert_eq!(histogram.bins(), [2, 2, 2, 2]);
    }

    #[test]
    fn the_number_of_boundaries_is_limited() {
        let boundaries: Vec<u64> = (1..=1025).collect();
        assert!(Boundaries::new(&boundaries[..1024]).is_ok());
        let error = Boundaries::new(&boundaries).unwrap_err();
        assert_eq!(error.to_string(), "A latency histogram has at most 1024 boundaries");
    }

    #[test]
    fn boundaries_must_ascend_from_above_zero() {
        for bad in [&[0][..], &[5, 5], &[5, 4], &[0, 1]] {
            assert!(Boundaries::new(bad).is_err(), "{bad:?}");
        }
        let one_bin = LatencyHistogram::new(&Boundaries::new(&[]).unwrap());
        assert_eq!(one_bin.bins(), [0]);
    }
}
