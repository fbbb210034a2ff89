//! The survey of an image: it checks all entries of the BAT, and collects the clusters in use and the faults.

use std::ops::{ControlFlow, Range};

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::Parallels;
use crate::blocks::BlockImage;
use crate::blocks::survey::{each_entry, end_of};

/// The fault of an entry of the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The entry refers to an offset before the first cluster, or after the end of the file.
    Outside,
    /// The cluster begins inside the file and ends after the end of the file.
    CutOff,
    /// An earlier entry refers to the same cluster, or the offset is not the start of a cluster.
    Duplicate,
}

/// Faulty entries: `count` entries from `index` on with the same value and the same fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    /// Index of the cluster in the disk.
    pub(super) index: u32,
    /// Byte offset in the file to which the entry refers.
    pub(super) host: u64,
    pub(super) count: u32,
}

/// The result of a survey.
#[derive(Debug, Default)]
pub(crate) struct Survey {
    /// Clusters of the file to which entries without a fault refer, and clusters that are cut off.
    pub(super) used: RoaringBitmap,
    /// Number of entries that refer to an offset inside the data area of the file.
    pub(super) allocated: u64,
    /// Number of these entries whose cluster does not follow the cluster of the previous entry, if that entry is also
    /// allocated.
    pub(super) fragmented: u64,
}

impl Survey {
    /// The cluster after the last cluster in use.
    pub(super) fn end(&self) -> u32 {
        end_of(&self.used)
    }
}

impl Parallels {
    /// Loads and checks the complete BAT, and reports faults in the order of the disk.
    ///
    /// # Errors
    /// The errors of requests to the image file.
    pub(super) async fn survey(&self, mut found: impl FnMut(Finding)) -> Result<Survey> {
        let (size, cluster) = (self.file()?.size(), self.header.cluster);
        let mut survey = Survey::default();
        let mut previous = None;
        let examine = |indices: Range<u32>, entry| {
            if entry == 0 {
                previous = None;
                return ControlFlow::Continue(());
            }
            let (index, count) = (indices.start, indices.end - indices.start);
            let host = self.header.host(entry);
            let mut report = |fault| found(Finding { fault, index, host, count });
            if host >= size || host < self.header.data_offset {
                report(Fault::Outside);
                return ControlFlow::Continue(());
            }
            survey.allocated = survey.allocated.saturating_add(count.into());
            let follows = |at: u64| at.saturating_add(cluster) == host;
            if count > 1 || previous.is_some_and(|at| !follows(at)) {
                survey.fragmented = survey.fragmented.saturating_add(count.into());
            }
            previous = Some(host);
            match self.header.cluster_index(host) {
                Some(at) if survey.used.insert(at) => {
                    if host.saturating_add(cluster) > size {
                        report(Fault::CutOff);
                    }
                }
                _ => report(Fault::Duplicate),
            }
            ControlFlow::Continue(())
        };
        each_entry(&self.map, async |index| self.load(index).await, examine).await?;
        Ok(survey)
    }
}
