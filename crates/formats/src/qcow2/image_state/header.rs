//! The header of an open image: its current contents, and rewriting it safely.
//!
//! The disk writes a sector completely or not at all. A single field lies within one sector, so a field is changed in place
//! with one write. The complete header, with its extensions and the backing file's name, is often longer than a sector. A power
//! cut may then leave some of its sectors unwritten. So [`write_complete_header`] uses an intermediate header that fits in one
//! sector:
//!
//! 1. if the image has a backing file, write a copy of the old backing file's name behind the end of both the old and the new
//!    header;
//! 2. write the old header in its shortest form to sector 0; this form needs nothing behind sector 0 except the copy;
//! 3. write the part of the new header behind sector 0;
//! 4. write sector 0 of the new header;
//! 5. overwrite the copy with zeroes.
//!
//! Each step is written and flushed before the next step begins. So a power cut leaves the old header or the new header. If
//! only sector 0 changes, step 4 alone suffices. The shortest form of an old header may be longer than a sector (because of a
//! long data file name, or unknown extensions), or the first cluster may have no space for the copy. Then the header is
//! replaced in one write. A power cut may tear this write.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Release};
use std::sync::{PoisonError, RwLock};

use oxblk_core::{Edge, Result, WriteFlags, names};
use oxblk_ring::{IoBuf, IoBufMut, Mutex as AsyncMutex, MutexGuard};

use super::ImageState;
use crate::qcow2::layout::{Autoclear, Header, Incompatible, field_offsets, header_extent};
use crate::qcow2::read_ahead::read_ahead;

/// Unit that the disk writes completely or not at all, in bytes.
const SECTOR: usize = 512;
/// Maximum size of the first read of the header. This is usually enough for the header and all its extensions.
const FIRST_READ: u64 = 64 << 10;

/// The header as it was last read or written. While the image is open, the table sizes and table offsets in this value may
/// be out of date: `Clusters`, `Mapping` and `Metadata` have the current values.
pub(in crate::qcow2) struct HeaderState {
    current: RwLock<Arc<Header>>,
    /// The header lock. Held while the header is replaced, while feature bits are changed, and while passwords are changed.
    /// Changes of the disk size and of table offsets and lengths in place do not hold the lock.
    lock: AsyncMutex<()>,
}

impl HeaderState {
    pub(in crate::qcow2) fn new(header: Header) -> Self {
        Self { current: RwLock::new(Arc::new(header)), lock: AsyncMutex::new(()) }
    }

    fn set(&self, header: Header) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(header);
    }
}

impl ImageState {
    /// The header in memory. Features, extensions and the backing file are current, apart from the bitmaps extension and its
    /// autoclear bit (see `Bitmaps`). For table offsets, use [`Self::header_on_disk`].
    pub(in crate::qcow2) fn header(&self) -> Arc<Header> {
        Arc::clone(&self.header.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the complete current header from disk. Every change of the header is on disk before it takes effect in memory.
    pub(in crate::qcow2) async fn header_on_disk(&self) -> Result<Header> {
        let file = self.file()?;
        read_header(&file).await
    }

    /// Replaces the header in memory with `header`. The caller has read `header` from the disk again.
    pub(in crate::qcow2) fn adopt_header(&self, header: Header) {
        self.header.set(header);
    }

    /// Takes the header lock. While the lock is held, other tasks change at most the disk size and the offsets and lengths of
    /// tables in the header.
    pub(in crate::qcow2) async fn lock_header(&self) -> MutexGuard<'_, ()> {
        self.header.lock.lock().await
    }

    /// Applies `change` to the header, its extensions and the backing file's name, and writes and flushes the new header. A
    /// power cut leaves the old or the new header (see the module's text for an exception). All structures to which the new
    /// header refers must already be flushed. A growing refcount table changes its pointer in the header, so the caller holds
    /// the header lock and the lock of the refcount table.
    ///
    /// # Errors
    /// The errors of [`Header::encode`], before anything is written; the errors of requests to the image file.
    pub(in crate::qcow2) async fn replace_header(
        &self,
        (_header, _table): (&MutexGuard<'_, ()>, &MutexGuard<'_, ()>),
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let file = self.file()?;
        let old = read_header(&file).await?;
        let mut new = old.clone();
        change(&mut new);
        // A header that cannot be encoded is refused before the first write.
        new.encode()?;
        let guard = StopOnDrop::new(&self.disabled);
        if let Err(error) = write_complete_header(&file, &old, &new).await {
            let restored = async {
                write_complete_header(&file, &old, &old).await?;
                file.flush().await
            };
            if let Err(again) = self.stop_on_failure(restored).await {
                tracing::error!(
                    "qcow2: the header on disk is in an unknown state; the image accepts no further requests: {again}"
                );
            }
            guard.disarm();
            return Err(error);
        }
        guard.disarm();
        self.header.set(new);
        Ok(())
    }

    /// Sets or clears bits of incompatible features in the header, and flushes.
    pub(in crate::qcow2) async fn set_incompatible(
        &self,
        bits: Incompatible,
        on: bool,
    ) -> Result<()> {
        let _guard = self.header.lock.lock().await;
        let mut header = Header::clone(&self.header());
        header.incompatible.set(bits, on);
        let bytes = header.incompatible.bits().to_be_bytes();
        self.write_header_field(field_offsets::INCOMPATIBLE, &bytes).await?;
        self.header.set(header);
        Ok(())
    }

    /// Sets the autoclear bits on disk to `maintained` and the bit of a raw data file. All other bits are cleared, because this
    /// program does not update the data of their features. `maintained`: bits of features whose data this program keeps valid.
    /// Does nothing in version 2.
    pub(in crate::qcow2) async fn clear_autoclear(&self, maintained: Autoclear) -> Result<()> {
        let _guard = self.header.lock.lock().await;
        let mut header = Header::clone(&self.header());
        let mut kept = maintained;
        kept.set(Autoclear::RAW_DATA_FILE, self.has_raw_data());
        if self.version < 3 || header.autoclear == kept {
            return Ok(());
        }
        header.autoclear = kept;
        self.write_header_field(field_offsets::AUTOCLEAR, &kept.bits().to_be_bytes()).await?;
        self.header.set(header);
        Ok(())
    }

    /// Calls [`stop_on_failure`] with the flag that stops all requests to this image.
    pub(in crate::qcow2) async fn stop_on_failure<T>(
        &self,
        change: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        stop_on_failure(change, &self.disabled).await
    }

    /// Changes a field of the header from `old` to `new`, and flushes.
    ///
    /// # Errors
    /// The errors of requests to the image file. After an error, `old` is written and flushed again. If this fails too, the
    /// image accepts no further requests.
    pub(in crate::qcow2) async fn exchange_header_field(
        &self,
        offset: u64,
        old: &[u8],
        new: &[u8],
    ) -> Result<()> {
        let file = self.file()?;
        exchange(&file, offset, old, new, &self.disabled).await
    }

    async fn write_header_field(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let file = self.file()?;
        write_field(&file, offset, bytes).await
    }

    /// The bytes of the adjacent header fields that describe the active disk state: size, encryption method, number of L1
    /// entries, and L1 offset. These fields lie within one sector.
    pub(in crate::qcow2) fn active_fields(&self, size: u64, entries: u32, offset: u64) -> Vec<u8> {
        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(self.header().crypt_method.number().to_be_bytes());
        fields.extend(entries.to_be_bytes());
        fields.extend(offset.to_be_bytes());
        fields
    }
}

async fn write_field(file: &Edge, offset: u64, bytes: &[u8]) -> Result<()> {
    file.write(offset, IoBuf::from(bytes.to_vec()), WriteFlags::empty()).await?;
    file.flush().await
}

/// Clears unknown autoclear bits of `header` on disk, because a repair does not update the data of unknown features. The bits
/// are cleared before the first write of the repair, so that a repair that fails leaves no outdated data. The caller is the
/// only user of the header.
pub(in crate::qcow2) async fn clear_unknown_autoclear(file: &Edge, header: &Header) -> Result<()> {
    let known = header.autoclear & (Autoclear::BITMAPS | Autoclear::RAW_DATA_FILE);
    if header.version < 3 || known == header.autoclear {
        return Ok(());
    }
    write_field(file, field_offsets::AUTOCLEAR, &known.bits().to_be_bytes()).await
}

/// Reads the header and its extensions.
pub(in crate::qcow2) async fn read_header(file: &Edge) -> Result<Header> {
    let size = file.size();
    let len = usize::try_from(size.min(FIRST_READ)).unwrap_or(0);
    let mut head = read_ahead(file, 0, len).await.bytes;
    loop {
        let have = u64::try_from(head.len()).unwrap_or(u64::MAX);
        let needed = header_extent(&head).min(size);
        if needed <= have {
            return Header::parse(&head, size);
        }
        let more = IoBufMut::new(usize::try_from(needed - have).unwrap_or(0));
        let more = file.read(have, more).await;
        head.extend_from_slice(&more.map_err(|e| e.prefix("Could not read qcow2 header"))?);
    }
}

/// Runs `change` to change a pointer on disk. Sets `stop` if `change` fails or is cancelled, so that nothing more is written
/// to the image. The pointer may then have its old or its new value. A later change of only the old or only the new structure
/// would be lost if the pointer refers to the other structure.
pub(in crate::qcow2) async fn stop_on_failure<T>(
    change: impl Future<Output = Result<T>>,
    stop: &AtomicBool,
) -> Result<T> {
    let guard = StopOnDrop::new(stop);
    let outcome = change.await;
    if outcome.is_ok() {
        guard.disarm();
    }
    outcome
}

/// A guard that exists while the value of a pointer on disk is unknown. If the guard is dropped before [`Self::disarm`] is
/// called, because the change has failed or was cancelled, the flag is set. Without this, requests would continue with the old
/// value of the pointer.
struct StopOnDrop<'a>(Option<&'a AtomicBool>);

impl<'a> StopOnDrop<'a> {
    fn new(stop: &'a AtomicBool) -> Self {
        Self(Some(stop))
    }

    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(stop) = self.0 {
            stop.store(true, Release);
        }
    }
}

/// Changes a pointer at `offset` in the file from `old` to `new`, and flushes.
///
/// # Errors
/// The errors of requests to the image file. After a failed write or flush, the disk may contain either value. So `old` is
/// written and flushed. If this succeeds, the pointer has the value `old`. Otherwise `stop` is set.
pub(in crate::qcow2) async fn exchange(
    file: &Edge,
    offset: u64,
    old: &[u8],
    new: &[u8],
    stop: &AtomicBool,
) -> Result<()> {
    let guard = StopOnDrop::new(stop);
    let Err(error) = write_field(file, offset, new).await else {
        guard.disarm();
        return Ok(());
    };
    let restored = stop_on_failure(write_field(file, offset, old), stop).await;
    guard.disarm();
    if let Err(again) = restored {
        tracing::error!(
            "qcow2: the pointer at offset {offset:#x} is in an unknown state; the image accepts no further requests: {again}"
        );
    }
    Err(error)
}

/// Replaces `old`, the header in the file, with `new`. The module's text describes the steps.
///
/// # Errors
/// The errors of [`Header::encode`], before anything is written; the errors of requests to the image file.
pub(in crate::qcow2) async fn write_complete_header(
    file: &Edge,
    old: &Header,
    new: &Header,
) -> Result<()> {
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
                    write_and_flush(file, free, name).await?;
                }
                write_and_flush(file, 0, head).await?;
                write_and_flush(file, SECTOR, part(SECTOR, end)).await?;
            }
            None => return write_and_flush(file, 0, part(0, end)).await,
        }
    }
    write_and_flush(file, 0, part(0, SECTOR)).await?;
    if let Some((offset, len)) = spare {
        write_and_flush(file, offset, vec![0; len]).await?;
    }
    Ok(())
}

/// The header's shortest form, padded to a sector, and the backing file's name. The caller must write the name at `free`.
/// `None` if the short header does not fit in a sector, or the name does not fit in the first cluster.
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

async fn write_and_flush(file: &Edge, offset: usize, bytes: Vec<u8>) -> Result<()> {
    let offset = u64::try_from(offset).unwrap_or(u64::MAX);
    file.write(offset, IoBuf::from(bytes), WriteFlags::empty()).await?;
    file.flush().await
}
