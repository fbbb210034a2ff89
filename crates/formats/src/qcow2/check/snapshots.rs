//! The snapshot table ("Snapshots").

use oxblk_core::{Error, Result};

use super::Checker;
use crate::qcow2::layout::{MAX_L1_BYTES, Snapshot};
use crate::qcow2::snapshots::{TablePlace, visit_snapshots};

/// Extra data that version 3 images must have in each entry, in bytes.
const V3_EXTRA: usize = 16;

/// The snapshots of an image.
#[derive(Default)]
pub(super) struct Snapshots {
    pub(super) list: Vec<Snapshot>,
    /// Bytes in the snapshot table.
    pub(super) table_bytes: u64,
}

impl Checker<'_> {
    /// Reads the snapshot table; behind the end of the file it reads as zeroes.
    pub(super) async fn read_snapshots(&mut self) -> Result<Snapshots> {
        let mut list = Vec::new();
        let visited =
            visit_snapshots(self.file, TablePlace::of(self.header), |snapshot| list.push(snapshot))
                .await;
        let table_bytes = visited.map_err(|error| self.broken_table(&error))?;
        let snapshots = Snapshots { list, table_bytes };
        for (index, snapshot) in snapshots.list.iter().enumerate() {
            if self.header.version >= 3 && snapshot.extra.len() < V3_EXTRA {
                self.corrupt(&format!("ERROR snapshot table entry {index} is incomplete"));
            }
        }
        Ok(snapshots)
    }

    /// Without a snapshot table nothing can be told of the refcounts.
    fn broken_table(&self, error: &Error) -> Error {
        (self.say)(&format!("ERROR failed to read the snapshot table: {error}"));
        if error.to_string().starts_with("Too much extra metadata") {
            (self.say)("You can force-remove this extra metadata with qemu-img check -r all");
        }
        Error::from_errno(27)
    }

    /// Whether a snapshot's L1 table is where and as large as one can be; if not, that is told.
    pub(super) fn has_l1_in_place(&mut self, snapshot: &Snapshot) -> bool {
        let Snapshot { id, name, l1_offset, l1_entries, .. } = snapshot;
        if !self.geometry.is_aligned(*l1_offset) {
            self.corrupt(&format!(
                "ERROR snapshot {id} ({name}) l1_offset={l1_offset:#x}: L1 table is not cluster aligned; \
                 snapshot table entry corrupted"
            ));
            return false;
        }
        if u64::from(*l1_entries) * 8 > MAX_L1_BYTES {
            self.corrupt(&format!(
                "ERROR snapshot {id} ({name}) l1_size={l1_entries:#x}: L1 table is too large; snapshot \
                 table entry corrupted"
            ));
            return false;
        }
        true
    }
}
