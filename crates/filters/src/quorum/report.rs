//! The outcome of a request that was sent to all children, and the events for children that failed.

use std::sync::Arc;

use oxblk_core::{BlockEvent, Edge, Errno, Error, QuorumOperation, Result};

use super::Quorum;
use super::vote::{count, winner};

const SECTOR: u64 = 512;

/// A request, as events describe it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    kind: QuorumOperation,
    offset: u64,
    len: u64,
}

impl Operation {
    pub(super) fn read(offset: u64, len: u64) -> Self {
        Self { kind: QuorumOperation::Read, offset, len }
    }

    pub(super) fn write(offset: u64, len: u64) -> Self {
        Self { kind: QuorumOperation::Write, offset, len }
    }

    pub(super) fn flush() -> Self {
        Self { kind: QuorumOperation::Flush, offset: 0, len: 0 }
    }

    /// The first sector and the number of sectors.
    fn sectors(self) -> (u64, u64) {
        let first = self.offset / SECTOR;
        let end = self.offset.saturating_add(self.len).div_ceil(SECTOR);
        (first, end.saturating_sub(first))
    }
}

impl Quorum {
    /// Reports a child that has failed, or, without `error`, that has wrong data.
    pub(super) fn report_bad(&self, operation: Operation, child: &Edge, error: Option<&Error>) {
        let (sector_num, sectors_count) = operation.sectors();
        self.events.raise(&BlockEvent::QuorumReportBad {
            operation: operation.kind,
            error: error.map(|error| oxblk_core::strerror(error.raw_errno())),
            node_name: child.node().name().to_owned(),
            sector_num,
            sectors_count,
        });
    }

    /// Reports that too few children agree.
    pub(super) fn report_failure(&self, operation: Operation) {
        let (sector_num, sectors_count) = operation.sectors();
        let reference = self.name.clone();
        self.events.raise(&BlockEvent::QuorumFailure { reference, sector_num, sectors_count });
    }

    /// Reports the children that have failed. Returns the outcomes of the other children, each with the position of the child.
    ///
    /// # Errors
    /// When too few children have succeeded. The children vote on the error.
    pub(super) fn require_threshold<T>(
        &self,
        members: &[Arc<Edge>],
        outcomes: Vec<Result<T>>,
        operation: Operation,
    ) -> Result<Vec<(usize, T)>> {
        let (mut good, mut errors) = (Vec::new(), Vec::new());
        for (at, (outcome, child)) in outcomes.into_iter().zip(members).enumerate() {
            match outcome {
                Ok(value) => good.push((at, value)),
                Err(error) => {
                    self.report_bad(operation, child, Some(&error));
                    errors.push(error);
                }
            }
        }
        if good.len() >= self.settings.threshold {
            return Ok(good);
        }
        if operation.kind != QuorumOperation::Flush {
            self.report_failure(operation);
        }
        Err(most_common_error(errors))
    }
}

/// An error with the errno that most children report.
fn most_common_error(errors: Vec<Error>) -> Error {
    let versions = count(errors.iter().map(Error::raw_errno).enumerate(), i32::eq);
    let version = winner(&versions).and_then(|at| versions.get(at));
    let at = version.and_then(|version| version.voters.last().copied());
    let error = at.and_then(|at| errors.into_iter().nth(at));
    error.unwrap_or_else(|| Error::from_errno(Errno::IO))
}
