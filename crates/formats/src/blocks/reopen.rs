//! Reopen: making an image read-only or writable.
//!
//! An image that becomes read-only writes all its metadata while it is still writable. An image that becomes writable must
//! have the same header and map on disk as in memory: without file locks, another program may have written to the image
//! while it was read-only.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::{Error, ErrorKind, OpenFlags, Options, Result};
use oxblk_ring::IoBufMut;

use super::{EntryMap, lock};
use crate::not_writable::changed_meanwhile;

/// Whether an image may be written, and a reopen that is prepared to change this mode. `S` is the survey of the map of an
/// image that becomes writable.
#[derive(Debug)]
pub(crate) struct WriteAccess<S> {
    read_only: AtomicBool,
    /// A prepared reopen, before commit or abort.
    prepared: Mutex<Option<Prepared<S>>>,
}

#[derive(Debug)]
struct Prepared<S> {
    read_only: bool,
    survey: Option<S>,
}

impl<S> WriteAccess<S> {
    pub(crate) fn new(read_only: bool) -> Self {
        Self { read_only: AtomicBool::new(read_only), prepared: Mutex::default() }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Relaxed)
    }

    /// Refuses to write to a read-only image.
    ///
    /// # Errors
    /// `ReadOnly` if the image is read-only.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "Image is read-only"));
        }
        Ok(())
    }
}

/// An open image that a reopen can make read-only or writable.
pub(crate) trait Reopenable {
    /// The result of checking the complete map.
    type Survey;

    fn access(&self) -> &WriteAccess<Self::Survey>;

    /// Writes all metadata to the image. The image must stay writable after this call, because the reopen may be aborted.
    async fn complete(&self) -> Result<()>;

    /// Whether the header in the file equals the header in memory.
    ///
    /// # Errors
    /// The errors of requests to the image file, and reasons why the image cannot be written.
    async fn is_header_same(&self) -> Result<bool>;

    fn map(&self) -> &EntryMap;

    /// Reads the chunk of the map with the entry at `index` from the file.
    async fn read_chunk(&self, index: u32) -> Result<IoBufMut>;

    /// Checks the complete map of an image that will be written.
    async fn survey_to_write(&self) -> Result<Self::Survey>;

    /// Sets the blocks in use in the allocator.
    fn begin_to_write(&self, survey: &Self::Survey);
}

/// Prepares a reopen with these flags.
///
/// # Errors
/// Fails if an option remains, because no option of the format can be changed. Also fails if the metadata cannot be
/// written, or if the image must not become writable.
pub(crate) async fn prepare<T: Reopenable>(
    image: &T,
    flags: OpenFlags,
    options: &Options,
) -> Result<()> {
    if let Some(key) = options.first_key() {
        return Err(Error::invalid(format!("Cannot change the option '{key}'")));
    }
    let mut survey = None;
    match (image.access().is_read_only(), flags.read_only) {
        (true, false) => {
            require_unchanged(image).await?;
            survey = Some(image.survey_to_write().await?);
        }
        (false, true) => image.complete().await?,
        _ => {}
    }
    let prepared = Prepared { read_only: flags.read_only, survey };
    *lock(&image.access().prepared) = Some(prepared);
    Ok(())
}

/// Commits the prepared reopen, if there is one.
pub(crate) fn commit<T: Reopenable>(image: &T) {
    let access = image.access();
    let Some(prepared) = lock(&access.prepared).take() else { return };
    if let Some(survey) = &prepared.survey {
        image.begin_to_write(survey);
    }
    access.read_only.store(prepared.read_only, Relaxed);
}

/// Discards the prepared reopen, if there is one.
pub(crate) fn abort<T: Reopenable>(image: &T) {
    lock(&image.access().prepared).take();
}

/// Checks that the header and the loaded chunks of the map are the same in the file and in memory.
async fn require_unchanged<T: Reopenable>(image: &T) -> Result<()> {
    if !image.is_header_same().await? {
        return Err(changed_meanwhile());
    }
    let map = image.map();
    let mut start = 0;
    while start < map.len() {
        if map.is_loaded(start) && !map.is_same(start, &image.read_chunk(start).await?) {
            return Err(changed_meanwhile());
        }
        start = map.chunk_of(start).end;
    }
    Ok(())
}
