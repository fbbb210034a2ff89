//! Compares the results of a request to the two children.

use std::ops::Range;

use oxblk_core::{Errno, Error, Result};

use super::bytes;

/// A request, as reports of differences describe it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    name: &'static str,
    offset: u64,
    len: u64,
}

impl Request {
    pub(super) fn new(name: &'static str, offset: u64, len: u64) -> Self {
        Self { name, offset, len }
    }

    pub(super) fn range(self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len)
    }

    /// Returns both results, if both requests have succeeded.
    ///
    /// # Errors
    /// When a request has failed. The log reports different outcomes.
    pub(super) fn same_outcome<T>(self, test: Result<T>, raw: Result<T>) -> Result<(T, T)> {
        let number = |outcome: &Result<T>| {
            outcome.as_ref().err().map_or(0, |error| error.raw_errno().saturating_neg())
        };
        let (of_test, of_raw) = (number(&test), number(&raw));
        let differ = (of_test != of_raw)
            .then(|| self.report(&format!("return value mismatch {of_test} != {of_raw}")));
        match (test, raw) {
            (Ok(test), Ok(raw)) => Ok((test, raw)),
            (Err(error), _) | (_, Err(error)) => Err(match differ {
                Some(text) => error.reword(text),
                None => error,
            }),
        }
    }

    /// Compares the data of two reads.
    ///
    /// # Errors
    /// When the data differs.
    pub(super) fn same_data(self, test: &[u8], raw: &[u8]) -> Result<()> {
        if test == raw {
            return Ok(());
        }
        let differs = |(test, raw): (&u8, &u8)| test != raw;
        let Some(at) = test.iter().zip(raw).position(differs) else { return Ok(()) };
        let at = self.offset.saturating_add(bytes(at));
        let text = self.report(&format!("contents mismatch at offset {at}"));
        Err(Error::from_errno(Errno::IO).reword(text))
    }

    /// Reports a difference in the log, and returns the text of the report.
    fn report(self, difference: &str) -> String {
        let Self { name, offset, len } = self;
        let text = format!("blkverify: {name} offset={offset} bytes={len} {difference}");
        tracing::error!("{text}");
        text
    }
}
