//! The mark on disk that a bitmap is in use, and what a reopen does about it.

use std::sync::atomic::Ordering::Release;

use oxblk_core::{ChildIdx, Edge, Error, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::super::Qcow2;
use super::super::layout::{BitmapEntry, BitmapFlags, Header, encode_bitmap_directory};
use super::load::read_directory;
use super::{State, Stored};

impl State {
    /// Whether the bitmap changes, or may, while the image is written to.
    fn changes(&self, stored: &Stored) -> bool {
        let is_live = self.live.iter().any(|live| *live.name() == *stored.entry.name());
        is_live || stored.entry.flags.contains(BitmapFlags::AUTO)
    }
}

impl Qcow2 {
    /// Marks the bitmaps as in use, durably: those that can be used, and those that nobody keeps up to date though
    /// they should be. The flags lie within a sector each, and until all are durable nothing changes.
    pub(in super::super) async fn mark_bitmaps_in_use(&self) -> Result<()> {
        let _turn = self.bitmaps.changing.lock().await;
        let state = self.bitmaps.state().clone();
        let Some(place) = state.directory.place else { return Ok(()) };
        let mut marked = state.directory.stored.clone();
        let mut changed = false;
        for stored in marked.iter_mut().filter(|stored| state.changes(stored)) {
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

    /// The image has become writable, or stays so after all: its bitmaps are in use from before the next request.
    /// If that cannot be said on disk, nothing is written any more.
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

    /// Whether the image in `file` has the bitmaps that are in memory, as they are there.
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
        for entry in &entries {
            let Some(live) = state.live.iter().find(|live| *live.name() == *entry.name()) else {
                continue;
            };
            // Equal entries do not tell that nobody has put other data there.
            let table = self.read_bitmap_table(file, entry).await?;
            let mut unlimited = u64::MAX;
            let there = self.read_bitmap(file, entry, &table, &mut unlimited).await;
            let here = live.map();
            if !there.is_ok_and(|there| there.areas().eq(here.areas())) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
