//! Reads of a quorum.

use std::sync::Arc;

use futures_util::future::join_all;
use oxblk_core::{Edge, Errno, Error, Result, WriteFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::report::Operation;
use super::vote::{Version, count, winner};
use super::{Quorum, bytes};

/// The data that a child returned, with the position of the child.
type Vote = (usize, IoBufMut);

impl Quorum {
    /// Returns the data of the first child that does not fail.
    pub(super) async fn read_first(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        let mut last = None;
        for child in self.members() {
            match child.read(offset, IoBufMut::new(buf.len())).await {
                Ok(data) => {
                    buf.copy_from_slice(&data);
                    return Ok(buf);
                }
                Err(error) => {
                    let operation = Operation::read(offset, bytes(buf.len()));
                    self.report_bad(operation, &child, Some(&error));
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::from_errno(Errno::NOMEDIUM)))
    }

    /// Returns the data on which enough children agree.
    pub(super) async fn read_by_vote(&self, offset: u64, mut buf: IoBufMut) -> Result<IoBufMut> {
        let members = self.members();
        let len = buf.len();
        let mut outcomes = read_all(&members, offset, len).await;
        let _unchanged = match disagree(&outcomes) {
            false => None,
            true => {
                // A write may have reached only some of the children. Read again when no write to the range is in progress.
                let end = offset.saturating_add(bytes(len));
                let unchanged = self.changes.lock(offset..end).await;
                outcomes = read_all(&members, offset, len).await;
                Some(unchanged)
            }
        };
        let operation = Operation::read(offset, bytes(len));
        let votes = self.require_threshold(&members, outcomes, operation)?;
        let data = self.choose_by_vote(&members, votes, operation, offset).await?;
        // The request path needs the buffer that it has passed.
        buf.copy_from_slice(&data);
        Ok(buf)
    }

    /// The data with the most votes. Reports the children with other data, and corrects their data if the options say so. The caller
    /// holds the range, if the votes differ.
    async fn choose_by_vote(
        &self,
        members: &[Arc<Edge>],
        votes: Vec<Vote>,
        operation: Operation,
        offset: u64,
    ) -> Result<IoBuf> {
        let votes = votes.into_iter().map(|(at, data)| (at, data.freeze()));
        let mut versions = count(votes, |one: &IoBuf, other| one[..] == other[..]);
        if versions.len() > 1 && self.settings.verifies {
            return Err(mismatch(&versions, offset));
        }
        let elected = winner(&versions).map(|at| versions.remove(at));
        let elected = elected.filter(|elected| elected.voters.len() >= self.settings.threshold);
        let Some(elected) = elected else {
            self.report_failure(operation);
            return Err(Error::from_errno(Errno::IO));
        };
        // QEMU reports the last version first.
        let wrong = versions.iter().rev().flat_map(|version| version.voters.iter().rev());
        let wrong: Vec<&Arc<Edge>> = wrong.filter_map(|at| members.get(*at)).collect();
        for child in &wrong {
            self.report_bad(operation, child, None);
        }
        if self.settings.rewrites {
            join_all(wrong.iter().map(|child| correct(child, offset, elected.value.clone()))).await;
        }
        Ok(elected.value)
    }
}

/// Reads the range from all children.
async fn read_all(members: &[Arc<Edge>], offset: u64, len: usize) -> Vec<Result<IoBufMut>> {
    let reads = members.iter().map(|child| child.read(offset, IoBufMut::new(len)));
    join_all(reads).await
}

/// Whether children have returned different data.
fn disagree(outcomes: &[Result<IoBufMut>]) -> bool {
    let mut data = outcomes.iter().flatten();
    let first = data.next();
    data.any(|other| first.is_some_and(|first| first[..] != other[..]))
}

/// Writes the data that won the vote to a child with other data. The read succeeds even if this fails.
async fn correct(child: &Edge, offset: u64, data: IoBuf) {
    if let Err(error) = child.write(offset, data, WriteFlags::UNCHANGED).await {
        let node = child.node().name();
        tracing::warn!(node, %error, "cannot correct the data of a child of a quorum");
    }
}

/// The error of a quorum that verifies, if its two children differ.
fn mismatch(versions: &[Version<IoBuf>], offset: u64) -> Error {
    let mut data = versions.iter().map(|version| &version.value);
    let (one, other) = (data.next(), data.next());
    let (Some(one), Some(other)) = (one, other) else { return Error::from_errno(Errno::IO) };
    let same = one.iter().zip(other.iter()).take_while(|(one, other)| one == other).count();
    let (len, at) = (one.len(), offset.saturating_add(bytes(same)));
    let text = format!("quorum: offset={offset} bytes={len} contents mismatch at offset {at}");
    tracing::error!("{text}");
    Error::from_errno(Errno::IO).reword(text)
}
