//! Reading the snapshot table of an image that may be broken (section "Snapshots" of the qcow2 specification).

use oxblk_core::check::{FindingKind, Fix};
use oxblk_core::{Errno, Error, Result};
use oxblk_ring::IoBufMut;

use super::Checker;
use super::planned::{Replacement, Structure};
use crate::qcow2::layout::{
    Excess, MAX_EXTRA, MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, SNAPSHOT_HEAD,
    Snapshot, parse_snapshot,
};
use crate::qcow2::metadata::{SnapshotTable, V3_EXTRA, visit_snapshots};
use crate::qcow2::read_ahead::read_ahead;

/// The number of incomplete entries that have a line of their own in the report.
const MAX_LINES: u32 = 10;

/// The snapshot table of an image.
#[derive(Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Length of the snapshot table in bytes.
    pub(super) table_bytes: u64,
    /// Number of faults that are repaired when the table is replaced.
    pub(super) faults: u64,
}

impl Checker<'_> {
    /// Reads the snapshot table. The part behind the end of the file reads as zeroes. With [`Fix::All`], missing extra data is
    /// added. Entries and extra data beyond the limits are left out only if the repair may lose them.
    pub(super) async fn read_snapshots(&mut self) -> Result<Snapshots> {
        let count = self.header.snapshot_count;
        if let Err(error) = self.header.require_snapshots()
            && (!self.may_lose_data() || count <= MAX_SNAPSHOTS)
        {
            return Err(self.report_impossible_table(&error));
        }
        let mut snapshots = match self.may_lose_data() {
            true => self.read_table_leniently().await?,
            false => self.read_table_strictly().await?,
        };
        self.complete_entries(&mut snapshots);
        Ok(snapshots)
    }

    /// Reports entries without the extra data of version 3. With [`Fix::All`], the missing data is added. A table can have
    /// thousands of such entries, so only the first entries have a line of their own.
    fn complete_entries(&mut self, snapshots: &mut Snapshots) {
        if self.header.version < 3 {
            return;
        }
        let (mut own_line, mut more) = (0, 0);
        for (index, snapshot) in snapshots.list.iter_mut().enumerate() {
            if snapshot.extra.len() >= V3_EXTRA {
                continue;
            }
            if self.fix == Fix::All {
                snapshot.size = snapshot.size.or(Some(self.header.size));
            }
            if own_line == MAX_LINES {
                more += 1;
                continue;
            }
            own_line += 1;
            let finding = format!("snapshot table entry {index} is incomplete");
            self.report_incomplete(&mut snapshots.faults, &finding, 1);
        }
        if more > 0 {
            let finding = format!("{more} more snapshot table entries are incomplete");
            self.report_incomplete(&mut snapshots.faults, &finding, more);
        }
    }

    fn report_incomplete(&mut self, faults: &mut u64, finding: &str, count: u64) {
        let fault = format!("ERROR {finding}");
        if self.fix == Fix::All {
            let structure = Structure::SnapshotTable;
            let repair = format!("Repairing {finding}");
            *faults = faults.saturating_add(count);
            self.plan_replacement(Replacement { structure, repair, fault, count });
        } else {
            self.report_remaining_faults(&fault, count);
        }
    }

    async fn read_table_strictly(&mut self) -> Result<Snapshots> {
        let mut list = Vec::new();
        let visited = visit_snapshots(self.file, SnapshotTable::of(self.header), |snapshot| {
            list.push(snapshot);
        })
        .await;
        let table_bytes = visited.map_err(|error| self.report_broken_table(&error))?;
        Ok(Snapshots { list, table_bytes, faults: 0 })
    }

    /// Reads the entries up to the limits of a snapshot table. If the extra data of an entry is too long, its unknown part is
    /// left out.
    async fn read_table_leniently(&mut self) -> Result<Snapshots> {
        let count = self.header.snapshot_count;
        let mut snapshots = Snapshots::default();
        if count > MAX_SNAPSHOTS {
            let over = count - MAX_SNAPSHOTS;
            self.discard(&mut snapshots, &format!("{over} overhanging snapshots"), over);
            self.broken_snapshots = true;
        }
        for index in 0..count.min(MAX_SNAPSHOTS) {
            let offset = self.header.snapshots_offset.saturating_add(snapshots.table_bytes);
            let (snapshot, len, excess) = self.read_entry(offset).await?;
            let end = snapshots.table_bytes.saturating_add(len);
            if let Some(excess) = excess {
                let what = format!(
                    "too much extra metadata in snapshot table entry {index} ({} > {MAX_EXTRA})",
                    excess.extra
                );
                self.discard(&mut snapshots, &what, 1);
            }
            if end > MAX_SNAPSHOT_TABLE_BYTES {
                let over = count.min(MAX_SNAPSHOTS) - index;
                let what = format!("{over} overhanging snapshots (snapshot table is too big)");
                self.discard(&mut snapshots, &what, over);
                self.broken_snapshots = true;
                break;
            }
            snapshots.table_bytes = end;
            snapshots.list.push(snapshot);
        }
        Ok(snapshots)
    }

    /// Plans to discard `what`. This counts as `count` faults.
    fn discard(&mut self, snapshots: &mut Snapshots, what: &str, count: u32) {
        let (repair, fault) = (format!("Discarding {what}"), format!("ERROR {what}"));
        let (structure, count) = (Structure::SnapshotTable, u64::from(count));
        snapshots.faults = snapshots.faults.saturating_add(count);
        self.plan_replacement(Replacement { structure, repair, fault, count });
    }

    /// Reads the entry at `offset`. Returns the entry, its length in the table, and its sizes if its extra data is too long.
    async fn read_entry(&self, offset: u64) -> Result<(Snapshot, u64, Option<Excess>)> {
        let head = self.read_or_zeroes(offset, SNAPSHOT_HEAD).await?;
        let excess = Excess::of(&head);
        let (bytes, fault) = match &excess {
            Some(excess) => {
                let at = offset.saturating_add(excess.names_at);
                let names = self.read_or_zeroes(at, excess.names_len).await?;
                (Excess::removed(&head, &names), None)
            }
            // The extra data is not too long, so the entry has at most `LONGEST` bytes.
            None if offset >= self.file.size() => (vec![0; LONGEST], None),
            None => {
                let ahead = read_ahead(self.file, offset, LONGEST).await;
                (ahead.bytes, ahead.fault)
            }
        };
        let missing = || fault.unwrap_or_else(|| Error::from_errno(Errno::FBIG));
        let (snapshot, len) = parse_snapshot(&bytes)?.ok_or_else(missing)?;
        Ok((snapshot, excess.map_or(len, |excess| excess.entry_len()), excess))
    }

    async fn read_or_zeroes(&self, offset: u64, len: usize) -> Result<IoBufMut> {
        if offset >= self.file.size() {
            return Ok(IoBufMut::zeroed(len));
        }
        self.file.read(offset, IoBufMut::new(len)).await
    }

    /// Reports that the header describes an impossible snapshot table. Returns the error of the check.
    fn report_impossible_table(&self, error: &Error) -> Error {
        let text = error.to_string().replacen('S', "s", 1);
        self.report_uncounted(FindingKind::SnapshotTable, format!("ERROR {text}"));
        let over = self.header.snapshot_count.saturating_sub(MAX_SNAPSHOTS);
        if over > 0 {
            let text = format!(
                "You can force-remove all {over} overhanging snapshots with qemu-img check -r all"
            );
            self.report_uncounted(FindingKind::Note, text);
        }
        Error::from_errno(error.raw_errno())
    }

    /// Reports that the snapshot table is unreadable. Returns the error of the check: without the table, refcounts cannot be
    /// checked.
    fn report_broken_table(&self, error: &Error) -> Error {
        self.report_uncounted(
            FindingKind::SnapshotTable,
            format!("ERROR failed to read the snapshot table: {error}"),
        );
        if error.to_string().starts_with("Too much extra metadata") {
            self.report_uncounted(
                FindingKind::Note,
                "You can force-remove this extra metadata with qemu-img check -r all",
            );
        }
        Error::from_errno(error.raw_errno())
    }

    /// Whether the offset and the size of a snapshot's L1 table are valid. If not, a corruption is reported.
    pub(super) fn check_l1_location(&mut self, snapshot: &Snapshot) -> bool {
        let Snapshot { id, name, l1_offset, l1_entries, .. } = snapshot;
        if !self.geometry.is_aligned(*l1_offset) {
            self.report_corruption(&format!(
                "ERROR snapshot {id} ({name}) l1_offset={l1_offset:#x}: L1 table is not cluster aligned; \
                 snapshot table entry corrupted"
            ));
            return false;
        }
        if u64::from(*l1_entries) * 8 > MAX_L1_BYTES {
            self.report_corruption(&format!(
                "ERROR snapshot {id} ({name}) l1_size={l1_entries:#x}: L1 table is too large; snapshot \
                 table entry corrupted"
            ));
            return false;
        }
        true
    }
}

/// Upper bound for the length in bytes of an entry whose extra data is not too long.
const LONGEST: usize = 133_120;
