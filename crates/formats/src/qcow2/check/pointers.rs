//! Checking whether the pointers in the header are plausible.
//!
//! If a pointer or a length in the header is wrong, the check misses a table or a part of a table. The clusters to which this
//! table refers then look like leaked clusters, but freeing these clusters would destroy data. So nothing is freed if
//!
//! - a pointer does not refer to the expected structure, for example to a LUKS header with its magic, or to a valid
//!   bitmap directory;
//! - the L1 table has invalid entries, or a cluster that should contain an L2 table contains mostly invalid entries;
//! - the structure reaches past the end of the file (structures of snapshots: see below), a cluster of the structure has
//!   refcount 0, or another structure uses the cluster too (with [`Fix::All`], shared clusters are accepted in most cases);
//! - another entry seems to follow the last entry of the snapshot table: the L1 table of this further entry has a refcount,
//!   but no known reference;
//! - the version in the header contradicts the other header fields;
//! - an entry of the snapshot table is invalid, for example because it has fewer L1 entries than its disk needs;
//! - the refcount width in the header seems wrong ([`super::width`]).
//!
//! A snapshot table with an invalid entry is replaced only if the check found no leak, no corruption and no table entry to
//! repair. Otherwise, clusters that seem to be leaked may belong to a snapshot.

use std::collections::HashSet;

use oxblk_core::check::{FindingKind, Fix};
use oxblk_ring::IoBufMut;

use super::Checker;
use super::snapshots::Snapshots;
use crate::qcow2::layout::{CryptoHeader, L1Entry, Snapshot, parse_snapshot};

/// What the user can do if the repair changes no tables.
const NEXT_STEP: &str = "A repair could lose data. Copy the disk to a new image with 'convert', and each snapshot that can be \
                         read with 'convert -l'";

/// Start of a LUKS header: the magic, then version 1.
const LUKS_MARK: &[u8] = b"LUKS\xba\xbe\0\x01";
/// Byte offset of the field in a LUKS header that contains the first sector of the payload.
const LUKS_PAYLOAD: usize = 104;
/// Bytes that are read to find out whether another snapshot table entry follows.
const ENTRY: usize = 4096;
/// Values of the header length field in version 3: without and with the compression type.
const V3_LENGTHS: [u32; 2] = [104, 112];

impl Checker<'_> {
    /// Notes that some references may be unknown, so that the repair frees nothing.
    pub(super) fn note_unknown_references(&mut self, finding: &str) {
        self.references_unknown = true;
        self.complete = false;
        self.doubts.push(finding.to_owned());
    }

    /// Reports why references may be unknown, if the repair therefore frees no leaked clusters, changes no tables, or repairs
    /// nothing at all. A check without repair does not report these doubts. Returns whether the repair changes no tables
    /// for this reason.
    pub(super) fn report_doubts(&mut self) -> bool {
        let tables =
            !self.patches.is_empty() || self.repaired_table.is_some() || self.new_bitmaps.is_some();
        let doubts = std::mem::take(&mut self.doubts);
        if self.report.leaks > 0 || self.wrong_width || (self.wrong_pointer && tables) {
            doubts.iter().for_each(|doubt| self.report_failure(doubt));
            return !doubts.is_empty() && (self.wrong_width || self.wrong_pointer);
        }
        false
    }

    /// Says how to get the data of an image with which the repair can do nothing. If the repair has fixed some faults, the next
    /// repair may go further, so nothing is said.
    pub(super) fn report_next_step(&self) {
        if (self.report.leaks_fixed, self.report.corruptions_fixed) == (0, 0) {
            self.report_uncounted(FindingKind::Note, NEXT_STEP);
        }
    }

    /// Notes that a pointer in the header seems wrong.
    fn note_wrong_pointer(&mut self, finding: &str) {
        self.note_unknown_references(finding);
        self.wrong_pointer = true;
    }

    /// Notes that the header may contain a wrong offset of a structure. A wrong offset of the bitmap directory does not prevent
    /// the repair of tables. So the repair can remove a broken bitmap directory. The clusters of the bitmaps then keep their
    /// refcounts.
    fn note_wrong_offset(&mut self, what: &str, finding: &str) {
        match what {
            "bitmap directory" => self.note_unknown_references(finding),
            _ => self.note_wrong_pointer(finding),
        }
    }

    /// Checks the structures to which the header refers. The caller has counted all references, except those of bitmaps and
    /// refcount structures.
    pub(super) async fn check_header_pointers(&mut self, snapshots: &Snapshots) {
        let l1_bytes = u64::from(self.header.l1_entries).saturating_mul(8);
        self.pointer_targets.push((self.header.l1_offset, l1_bytes, "L1 table"));
        let broken = "ERROR the L1 table is broken: clusters that seem leaked may be in use";
        if self.l1_faults > 0 && self.header.l1_entries > 0 {
            self.note_wrong_pointer(broken);
        } else if self.l1_flags_without_offset {
            self.note_unknown_references(broken);
        }
        if self.no_l2_table {
            self.note_wrong_pointer(
                "ERROR a cluster that should contain an L2 table has mostly invalid entries: \
                 clusters that seem leaked may be in use",
            );
        }
        if let Some(crypto) = self.header.extensions.crypto {
            self.pointer_targets.push((crypto.offset, crypto.length, "LUKS header"));
            self.check_luks(crypto).await;
        }
        self.check_snapshots(snapshots).await;
        self.check_version().await;
    }

    async fn bytes_at(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        if offset >= self.file.size() {
            return None;
        }
        Some(self.file.read(offset, IoBufMut::new(len)).await.ok()?.to_vec())
    }

    async fn check_luks(&mut self, crypto: CryptoHeader) {
        let head = self.bytes_at(crypto.offset, 512).await.unwrap_or_default();
        let payload = head.get(LUKS_PAYLOAD..LUKS_PAYLOAD.saturating_add(4));
        let payload = payload.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
        if !head.starts_with(LUKS_MARK) {
            self.note_wrong_pointer(&format!(
                "ERROR there is no LUKS header at offset {:#x}",
                crypto.offset
            ));
        } else if crypto.length < u64::from(payload).saturating_mul(512) {
            self.note_wrong_pointer(&format!(
                "ERROR the LUKS header is longer than {:#x} bytes",
                crypto.length
            ));
        }
    }

    async fn check_snapshots(&mut self, snapshots: &Snapshots) {
        let start = self.header.snapshots_offset;
        self.pointer_targets.push((start, snapshots.table_bytes, "snapshot table"));
        for snapshot in &snapshots.list {
            if !self.is_plausible_snapshot(snapshot) {
                self.broken_snapshots = true;
                continue;
            }
            let bytes = u64::from(snapshot.l1_entries).saturating_mul(8);
            self.pointer_targets.push((snapshot.l1_offset, bytes, "snapshot's L1 table"));
        }
        let next = start.saturating_add(snapshots.table_bytes);
        if start == 0 || !self.geometry.is_aligned(start) {
            return;
        }
        let Some(bytes) = self.bytes_at(next, ENTRY).await else { return };
        if let Ok(Some((snapshot, _))) = parse_snapshot(&bytes)
            && snapshot.l1_entries > 0
            && self.is_plausible_snapshot(&snapshot)
            && self.seems_to_leak(snapshot.l1_offset).await
        {
            self.note_wrong_pointer(&format!(
                "ERROR a snapshot that the header does not count follows at offset {next:#x}"
            ));
        }
    }

    /// Notes that references of snapshots may be unknown, if the snapshot table is broken and the image has other faults.
    pub(super) fn note_broken_snapshots(&mut self) {
        let faults = self.report.leaks > 0 || self.report.corruptions > 0;
        if self.broken_snapshots && (faults || !self.patches.is_empty() || self.rebuild) {
            self.note_wrong_pointer(
                "ERROR the snapshot table is broken: clusters that seem leaked may be in use",
            );
        }
    }

    /// Whether an entry of the snapshot table is plausible.
    fn is_plausible_snapshot(&self, snapshot: &Snapshot) -> bool {
        if u64::from(snapshot.l1_entries) < self.needed_l1_entries(snapshot) {
            return false;
        }
        let bytes = u64::from(snapshot.l1_entries).saturating_mul(8);
        let end = snapshot.l1_offset.saturating_add(bytes);
        let in_place = bytes == 0
            || (snapshot.l1_offset > 0
                && self.geometry.is_aligned(snapshot.l1_offset)
                && end <= self.clusters << self.geometry.cluster_bits);
        !snapshot.id.is_empty() && in_place
    }

    /// The number of L1 entries that the disk and the VM state of a snapshot need. If the snapshot table entry contains no disk
    /// size, the disk size counts as 0.
    fn needed_l1_entries(&self, snapshot: &Snapshot) -> u64 {
        let entries = |bytes| self.geometry.l1_entries_for(bytes).unwrap_or(u64::MAX);
        let disk = snapshot.size.map_or(0, entries);
        disk.saturating_add(entries(snapshot.vm_state_size))
    }

    /// Whether the cluster at `offset` has a refcount other than 0, but no known reference. A refcount that cannot be read
    /// counts as 0.
    async fn seems_to_leak(&self, offset: u64) -> bool {
        let cluster = self.geometry.cluster_index(offset);
        if self.references.get(cluster).count() > 0 {
            return false;
        }
        let place = self.header.refcount_table_offset;
        let index = cluster / self.geometry.refcounts_per_block();
        let entry = place.saturating_add(index.saturating_mul(8));
        let Some(word) = self.bytes_at(entry, 8).await else { return false };
        let block = word.try_into().map_or(0, u64::from_be_bytes);
        if block == 0 || !self.geometry.is_aligned(block) || block >= self.file.size() {
            return false;
        }
        let Ok(block) = self.read_block(block).await else { return false };
        let at = cluster % self.geometry.refcounts_per_block();
        let order = self.geometry.refcount_order;
        crate::qcow2::layout::refcount_get(&block, at, order).is_some_and(|count| count > 0)
    }

    /// Finds a header that looks like a header of version 3 but whose version field is 2. The extensions of such a header
    /// are ignored, so references may be missing.
    async fn check_version(&mut self) {
        if self.header.version >= 3 {
            return;
        }
        let bytes = self.bytes_at(0, 112).await.unwrap_or_default();
        let word = |at: usize| {
            let bytes = bytes.get(at..at.saturating_add(4))?;
            bytes.try_into().ok().map(u32::from_be_bytes)
        };
        let length = word(100).unwrap_or(0);
        if V3_LENGTHS.contains(&length) && word(72) == Some(0) && word(96).is_some_and(|o| o <= 6) {
            self.note_wrong_pointer(
                "ERROR the header has the fields of version 3, but its version field is 2",
            );
        }
    }

    /// Checks that the clusters of each structure in `pointer_targets` have a refcount, and that no other structure uses these
    /// clusters. If the refcounts must be rebuilt, the refcounts are unreliable and are not checked. With [`Fix::All`] or
    /// before a rebuild, the LUKS header, the snapshot table and the bitmap directory may share clusters with other structures.
    /// The active L1 table may share clusters in some cases (`is_misplaced_l1`).
    pub(super) async fn check_pointer_targets(&mut self) {
        let (mut block, mut tables) = (None, None);
        for (offset, bytes, what) in std::mem::take(&mut self.pointer_targets) {
            let first = self.geometry.cluster_index(offset);
            let end = self.geometry.clusters_for(offset.saturating_add(bytes));
            if bytes == 0 {
                continue;
            }
            if end > self.clusters {
                if what.starts_with("snapshot") {
                    continue;
                }
                let finding =
                    format!("ERROR the {what} at {offset:#x} reaches past the end of the file");
                self.note_wrong_offset(what, &finding);
                continue;
            }
            for cluster in first..end {
                let count = self.references.get(cluster).count();
                if count > 1 && what == "snapshot's L1 table" {
                    self.broken_snapshots = true;
                    break;
                }
                let refcount = match self.rebuild {
                    true => None,
                    false => self.refcount_of(cluster, &mut block).await,
                };
                let shared = count > 1
                    && match what {
                        "L1 table" => {
                            let tables = match &mut tables {
                                Some(tables) => tables,
                                // The L1 table is read once for all its clusters.
                                none => none.insert(self.other_tables().await),
                            };
                            self.is_misplaced_l1(cluster, tables)
                        }
                        _ => self.fix != Fix::All && !self.rebuild,
                    };
                if shared || refcount == Some(0) {
                    let finding = format!(
                        "ERROR the {what} at {offset:#x} may lie elsewhere: cluster {cluster} refcount={} \
                         reference={count}",
                        refcount.unwrap_or(0)
                    );
                    self.note_wrong_offset(what, &finding);
                    break;
                }
            }
        }
    }

    /// Whether the offset or length of the active L1 table seems wrong, because another structure also uses the cluster
    /// `cluster` of the table. With [`Fix::All`] or before a rebuild, the shared cluster is accepted if the table has valid
    /// entries and is not empty, the size of the disk requires this part of the table, and the other structure is neither a
    /// refcount structure nor an active L2 table.
    fn is_misplaced_l1(&self, cluster: u64, tables: &OtherTables) -> bool {
        if tables.refcounts.contains(&cluster) {
            return true;
        }
        if self.l1_faults > 0
            || self.l1_flags_without_offset
            || (self.fix != Fix::All && !self.rebuild)
        {
            return true;
        }
        let (offset, entries) = (self.header.l1_offset, u64::from(self.header.l1_entries));
        let needed = self.geometry.l1_entries_for(self.header.size).unwrap_or(entries).max(1);
        let needed_end = offset.saturating_add(needed.saturating_mul(8));
        if cluster >= self.geometry.clusters_for(needed_end) {
            return true;
        }
        tables.l2.as_ref().is_none_or(|l2| l2.contains(&cluster))
    }

    async fn other_tables(&self) -> OtherTables {
        let entries = u64::from(self.header.l1_entries);
        let l1 = self.read_table(self.header.l1_offset, entries).await.ok();
        let l1 = l1.filter(|l1| l1.iter().any(|entry| *entry != 0));
        let cluster = |entry: &u64| self.geometry.cluster_index(L1Entry(*entry).raw_offset());
        OtherTables {
            refcounts: self.refcount_structures.iter().copied().collect(),
            l2: l1.map(|l1| l1.iter().map(cluster).collect()),
        }
    }
}

/// Clusters that the active L1 table must not share.
struct OtherTables {
    /// The clusters of the refcount table and of the refcount blocks.
    refcounts: HashSet<u64>,
    /// The clusters to which the entries of the active L1 table refer. `None` if the table cannot be read, or is empty.
    l2: Option<HashSet<u64>>,
}
