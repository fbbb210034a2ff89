//! The header of an open image: what it says now, and writing all of it anew.
//!
//! A single field lies within a sector, and a sector is written whole or not at all; so the fields are changed in place,
//! one write each. The header as a whole, with its extensions and the backing file's name, often is longer, and a power
//! cut may leave any of its sectors as they were. [`write_whole`] goes through a form in between that is one sector:
//!
//! 1. a copy of the old backing file's name is put where neither the old header nor the new one reaches;
//! 2. sector 0 becomes the old header in its shortest form, which refers to nothing behind it but that copy;
//! 3. all that the new header has behind sector 0 is written;
//! 4. sector 0 becomes that of the new header;
//! 5. the copy is wiped out.
//!
//! Each step is durable before the next one. So a power cut leaves the old header or the new one. Where only sector 0
//! changes, step 4 is all. An old header whose shortest form is longer than a sector (a long name of a data file, or
//! extensions that are not known) is replaced in one write that a power cut may tear.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Release};
use std::sync::{PoisonError, RwLock};

use oxblk_core::{ChildIdx, Edge, Result, WriteFlags, names};
use oxblk_ring::{IoBuf, IoBufMut, Mutex as AsyncMutex, MutexGuard};

use super::Qcow2;
use super::layout::{Autoclear, Header, Incompatible, field_offsets};
use super::open::read_header;

/// What is written whole or not at all, in bytes.
const SECTOR: usize = 512;

/// The header as it was last read or written. Sizes and places of tables are kept elsewhere while the image is open.
pub(super) struct HeaderState {
    now: RwLock<Arc<Header>>,
    /// Held while more than the place of a table is written, and while passwords are changed.
    turn: AsyncMutex<()>,
}

impl HeaderState {
    pub(super) fn new(header: Header) -> Self {
        Self { now: RwLock::new(Arc::new(header)), turn: AsyncMutex::new(()) }
    }

    fn set(&self, header: Header) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(header);
    }
}

impl Qcow2 {
    /// Features, extensions and the backing file as the header tells them. Where tables lie is told by
    /// [`Self::header_on_disk`].
    pub(super) fn header(&self) -> Arc<Header> {
        Arc::clone(&self.header.now.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// All that the header says now: every change of it is on disk before it counts.
    pub(super) async fn header_on_disk(&self) -> Result<Header> {
        let file = self.children.require(ChildIdx::FILE)?;
        read_header(&file).await
    }

    /// Takes in a header that has been read anew.
    pub(super) fn adopt_header(&self, header: Header) {
        self.header.set(header);
    }

    /// Writes the header, its extensions and the backing file's name as `change` makes them, durably. A power cut
    /// leaves the old ones or the new ones. What the new header refers to must be durable.
    ///
    /// # Errors
    /// As [`Header::encode`], before anything is written; as the file reports.
    pub(super) async fn rewrite_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let turn = self.hold_header().await;
        self.rewrite_held_header(&turn, change).await
    }

    /// Nobody else writes more of the header than the place of a table while this lives.
    pub(super) async fn hold_header(&self) -> MutexGuard<'_, ()> {
        self.header.turn.lock().await
    }

    /// As [`Self::rewrite_header`], for whom holds the header.
    pub(super) async fn rewrite_held_header(
        &self,
        _turn: &MutexGuard<'_, ()>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        // A refcount table that grows has the header name it.
        let _table = self.refcounts.hold_table().await;
        let file = self.children.require(ChildIdx::FILE)?;
        let old = read_header(&file).await?;
        let mut new = old.clone();
        change(&mut new);
        // What cannot be written is refused before anything is.
        new.encode()?;
        let unknown = UntilKnown::new(&self.corrupt);
        if let Err(error) = write_whole(&file, &old, &new).await {
            let restored = async {
                write_whole(&file, &old, &old).await?;
                file.flush().await
            };
            if let Err(again) = self.stop_unless_known(restored).await {
                tracing::error!(
                    "qcow2: the header may have changed, so that nothing is written any more: {again}"
                );
            }
            unknown.known();
            return Err(error);
        }
        unknown.known();
        self.header.set(new);
        Ok(())
    }

    /// Sets or clears incompatible features, durably.
    pub(super) async fn set_incompatible(&self, bits: Incompatible, on: bool) -> Result<()> {
        let _turn = self.header.turn.lock().await;
        let mut header = Header::clone(&self.header());
        header.incompatible.set(bits, on);
        let bytes = header.incompatible.bits().to_be_bytes();
        self.write_header_field(field_offsets::INCOMPATIBLE, &bytes).await?;
        self.header.set(header);
        Ok(())
    }

    /// Features that this program does not keep up to date must not be believed after it has written.
    pub(super) async fn clear_autoclear(&self) -> Result<()> {
        let _turn = self.header.turn.lock().await;
        let mut header = Header::clone(&self.header());
        let mut kept = self.bitmaps.autoclear();
        kept.set(Autoclear::RAW_DATA_FILE, self.has_raw_data());
        if self.version < 3 || header.autoclear == kept {
            return Ok(());
        }
        header.autoclear = kept;
        self.write_header_field(field_offsets::AUTOCLEAR, &kept.bits().to_be_bytes()).await?;
        self.header.set(header);
        Ok(())
    }

    /// As [`stop_unless_known`], for this image.
    pub(super) async fn stop_unless_known<T>(
        &self,
        named: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        stop_unless_known(named, &self.corrupt).await
    }

    /// Has a field of the header say `new` in the place of `old`, durably.
    ///
    /// # Errors
    /// As the file reports. The field then says `old`, durably; if that could not be had either, nothing is written to the
    /// image any more.
    pub(super) async fn exchange_header_field(
        &self,
        offset: u64,
        old: &[u8],
        new: &[u8],
    ) -> Result<()> {
        let file = self.children.require(ChildIdx::FILE)?;
        exchange(&file, offset, old, new, &self.corrupt).await
    }

    pub(super) async fn write_header_field(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let file = self.children.require(ChildIdx::FILE)?;
        file.write(offset, IoBuf::from(bytes.to_vec()), WriteFlags::empty()).await?;
        file.flush().await
    }
}

/// Sets `stop`, so that nothing is written any more, if `named`, which has a pointer name something else, fails or does not
/// come to its end: what it names then is not known, and what only one of the two knows of would be lost with the other.
pub(super) async fn stop_unless_known<T>(
    named: impl Future<Output = Result<T>>,
    stop: &AtomicBool,
) -> Result<T> {
    let unknown = UntilKnown::new(stop);
    let outcome = named.await;
    if outcome.is_ok() {
        unknown.known();
    }
    outcome
}

/// While this lives it is not known what a pointer on disk names. Dropped so, because the thread ended halfway, it sets
/// `stop`: memory would go on with the old one.
struct UntilKnown<'a>(Option<&'a AtomicBool>);

impl<'a> UntilKnown<'a> {
    fn new(stop: &'a AtomicBool) -> Self {
        Self(Some(stop))
    }

    fn known(mut self) {
        self.0 = None;
    }
}

impl Drop for UntilKnown<'_> {
    fn drop(&mut self) {
        if let Some(stop) = self.0 {
            stop.store(true, Release);
        }
    }
}

/// Has a pointer at `offset` in the file name `new` in the place of `old`, durably.
///
/// # Errors
/// As the file reports. After a write or a flush that failed the medium may have either; so `old` is written once more, and
/// if that succeeds it is what the pointer names. If not, `stop` is set.
pub(super) async fn exchange(
    file: &Edge,
    offset: u64,
    old: &[u8],
    new: &[u8],
    stop: &AtomicBool,
) -> Result<()> {
    let write = async |bytes: &[u8]| {
        file.write(offset, IoBuf::from(bytes.to_vec()), WriteFlags::empty()).await?;
        file.flush().await
    };
    let unknown = UntilKnown::new(stop);
    let Err(error) = write(new).await else {
        unknown.known();
        return Ok(());
    };
    let restored = stop_unless_known(write(old), stop).await;
    unknown.known();
    if let Err(again) = restored {
        tracing::error!(
            "qcow2: a pointer at offset {offset:#x} may have changed, so that nothing is written any more: {again}"
        );
    }
    Err(error)
}

/// Puts `new` in the place of `old`, which is what the file's header says; see the module's text.
///
/// # Errors
/// As [`Header::encode`], before anything is written; as the file reports.
pub(super) async fn write_whole(file: &Edge, old: &Header, new: &Header) -> Result<()> {
    let len = usize::try_from(new.geometry.cluster_size()).unwrap_or(usize::MAX);
    let encoded = new.encode()?;
    let before = file.read(0, IoBufMut::new(len)).await?;
    let mut after = encoded.clone();
    after.resize(len, 0);
    let end = after.iter().zip(before.iter()).rposition(|(new, old)| new != old);
    let Some(end) = end.map(|last| last.saturating_add(1).next_multiple_of(SECTOR)) else {
        return Ok(());
    };
    let used = before.iter().rposition(|byte| *byte != 0).map_or(0, |last| last.saturating_add(1));
    let part = |from: usize, to: usize| after.get(from..to.min(len)).unwrap_or_default().to_vec();
    let mut spare = None;
    if end > SECTOR {
        let free = used.max(encoded.len()).next_multiple_of(SECTOR);
        match shorten(old, free) {
            Some((head, name)) => {
                if let Some(name) = name {
                    spare = Some((free, name.len()));
                    put(file, free, name).await?;
                }
                put(file, 0, head).await?;
                put(file, SECTOR, part(SECTOR, end)).await?;
            }
            None => return put(file, 0, part(0, end)).await,
        }
    }
    put(file, 0, part(0, SECTOR)).await?;
    if let Some((offset, len)) = spare {
        put(file, offset, vec![0; len]).await?;
    }
    Ok(())
}

/// The header's shortest form, if it is no longer than a sector, padded to one; and the backing file's name, which is
/// to lie at `free`, if there is room for it in the first cluster.
fn shorten(header: &Header, free: usize) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let name = header.backing_file.as_ref().map(|name| names::to_bytes(name).into_owned());
    let end = free.checked_add(name.as_ref().map_or(0, Vec::len))?;
    if u64::try_from(end).ok()? > header.geometry.cluster_size() {
        return None;
    }
    let mut head = header.encode_short(u64::try_from(free).ok()?);
    if head.len() > SECTOR {
        return None;
    }
    head.resize(SECTOR, 0);
    Some((head, name))
}

async fn put(file: &Edge, offset: usize, bytes: Vec<u8>) -> Result<()> {
    let offset = u64::try_from(offset).unwrap_or(u64::MAX);
    file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
    file.flush().await
}
