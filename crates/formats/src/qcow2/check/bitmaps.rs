//! Checking persistent bitmaps (section "Bitmaps" of the qcow2 specification): counting the clusters to which the bitmaps
//! refer, and finding broken bitmaps.
//!
//! A bitmap whose entry or table is broken has no usable contents. QEMU does not open most of the images with such a bitmap.
//! [`Fix::All`](oxblk_core::check::Fix::All) removes such a bitmap from the directory, and the repair of leaks then frees the
//! clusters of the bitmap. If the directory cannot be parsed, the repair removes the directory from the header. The clusters of
//! the bitmaps are then unknown and stay leaked. The repair of an image that is opened removes nothing: an image with a broken
//! bitmap can be used.
//!
//! The autoclear bit of bitmaps is cleared before the directory changes, and set again when the new directory is complete. A
//! power cut between these two writes loses the remaining bitmaps.

use std::collections::{HashMap, HashSet};

use oxblk_core::check::FindingKind;
use oxblk_core::{Error, ErrorKind, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::planned::{Replacement, Structure};
use super::{Checker, Loss};
use crate::qcow2::bitmaps::{
    clear_bitmaps_autoclear, plan_extension, read_directory, write_planned,
};
use crate::qcow2::layout::{
    Autoclear, BitmapData, BitmapEntry, BitmapFlags, BitmapTableEntry, BitmapsExtension,
    bitmap_bytes, encode_bitmap_directory,
};
use crate::qcow2::refscan::CopiedFlag;

/// How the repair changes the bitmap directory.
pub(super) enum NewDirectory {
    /// The header no longer refers to a directory.
    Dropped,
    /// The directory contains only these entries.
    Entries(BitmapsExtension, Vec<BitmapEntry>),
}

impl Checker<'_> {
    /// Counts the references of persistent bitmaps, and finds broken bitmaps.
    pub(super) async fn count_bitmaps(&mut self) {
        if let Some(fault) = self.header.extensions.bitmaps_fault.clone() {
            return self.report_broken_directory(&fault);
        }
        let Some(place) = self.header.extensions.bitmaps else {
            if self.header.autoclear.contains(Autoclear::BITMAPS) {
                self.note_unknown_references(
                    "ERROR the header has the bit for bitmaps, but no offset of a bitmap directory",
                );
            }
            return;
        };
        let (offset, size) = (place.directory_offset, place.directory_size);
        self.pointer_targets.push((offset, size, "bitmap directory"));
        let entries = match read_directory(self.file, &place).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::Io => {
                return self.report_failure(&format!(
                    "ERROR: could not read the bitmap directory: {error}"
                ));
            }
            Err(error) => return self.report_broken_directory(&error.to_string()),
        };
        self.count_range(place.directory_offset, place.directory_size, 1, CopiedFlag::None);
        let count = entries.len();
        let kept = self.count_entries(entries).await;
        if kept.len() < count {
            self.plan_shorter_directory(place, kept);
        }
    }

    /// Notes that the repair writes a directory with these entries. The references to clusters that the shorter
    /// directory does not need are removed from the counts.
    fn plan_shorter_directory(&mut self, place: BitmapsExtension, kept: Vec<BitmapEntry>) {
        let directory_size = kept.iter().map(BitmapEntry::encoded_len).sum();
        let count = u32::try_from(kept.len()).unwrap_or(u32::MAX);
        let first = self.geometry.cluster_index(place.directory_offset);
        let end = |bytes| first.saturating_add(self.geometry.clusters_for(bytes));
        for cluster in end(directory_size)..end(place.directory_size) {
            self.references.remove(cluster);
        }
        self.new_bitmaps = Some(match kept.is_empty() {
            true => NewDirectory::Dropped,
            false => {
                NewDirectory::Entries(BitmapsExtension { count, directory_size, ..place }, kept)
            }
        });
    }

    fn report_broken_directory(&mut self, fault: &str) {
        // Without the directory, the clusters of the bitmaps are unknown.
        self.references_unknown = true;
        if self.may_lose_data() {
            self.plan_replacement(Replacement {
                structure: Structure::BitmapDirectory,
                repair: format!("Repairing the bitmap directory by dropping it: {fault}"),
                fault: format!("ERROR: {fault}"),
                count: 1,
            });
            self.new_bitmaps = Some(NewDirectory::Dropped);
        } else {
            self.report_corruption(&format!("ERROR: {fault}"));
        }
    }

    /// Counts the references of the entries, and returns the entries that stay in the directory.
    async fn count_entries(&mut self, entries: Vec<BitmapEntry>) -> Vec<BitmapEntry> {
        let mut times: HashMap<String, u32> = HashMap::new();
        for entry in &entries {
            *times.entry(entry.name().into_owned()).or_default() += 1;
        }
        let mut kept = Vec::new();
        for entry in entries {
            let name = entry.name().into_owned();
            let twice = times.get(&name).is_some_and(|times| *times > 1);
            let table = match self.bitmap_table(&entry).await {
                Ok(table) => table,
                Err(error) if error.kind() == ErrorKind::Io => {
                    self.report_failure(&format!(
                        "ERROR: could not read the table of bitmap '{name}': {error}"
                    ));
                    kept.push(entry);
                    continue;
                }
                Err(fault) => {
                    let left = self.report_broken_bitmap(entry, &fault.to_string());
                    // The references of a bitmap that stays are unknown.
                    self.references_unknown |= left.is_some();
                    kept.extend(left);
                    continue;
                }
            };
            let fault = if twice { Some(format!("Bitmap already exists: {name}")) } else { None };
            match fault.or_else(|| self.table_fault(&entry, &table)) {
                None => {
                    self.count_bitmap(&entry, &table);
                    kept.push(entry);
                }
                Some(fault) => {
                    let left = self.report_broken_bitmap(entry, &fault);
                    if let Some(entry) = &left
                        && self.loss == Loss::Allowed
                    {
                        self.count_bitmap(entry, &table);
                    }
                    kept.extend(left);
                }
            }
        }
        kept
    }

    /// Reports a broken bitmap. Returns its entry if the entry stays in the directory.
    fn report_broken_bitmap(&mut self, entry: BitmapEntry, fault: &str) -> Option<BitmapEntry> {
        let name = entry.name();
        if self.may_lose_data() {
            let repair = Replacement {
                structure: Structure::BitmapDirectory,
                repair: format!("Repairing bitmap '{name}' by removing it: {fault}"),
                fault: format!("ERROR: bitmap '{name}' is broken: {fault}"),
                count: 1,
            };
            self.plan_replacement(repair);
            return None;
        }
        let finding = format!("ERROR: bitmap '{name}' is broken: {fault}");
        match self.loss {
            Loss::Allowed => self.report_corruption(&finding),
            // An image with this bitmap can be used. The clusters of the bitmap keep their refcounts.
            Loss::Refused => {
                self.report_uncounted(FindingKind::Corruption, finding);
                self.references_unknown = true;
            }
        }
        Some(entry)
    }

    async fn bitmap_table(&self, entry: &BitmapEntry) -> Result<Vec<BitmapTableEntry>> {
        if let Some(fault) = entry.fault(self.geometry) {
            return Err(Error::invalid(fault));
        }
        let end = entry.table_offset.saturating_add(entry.table_bytes());
        if end > self.file.size() {
            return Err(Error::invalid("its table lies outside of the file"));
        }
        let words = self.read_table(entry.table_offset, entry.table_entries.into()).await?;
        Ok(words.into_iter().map(BitmapTableEntry).collect())
    }

    fn table_fault(&self, entry: &BitmapEntry, table: &[BitmapTableEntry]) -> Option<String> {
        let first = self.geometry.cluster_index(entry.table_offset);
        let count = self.geometry.clusters_for(entry.table_bytes());
        let own = first..first.saturating_add(count);
        let is_shared = |cluster: u64| self.references.get(cluster).count() > 0;
        let mut shared = own.clone().any(is_shared);
        let mut seen = HashSet::new();
        for word in table {
            match word.data(self.geometry) {
                Err(bad) => return Some(bad.to_string()),
                Ok(BitmapData::At(offset)) => {
                    if self.geometry.cluster_index(offset) >= self.clusters {
                        return Some(format!("its data at {offset:#x} lies outside of the file"));
                    }
                    let cluster = self.geometry.cluster_index(offset);
                    if own.contains(&cluster) || !seen.insert(cluster) {
                        return Some(format!("it refers to the cluster at {offset:#x} twice"));
                    }
                    shared |= is_shared(cluster);
                }
                Ok(_) => {}
            }
        }
        if shared {
            return Some("other metadata or data also uses its clusters".to_owned());
        }
        let bytes = bitmap_bytes(self.header.size, entry.granularity().unwrap_or(1));
        let needed = self.geometry.clusters_for(bytes).max(1);
        let outdated = entry.flags.contains(BitmapFlags::IN_USE);
        (!outdated && needed != u64::from(entry.table_entries)).then(|| {
            format!("its table has {} entries, where {needed} are needed", entry.table_entries)
        })
    }

    /// Counts the valid references of a bitmap.
    fn count_bitmap(&mut self, entry: &BitmapEntry, table: &[BitmapTableEntry]) {
        self.count_range(entry.table_offset, entry.table_bytes(), 1, CopiedFlag::None);
        let size = self.geometry.cluster_size();
        for word in table {
            if let Ok(BitmapData::At(offset)) = word.data(self.geometry) {
                self.count_range(offset, size, 1, CopiedFlag::None);
            }
        }
    }

    /// Plans to remove all bitmaps if the directory must change and other structures use its clusters. The caller has
    /// counted all references.
    pub(super) async fn plan_to_drop_shared_directory(&mut self) {
        let (place, kept) = match self.new_bitmaps.take() {
            Some(NewDirectory::Entries(place, kept)) if !self.is_directory_unshared(&place) => {
                (place, kept)
            }
            new => {
                self.new_bitmaps = new;
                return;
            }
        };
        self.new_bitmaps = Some(NewDirectory::Dropped);
        self.plan_drop(place.directory_offset, place.directory_size);
        for entry in kept {
            let name = entry.name().into_owned();
            let fault = "other metadata or data also uses the clusters of the bitmap directory";
            // The fault of the directory was reported as a fault of another bitmap.
            self.plan_replacement(Replacement {
                structure: Structure::BitmapDirectory,
                repair: format!("Repairing bitmap '{name}' by removing it: {fault}"),
                fault: format!("ERROR: bitmap '{name}' is broken: {fault}"),
                count: 1,
            });
            // The clusters of a bitmap whose table cannot be read stay leaked.
            let Ok(table) = self.bitmap_table(&entry).await else { continue };
            self.plan_drop(entry.table_offset, entry.table_bytes());
            for word in table {
                if let Ok(BitmapData::At(offset)) = word.data(self.geometry) {
                    self.plan_drop(offset, self.geometry.cluster_size());
                }
            }
        }
    }

    /// Notes that a range loses a reference when the new directory is in place.
    fn plan_drop(&mut self, offset: u64, bytes: u64) {
        let end = self.geometry.clusters_for(offset.saturating_add(bytes)).min(self.clusters);
        self.dropped_bitmaps.insert_range(self.geometry.cluster_index(offset)..end);
    }

    /// Removes the references of the bitmaps that were dropped with their directory. The clusters without other
    /// references are then freed. The check has not reported them as leaks.
    pub(super) fn forget_dropped_bitmaps(&mut self) {
        for cluster in std::mem::take(&mut self.dropped_bitmaps) {
            self.references.remove(cluster);
            self.unreported.insert(cluster);
        }
    }

    /// Writes the new directory, and flushes, if [`Self::count_bitmaps`] found that the directory must change.
    pub(super) async fn write_new_bitmaps(&mut self) -> Result<()> {
        let Some(new) = self.new_bitmaps.take() else { return Ok(()) };
        let (place, kept) = match new {
            NewDirectory::Entries(place, kept) => (Some(place), kept),
            NewDirectory::Dropped => (None, Vec::new()),
        };
        clear_bitmaps_autoclear(self.file).await?;
        if let Some(place) = &place {
            let bytes = encode_bitmap_directory(kept.iter());
            self.file
                .write(place.directory_offset, IoBuf::from(bytes), WriteFlags::empty())
                .await?;
            self.file.flush().await?;
        }
        write_planned(self.file, plan_extension(self.file, self.header, place.as_ref()).await?)
            .await
    }

    /// Whether no other structure uses the clusters of the directory.
    fn is_directory_unshared(&self, place: &BitmapsExtension) -> bool {
        let first = self.geometry.cluster_index(place.directory_offset);
        let count = self.geometry.clusters_for(place.directory_size);
        let mut clusters = first..first.saturating_add(count);
        clusters.all(|cluster| self.references.get(cluster).count() == 1)
    }
}
