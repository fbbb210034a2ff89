//! Setting the on-disk flag "in use" of bitmaps when an image is opened or becomes writable.
//!
//! The flag is written and flushed before the first request can change a bitmap. A bitmap that has the flag when the image is
//! opened, for example after a power cut, is inconsistent.

use oxblk_core::{Error, Result, WriteFlags};
use oxblk_ring::IoBuf;

use super::super::layout::{BitmapFlags, encode_bitmap_directory};
use super::Bitmaps;
use super::Stored;

impl Bitmaps {
    /// Marks the usable bitmaps as in use on disk, and flushes. Unusable bitmaps with the flag "auto" are marked too, because
    /// these bitmaps do not record the guest's writes. A torn write is harmless: the flags of an entry lie within one sector,
    /// and no bitmap changes before all flags are flushed.
    pub(super) async fn mark_bitmaps_in_use(&self) -> Result<()> {
        let _guard = self.changing.lock().await;
        let state = self.state().clone();
        let Some(place) = state.directory.place else { return Ok(()) };
        let mut marked = state.directory.stored.clone();
        let mut changed = false;
        let live = state.live_by_name();
        // After a write to the image, the copies on disk of usable bitmaps and of bitmaps with "auto" may be out of date.
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
        let file = self.image_state.file()?;
        file.write(place.directory_offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
        file.flush().await?;
        self.state().directory.stored = marked;
        Ok(())
    }

    /// Marks the bitmaps as in use on disk, and makes the bitmaps writable in memory. This function is called when the image
    /// becomes writable, or stays writable because a reopen or an amend has failed. The marks are flushed before the next
    /// request. If the marks cannot be written, the image fails all further requests.
    pub(in super::super) async fn use_bitmaps(&self) {
        if let Err(error) = self.mark_bitmaps_in_use().await {
            tracing::error!("qcow2: the bitmaps cannot be marked as in use: {error}");
            self.image_state.disable();
            return;
        }
        self.set_bitmaps_read_only(false);
    }

    pub(in super::super) fn set_bitmaps_read_only(&self, read_only: bool) {
        let live = self.state().live.clone();
        live.iter().for_each(|bitmap| bitmap.set_read_only(read_only));
    }
}
