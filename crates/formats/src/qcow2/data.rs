//! Reads, writes and allocation of uncompressed guest data at its host offset.
//!
//! All reads and writes of uncompressed guest data use this module, apart from requests that `map` forwards. Callers pass the
//! guest offset together with the host offset. This module chooses the child that contains the data, and encrypts and decrypts
//! the data.
//!
//! This module also chooses the place of new data ([`Data::reserve_data`]). Without a data file, new data goes to newly
//! reserved clusters of the image. With a data file, the host offset of data in the data file equals the guest offset. Clusters
//! of a data file have no refcounts. A cluster of a data file can be used only for the guest cluster with the same offset, so
//! it is not quarantined when it is freed. The code that frees the cluster holds the guest range lock until the host has
//! discarded the cluster.

use std::sync::Arc;

use oxblk_core::{ChildIdx, DebugEvent, Result, WriteFlags, ZeroFlags};
use oxblk_ring::{IoBuf, IoBufMut};

use super::clusters::ReleaseReason;
use super::clusters::Reserved;
use super::clusters::{Clusters, Counted};
use super::encryption::Encryption;
use super::image_state::ImageState;
use super::layout::Geometry;
use super::metadata::Metadata;

/// A run of host clusters for new guest data.
pub(super) struct NewData<'a> {
    /// Index of the first cluster.
    pub(super) start: u64,
    /// Number of clusters.
    pub(super) count: u64,
    /// The clusters lay behind the end of the file and were not written since then, so the file reads as zeroes there.
    pub(super) untouched: bool,
    /// The reservation of these clusters. `None` with a data file: the clusters of a data file are not reserved.
    reserved: Option<Reserved<'a>>,
}

impl<'a> NewData<'a> {
    /// Call this before the first write to the clusters; see [`Reserved::begin_write`].
    pub(super) fn begin_write(&mut self) {
        if let Some(reserved) = &mut self.reserved {
            reserved.begin_write();
        }
    }

    /// If `written` is `Ok`, adds one reference to each reserved cluster. If `written` is an error, frees the clusters and
    /// returns the error. All writes to the clusters have ended. Clusters of a data file are neither counted nor freed.
    pub(super) async fn count_if(
        self,
        written: Result<()>,
        clusters: &'a Clusters,
    ) -> Result<Option<Counted<'a>>> {
        match (self.reserved, written) {
            (None, written) => written.map(|()| None),
            (Some(reserved), Ok(())) => {
                clusters.count(reserved, ReleaseReason::Data).await.map(Some)
            }
            (Some(reserved), Err(error)) => {
                reserved.give_back();
                Err(error)
            }
        }
    }
}

/// Access to the uncompressed guest data of an open image.
pub(super) struct Data {
    geometry: Geometry,
    image_state: Arc<ImageState>,
    metadata: Arc<Metadata>,
    encryption: Option<Encryption>,
}

impl Data {
    /// The data of an image. `encryption` is present if the data is encrypted.
    pub(super) fn new(
        image_state: Arc<ImageState>,
        metadata: Arc<Metadata>,
        encryption: Option<Encryption>,
    ) -> Self {
        Self { geometry: image_state.geometry(), image_state, metadata, encryption }
    }

    /// The encryption of the data, if it is encrypted.
    pub(super) fn encryption(&self) -> Option<&Encryption> {
        self.encryption.as_ref()
    }

    /// Whether guest data is stored without encryption, so that `map` may forward requests to the host offset.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.encryption.is_none()
    }

    /// Whether two concurrent writes may write the data in front of a guest offset and the data behind this offset. With
    /// encryption, the offset must lie between two sectors.
    pub(super) fn can_part_at(&self, guest: u64) -> bool {
        self.is_plain() || guest.is_multiple_of(oxblk_crypto::SECTOR as u64)
    }

    /// Whether reserved clusters are known to read as zeroes for the guest. Zeroes in the file of an encrypted image do not
    /// decrypt to zeroes.
    pub(super) fn reads_as_zeroes(&self, run: &NewData<'_>) -> bool {
        run.untouched && self.is_plain()
    }

    /// Reads the data of the guest offset `guest` from the host offset `host` into `buf`.
    pub(super) async fn read_data(&self, guest: u64, host: u64, buf: IoBufMut) -> Result<IoBufMut> {
        self.image_state.event(DebugEvent::ReadAio).await;
        let child = self.image_state.children().require(self.image_state.data_child())?;
        match &self.encryption {
            None => child.read(host, buf).await,
            Some(encryption) => encryption.read(&child, guest, host, buf).await,
        }
    }

    /// Writes `data` of the guest offset `guest` to the host offset `host`.
    pub(super) async fn write_data(&self, guest: u64, host: u64, data: IoBuf) -> Result<()> {
        self.image_state.event(DebugEvent::WriteAio).await;
        let child = self.image_state.children().require(self.image_state.data_child())?;
        match &self.encryption {
            None => child.write(host, data, WriteFlags::empty()).await,
            Some(encryption) => encryption.write(&child, guest, host, data).await,
        }
    }

    /// Reserves host clusters for up to `count` guest clusters from `guest` on, and for at least one. If host cluster `behind`
    /// is free, the run begins with this cluster. With a data file, returns the clusters at the guest offset. They need no
    /// reservation.
    pub(super) async fn reserve_data(
        &self,
        guest: u64,
        count: u64,
        behind: Option<u64>,
    ) -> Result<NewData<'_>> {
        if self.geometry.data_file {
            let start = self.geometry.cluster_index(guest);
            return Ok(NewData { start, count, untouched: false, reserved: None });
        }
        let run = self.metadata.reserve_to_use_behind(behind, count).await?;
        let (start, count, untouched) = (run.start(), run.count(), run.is_untouched());
        Ok(NewData { start, count, untouched, reserved: Some(run) })
    }

    /// Zeroes a range of a raw data file, up to the end of the disk. Does nothing without a raw data file. The caller holds the
    /// range lock, and changes the L2 entries to zero entries only after this call.
    ///
    /// # Errors
    /// The errors of requests to the data file. With `NO_FALLBACK` in `flags`, `ENOTSUP` if the data file has no fast way to
    /// write zeroes.
    pub(super) async fn zero_raw_data(&self, from: u64, to: u64, flags: ZeroFlags) -> Result<()> {
        let to = self.image_state.end_of_data(to);
        if !self.image_state.has_raw_data() || from >= to {
            return Ok(());
        }
        let flags = flags & (ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK);
        self.image_state
            .children()
            .require(ChildIdx::DATA)?
            .write_zeroes(from, to - from, flags)
            .await
    }

    /// Discards whole clusters of a data file that is not raw. Does nothing without such a data file. The caller holds the
    /// range lock, and has changed the L2 entries in the cache, so that these entries no longer refer to the clusters.
    pub(super) async fn discard_data(&self, from: u64, to: u64) {
        let to = self.image_state.end_of_data(to);
        if self.image_state.has_raw_data() || from >= to {
            return;
        }
        if let Some(data) = self.image_state.children().get(ChildIdx::DATA) {
            let to = to.min(data.size());
            if from < to {
                // The discard only saves space, so its errors are ignored.
                let _ = data.discard(from, to - from).await;
            }
        }
    }
}
