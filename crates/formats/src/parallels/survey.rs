//! What the whole BAT says: which clusters of the file are in use, and what is wrong.

use oxblk_core::Result;
use roaring::RoaringBitmap;

use super::Parallels;

/// What is wrong with an entry of the BAT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It names a place before the first cluster, or behind the end of the file.
    Outside,
    /// Its cluster begins in the file and ends behind the file's end.
    CutOff,
    /// Its cluster overlaps that of an entry before it, or lies between two clusters.
    Duplicate,
}

/// A faulty entry. So are the entries that follow it, as many as `count` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) fault: Fault,
    /// The cluster of the disk.
    pub(super) index: u32,
    /// Where in the file it is.
    pub(super) host: u64,
    pub(super) count: u32,
}

/// What the BAT says.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Clusters of the file that entries name, but for those of faulty ones that need clusters of their own.
    pub(super) used: RoaringBitmap,
    /// Entries that name something in the file.
    pub(super) allocated: u64,
    /// Of these, those that do not follow the one before.
    pub(super) fragmented: u64,
}

impl Survey {
    /// The cluster behind the last one in use.
    pub(super) fn end(&self) -> u32 {
        self.used.max().map_or(0, |last| last.saturating_add(1))
    }
}

impl Parallels {
    /// Goes through the BAT, loading all of it, and reports what is wrong in the order of the disk.
    ///
    /// # Errors
    /// As the file reports.
    pub(super) async fn survey(&self, mut found: impl FnMut(Finding)) -> Result<Survey> {
        let (size, cluster) = (self.file()?.size(), self.header.cluster);
        let mut survey = Survey::default();
        let mut previous = None;
        let mut start = 0;
        while start < self.map.len() {
            self.load(start).await?;
            let range = self.map.chunk_of(start);
            let mut index = range.start;
            start = range.end;
            while index < range.end {
                // The first entry of a chunk tells what the others are.
                let alike = match self.map.uniform(index) {
                    Some((entry, count)) if entry == 0 || index > range.start => count.max(1),
                    _ => 1,
                };
                let (first, entry) = (index, self.map.get(index).unwrap_or_default());
                index = index.saturating_add(alike);
                if entry == 0 {
                    previous = None;
                    continue;
                }
                let host = self.header.host(entry);
                let mut report = |fault| found(Finding { fault, index: first, host, count: alike });
                if host >= size || host < self.header.data_offset {
                    report(Fault::Outside);
                    continue;
                }
                survey.allocated = survey.allocated.saturating_add(alike.into());
                let follows = |at: u64| at.saturating_add(cluster) == host;
                if alike > 1 || previous.is_some_and(|at| !follows(at)) {
                    survey.fragmented = survey.fragmented.saturating_add(alike.into());
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
            }
        }
        Ok(survey)
    }
}
