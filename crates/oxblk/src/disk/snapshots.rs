//! Internal snapshots of a disk, by name.

use std::time::{SystemTime, UNIX_EPOCH};

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, Error, ErrorKind, Result};

use super::Disk;
use crate::Request;

impl Disk {
    /// The internal snapshots, in the order in which they were taken.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has none; as the image reports.
    pub fn snapshots(&self) -> Request<Vec<SnapshotInfo>> {
        self.run(|disk| async move { disk.snapshots().await })
    }

    /// Keeps the present state inside the image under `name`.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has no snapshots; as the image reports. Nothing has changed then.
    pub fn create_snapshot(&self, name: &str) -> Request<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
        let new = SnapshotInfo { name: name.to_owned(), date, ..SnapshotInfo::default() };
        self.run(move |disk| async move { disk.create_snapshot(&new).await })
    }

    /// Makes the disk what it was when the snapshot was taken.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) when there is none of that name; as the image reports.
    pub fn apply_snapshot(&self, name: &str) -> Request<()> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let id = id_of(&disk, &name).await?;
            disk.apply_snapshot(&id).await
        })
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// As [`Self::apply_snapshot`].
    pub fn delete_snapshot(&self, name: &str) -> Request<()> {
        let name = name.to_owned();
        self.run(move |disk| async move {
            let id = id_of(&disk, &name).await?;
            disk.delete_snapshot(&id).await
        })
    }
}

async fn id_of(disk: &Backend, name: &str) -> Result<String> {
    let snapshots = disk.snapshots().await?;
    let found = snapshots.into_iter().find(|snapshot| snapshot.name == name);
    let none = || Error::new(ErrorKind::NotFound, format!("There is no snapshot '{name}'"));
    found.map(|snapshot| snapshot.id).ok_or_else(none)
}
