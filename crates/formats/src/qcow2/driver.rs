//! Implements the trait [`Driver`] and the traits of its optional features for [`Qcow2`]. `Driver::map` looks up host offsets
//! without I/O and without a lock.

use std::sync::Arc;

use oxblk_core::amend::Amend;
use oxblk_core::bitmap::{DirtyBitmap, PersistentBitmaps};
use oxblk_core::check::{Check, CheckReport, Finding, Fix};
use oxblk_core::compact::{self, Compact};
use oxblk_core::driver::{Backing, Compress, Reopen, Resize};
use oxblk_core::snapshot::{SnapshotInfo, Snapshots};
use oxblk_core::vm_state::VmState;
use oxblk_core::{
    BoxFuture, ChildIdx, CompressedCluster, Driver, Errno, Error, ImageInfo, Limits, MapOp,
    Preallocation, Result, Status, Step, Want, WriteFlags, ZeroFlags,
};
use oxblk_ring::{IoBuf, IoBufMut};
use serde_json::json;

use super::Qcow2;
use super::check::check;
use super::compact::Compaction;
use super::image_state::header::{clear_unknown_autoclear, read_header};
use super::image_state::stopped::Replaced;
use super::layout::{Compatible, Incompatible};
use super::mapping::Extent;
use super::snapshots::describe;

/// Size of the unit of encryption, in bytes.
const SECTOR: u32 = 512;

impl Driver for Qcow2 {
    fn map(&self, op: MapOp, offset: u64, len: u64) -> Step {
        if !self.image_state.is_usable() {
            return Step::Slow;
        }
        let Ok(extent) = self.mapping.lookup(offset, len) else { return Step::Slow };
        match (extent, op) {
            (Extent::Data { host, len, .. }, MapOp::Read)
            | (Extent::Data { host, len, owned: true }, MapOp::Write)
                if self.data.is_plain() =>
            {
                Step::Forward { child: self.image_state.data_child(), offset: host, len }
            }
            (Extent::Zero { len, .. }, MapOp::Read) => Step::Zero { len },
            (Extent::Unallocated { len, .. }, MapOp::Read) => {
                match self.image_state.children().has(ChildIdx::BACKING) {
                    true => Step::Forward { child: ChildIdx::BACKING, offset, len },
                    false => Step::Zero { len },
                }
            }
            _ => Step::Slow,
        }
    }

    fn load_map(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async move {
            self.image_state.check_usable()?;
            self.metadata.extent(offset, len).await.map(drop)
        }))
    }

    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        Box::pin(self.read_guest(offset, buf))
    }

    fn write(&self, offset: u64, data: IoBuf, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_guest(offset, data))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.zero_guest(offset, len, flags)))
    }

    fn discard(&self, offset: u64, len: u64) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.discard_guest(offset, len)))
    }

    fn flush(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(self.metadata.write_back(true)))
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        want: Want,
    ) -> Option<BoxFuture<'_, Result<Status>>> {
        Some(Box::pin(self.status(offset, len, want)))
    }

    fn size(&self) -> u64 {
        self.image_state.size()
    }

    fn below_changed(&self) {
        self.clusters.file_changed();
    }

    fn limits(&self) -> Limits {
        let cluster = u32::try_from(self.geometry.cluster_size()).unwrap_or(1);
        let subcluster = u32::try_from(self.geometry.subcluster_size()).unwrap_or(1);
        // Preallocated clusters of an encrypted image may contain no ciphertext. Such clusters do not decrypt to zeroes.
        let is_noise = !self.data.is_plain() && self.mapping.l1_entry(0).0 != 0;
        Limits {
            request_alignment: if self.data.is_plain() { 1 } else { SECTOR },
            write_zeroes_alignment: subcluster,
            discard_alignment: cluster,
            zero_flags: ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK,
            has_zero_init: !is_noise && self.image_state.new_data_is_zero(),
            ..Limits::default()
        }
    }

    fn info(&self) -> ImageInfo {
        let header = self.image_state.header();
        let corrupt =
            !self.image_state.is_usable() || header.incompatible.contains(Incompatible::CORRUPT);
        let mut data =
            json!({ "compat": if self.image_state.version() < 3 { "0.10" } else { "1.1" } });
        data["compression-type"] = self.compression.name().into();
        if self.image_state.version() >= 3 {
            data["lazy-refcounts"] = header.compatible.contains(Compatible::LAZY_REFCOUNTS).into();
        }
        data["refcount-bits"] = self.geometry.refcount_bits().into();
        if self.geometry.data_file {
            if let Some(name) = &header.extensions.data_file {
                data["data-file"] = name.as_str().into();
            }
            data["data-file-raw"] = self.image_state.has_raw_data().into();
        }
        if self.image_state.version() >= 3 {
            data["corrupt"] = corrupt.into();
            data["extended-l2"] = self.geometry.extended_l2.into();
        }
        if let Some(bitmaps) = self.bitmaps.info() {
            data["bitmaps"] = bitmaps;
        }
        if let Some(encryption) = self.data.encryption() {
            data["encrypt"] = encryption.describe();
        }
        ImageInfo {
            is_always_shown: false,
            cluster_size: self.geometry.cluster_size(),
            is_dirty: header.incompatible.contains(Incompatible::DIRTY),
            is_corrupt: corrupt,
            is_encrypted: !self.data.is_plain(),
            vm_state_offset: self.image_state.vm_state_offset(),
            backing_filename: header.backing_file.clone(),
            backing_format: header.extensions.backing_format.clone(),
            can_compress: self.data.is_plain(),
            specific: Some(json!({ "type": "qcow2", "data": data })),
        }
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async {
            self.cleaner.set_interval(std::time::Duration::ZERO);
            self.complete_image().await
        }))
    }

    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }

    fn reopen(&self) -> Option<&dyn Reopen> {
        Some(self)
    }

    fn check(&self) -> Option<&dyn Check> {
        Some(self)
    }

    fn snapshots(&self) -> Option<&dyn Snapshots> {
        Some(self)
    }

    fn vm_state(&self) -> Option<&dyn VmState> {
        Some(self)
    }

    fn compact(&self) -> Option<&dyn Compact> {
        Some(self)
    }

    fn persistent_bitmaps(&self) -> Option<&dyn PersistentBitmaps> {
        Some(self)
    }

    fn amend(&self) -> Option<&dyn Amend> {
        Some(self)
    }

    fn backing(&self) -> Option<&dyn Backing> {
        Some(self)
    }

    fn compress(&self) -> Option<&dyn Compress> {
        // Compressed clusters are stored without encryption, so an encrypted image refuses them.
        if self.data.is_plain() { Some(self) } else { None }
    }
}

impl Resize for Qcow2 {
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.resize_image(size, preallocation))
    }
}

impl Compress for Qcow2 {
    fn write_compressed(&self, offset: u64, data: IoBuf) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.compress_guest(offset, data))
    }

    fn compress(&self, data: IoBuf) -> BoxFuture<'_, Result<CompressedCluster>> {
        Box::pin(self.pack_cluster(data))
    }

    fn store(&self, offset: u64, cluster: CompressedCluster) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.store_cluster(offset, cluster))
    }

    fn end(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.end_with_a_sector())
    }
}

impl Check for Qcow2 {
    fn check<'a>(
        &'a self,
        fix: Fix,
        report: &'a dyn Fn(Finding),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(self.check_image(fix, report))
    }
}

impl Snapshots for Qcow2 {
    fn list(&self) -> BoxFuture<'_, Result<Vec<SnapshotInfo>>> {
        Box::pin(async {
            let list = self.metadata.snapshot_list().await?;
            Ok(list.iter().map(describe).collect())
        })
    }

    fn are_left_out(&self) -> bool {
        self.metadata.snapshot_table().is_broken
    }

    fn create<'a>(&'a self, new: &'a SnapshotInfo) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.snapshots.take_snapshot(new))
    }

    fn apply<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.snapshots.apply_snapshot(id))
    }

    fn delete<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.snapshots.remove_snapshot(id))
    }

    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.snapshots.show_snapshot(id))
    }
}

impl PersistentBitmaps for Qcow2 {
    fn are_supported(&self) -> bool {
        self.image_state.version() >= 3
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<Arc<DirtyBitmap>>>> {
        Box::pin(self.bitmaps.load_bitmaps())
    }

    fn can_store_new(&self, name: &str, granularity: u64) -> Result<()> {
        self.bitmaps.check_can_store(name, granularity)
    }

    fn store(&self, bitmap: &Arc<DirtyBitmap>) -> Result<()> {
        self.bitmaps.add_bitmap(bitmap)
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.bitmaps.remove_bitmap(name))
    }
}

impl Qcow2 {
    /// Checks the file of an open image, and repairs the faults that `fix` requests. The caller has drained the node.
    pub(super) async fn check_image(
        &self,
        fix: Fix,
        report_finding: &dyn Fn(Finding),
    ) -> Result<CheckReport> {
        if fix != Fix::Nothing && self.image_state.is_read_only() {
            return Err(Error::from_errno(Errno::ROFS).prefix("Cannot repair the image"));
        }
        // Write all metadata back, and lower the refcounts of freed clusters.
        self.metadata.close_image().await?;
        let file = self.image_state.file()?;
        // The tables may have moved since the image was opened.
        let header = read_header(&file).await?;
        if fix == Fix::Nothing {
            return check(&file, &header, fix, report_finding).await;
        }
        // The metadata in memory is outdated after a repair. So the image accepts no further requests until it is opened again.
        self.image_state.stop_requests(Replaced::Repair);
        clear_unknown_autoclear(&file, &header).await?;
        check(&file, &header, fix, report_finding).await
    }
}

impl Qcow2 {
    fn compaction(&self) -> Compaction<'_> {
        Compaction::new(
            &self.image_state,
            &self.clusters,
            &self.mapping,
            &self.metadata,
            &self.bitmaps,
            &self.data,
        )
    }
}

impl Compact for Qcow2 {
    fn step(&self, max_bytes: u64) -> BoxFuture<'_, Result<compact::Step>> {
        Box::pin(async move { self.compaction().compact_step(max_bytes).await })
    }

    fn release(&self, from: u64) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async move { self.compaction().release_space(from).await })
    }
}
