//! Internal snapshots of a disk, by name.

use std::time::{SystemTime, UNIX_EPOCH};

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Error, ErrorKind, Result};

use super::Disk;
use crate::Request;

impl Disk {
    /// The internal snapshots in the order of the snapshot table.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no snapshots; otherwise the errors of the image's driver.
    pub fn snapshots(&self) -> Request<Vec<SnapshotInfo>> {
        self.run(|disk| async move { disk.snapshots().await })
    }

    /// Takes an internal snapshot of the current state under `name`.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no snapshots; otherwise the errors of the image's driver. After an error, the image has no
    /// new snapshot.
    pub fn create_snapshot(&self, name: &str) -> Request<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
        let new = SnapshotInfo { name: name.to_owned(), date, ..SnapshotInfo::default() };
        self.run(move |disk| async move { disk.create_snapshot(&new).await })
    }

    /// Reverts the disk to the state of a snapshot.
    ///
    /// # Errors
    /// `ENOTSUP` if the format has no snapshots; [`NotFound`](ErrorKind::NotFound) if no snapshot has that name;
    /// otherwise the errors of the image's driver.
    pub fn apply_snapshot(&self, name: &str) -> Request<()> {
        let choose = by_name(name);
        self.run(move |disk| async move { disk.apply_snapshot_by(choose).await })
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// The errors of [`Self::apply_snapshot`].
    pub fn delete_snapshot(&self, name: &str) -> Request<()> {
        let choose = by_name(name);
        self.run(move |disk| async move { disk.delete_snapshot_by(choose).await })
    }
}

/// Chooses the first snapshot with this name.
fn by_name(name: &str) -> impl FnOnce(&[SnapshotInfo]) -> Result<String> + Send + use<> {
    let name = name.to_owned();
    move |snapshots| {
        let found = snapshots.iter().find(|snapshot| snapshot.name == name);
        let none = || Error::new(ErrorKind::NotFound, format!("There is no snapshot '{name}'"));
        found.map(|snapshot| snapshot.id.clone()).ok_or_else(none)
    }
}
