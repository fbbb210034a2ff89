//! Reopen: changing the read-only mode of an image and the size of its cache.
//!
//! Before an image becomes read-only, all of its metadata is written to disk and the need-check flag is removed. An image
//! that becomes writable must have the same header and L1 table on disk as in memory: if locking is off, another program
//! may have written to the image. For the same reason, the cached slices of the image are dropped.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::driver::Reopen;
use oxblk_core::{BoxFuture, Edge, Error, OpenFlags, Options, Result};
use roaring::RoaringBitmap;

use super::open::{OpenOptions, read_header};
use super::{Qed, lock};
use crate::not_writable;

/// A prepared reopen, before commit or abort.
#[derive(Debug)]
pub(super) struct Prepared {
    read_only: bool,
    l2_slices: usize,
    /// The clusters in use, if the image becomes writable.
    used: Option<RoaringBitmap>,
}

impl Qed {
    async fn prepare_reopen(&self, flags: OpenFlags, mut options: Options) -> Result<Prepared> {
        let own: OpenOptions = options.extract()?;
        if let Some(key) = options.first_key() {
            return Err(Error::invalid(format!("Cannot change the option '{key}'")));
        }
        let mut used = None;
        match (self.is_read_only(), flags.read_only) {
            (true, false) => used = Some(self.check_can_be_written().await?),
            (false, true) => self.complete_image().await?,
            _ => {}
        }
        let l2_slices = own.slices(self.slice_words);
        Ok(Prepared { read_only: flags.read_only, l2_slices, used })
    }

    /// Checks that a read-only image can become writable, and returns the clusters that are in use.
    async fn check_can_be_written(&self) -> Result<RoaringBitmap> {
        let file = self.file()?;
        let state = read_header(&file).await?;
        if state.header.need_check || state.header.autoclear_features != 0 {
            return Err(not_writable::not_closed());
        }
        let same = state.header == self.header().header && state.backing == self.header().backing;
        if !same || !self.is_l1_same(&file).await? {
            return Err(not_writable::changed_meanwhile());
        }
        self.l2.clear();
        self.used_clusters(&file).await
    }

    async fn is_l1_same(&self, file: &Edge) -> Result<bool> {
        let mut disk = BTreeMap::new();
        self.read_l1(file, |index, entry| {
            disk.insert(index, entry);
        })
        .await?;
        let entry = |index| disk.get(&index).copied().unwrap_or(0);
        Ok((0..self.geometry.l1_entries()).all(|index| self.l1_entry(index) == entry(index)))
    }
}

impl Reopen for Qed {
    fn prepare(&self, flags: OpenFlags, options: &Options) -> BoxFuture<'_, Result<()>> {
        let options = options.clone();
        Box::pin(async move {
            let prepared = self.prepare_reopen(flags, options).await?;
            *lock(&self.prepared) = Some(prepared);
            Ok(())
        })
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let Some(prepared) = lock(&self.prepared).take() else { return };
            if let (Some(used), Ok(file)) = (&prepared.used, self.file()) {
                self.file_end.store(file.size(), Relaxed);
                self.allow_allocations(&file, used);
            }
            self.l2.set_limit(prepared.l2_slices);
            self.read_only.store(prepared.read_only, Relaxed);
        })
    }

    fn abort(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            lock(&self.prepared).take();
        })
    }
}
