//! The on-disk flag "in use" of bitmaps, and its handling in a reopen.
//!
//! The flag is durable before the first request can change a bitmap. After a power cut, a bitmap with this flag is
//! inconsistent.

use std::sync::atomic::Ordering::Release;

use oxblk_core::{ChildIdx, Edge, Error, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::layout::{BitmapEntry, BitmapFlags, Header, encode_bitmap_directory};
use super::Stored;
use super::load::{ONES, read_directory};

impl Qcow2 {
    /// Marks bitmaps as in use, durably: the usable ones, and the enabled ones that are unusable and so miss the
    /// guest's writes. The flags of an entry lie within one sector. No bitmap changes before all flags are durable.
    pub(in super::super) async fn mark_bitmaps_in_use(&self) -> Result<()> {
        let _turn = self.bitmaps.changing.lock().await;
        let state = self.bitmaps.state().clone();
        let Some(place) = state.directory.place else { return Ok(()) };
        let mut marked = state.directory.stored.clone();
        let mut changed = false;
        let live = state.live_by_name();
        // Usable bitmaps and enabled ones may change while the image is written to.
        let changes = |stored: &Stored| {
            live.contains_key(&*stored.entry.name())
                || stored.entry.flags.contains(BitmapFlags::AUTO)
        };
        for stored in marked.iter_mut().filter(|stored| changes(stored)) {
            changed |= !stored.entry.flags.contains(BitmapFlags::IN_USE);
            stored.entry.flags |= BitmapFlags::IN_USE;
        }
        if !changed {
            return Ok(());
        }
        if state.directory.clusters.is_empty() {
            let text = "The bitmap directory overlaps with other metadata";
            return Err(Error::corrupt(text).at(place.directory_offset));
        }
        let bytes = encode_bitmap_directory(marked.iter().map(|stored| &stored.entry));
        let file = self.children.require(ChildIdx::FILE)?;
        file.write(place.directory_offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await?;
        self.bitmaps.state().directory.stored = marked;
        Ok(())
    }

    /// Marks the bitmaps as in use when the image has become writable, or stays writable because a reopen failed. The
    /// marks are durable before the next request. If they cannot be written, the image accepts no more writes.
    pub(in super::super) async fn use_bitmaps(&self) {
        if let Err(error) = self.mark_bitmaps_in_use().await {
            tracing::error!("qcow2: the bitmaps cannot be marked as in use: {error}");
            self.corrupt.store(true, Release);
            return;
        }
        self.set_bitmaps_read_only(false);
    }

    pub(in super::super) fn set_bitmaps_read_only(&self, read_only: bool) {
        let live = self.bitmaps.state().live.clone();
        live.iter().for_each(|bitmap| bitmap.set_read_only(read_only));
    }

    /// Whether the bitmaps on disk in `file` equal the bitmaps in memory.
    pub(in super::super) async fn has_bitmaps_on_disk(
        &self,
        file: &Edge,
        header: &Header,
    ) -> Result<bool> {
        let state = self.bitmaps.state().clone();
        if header.extensions.bitmaps != state.directory.place {
            return Ok(false);
        }
        let Some(place) = state.directory.place else { return Ok(true) };
        let entries: Vec<BitmapEntry> = read_directory(file, &place).await?;
        if !entries.iter().eq(state.directory.stored.iter().map(|stored| &stored.entry)) {
            return Ok(false);
        }
        let mut ones = ONES;
        let live_by_name = state.live_by_name();
        for entry in &entries {
            let Some(live) = live_by_name.get(&*entry.name()) else { continue };
            // Equal entries do not prove equal data: another program may have changed it.
            let table = self.read_bitmap_table(file, entry).await?;
            let there = self.read_bitmap(file, entry, &table, &mut ones).await;
            let here = live.map();
            if !there.is_ok_and(|there| there.areas().eq(here.areas())) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
