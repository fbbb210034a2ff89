//! Conversion of a disk: [`Convert`] creates a new image, copies the disk into it with [`crate::copy`], and closes the image.
//!
//! If the creation or the copy fails or is stopped, files of the target that did not exist before are removed, so that no
//! incomplete image remains.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use oxblk_core::create::Creation;
use oxblk_core::{Attachment, Error, ErrorKind, Node, Perm, Permissions, names};
use oxblk_ring::{IoThread, try_thread_index};

use crate::copy::{self, Copy, CopyError, CopyOptions, Observer, Stage};
use crate::{Cache, Create, Disk, IoThreads, NewFormat, Request, Result};

/// Is called with the number of bytes done and the total number of bytes.
type Progress = Box<dyn Fn(u64, u64) + Send + Sync>;

/// A copy of a disk into a new image.
///
/// The data of the complete backing chain of the source is copied into one image. Aligned blocks of 4 KiB that contain only
/// zeroes (with compression: clusters) are not stored as data. All I/O threads of the source work on the copy. The layout of
/// the image is the same on every run.
///
/// ```no_run
/// # fn main() -> oxblk::Result<()> {
/// use oxblk::{Convert, Disk, Format};
///
/// let source = Disk::open_read_only("disk.raw").wait()?;
/// Convert::new(&source, "disk.qcow2", Format::Qcow2)
///     .compress(true)
///     .progress(|done, total| println!("{done} of {total} bytes"))
///     .run()
///     .wait()?;
/// source.close().wait()
/// # }
/// ```
pub struct Convert {
    source: Disk,
    target: String,
    create: Create,
    options: CopyOptions,
    progress: Option<Progress>,
    stop: Arc<AtomicBool>,
}

/// A handle with which any thread can stop a running conversion.
#[derive(Debug, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Stops the conversion before its next chunk, or when the next operation of the creation of the target has ended.
    /// The conversion then fails with [`ErrorKind::Cancelled`], and files of the target that did not exist before are
    /// removed. If all chunks are copied, the call has no effect.
    pub fn stop(&self) {
        self.0.store(true, Relaxed);
    }
}

impl Convert {
    /// A copy of `source` into a new image at `target`. An existing file at `target` is overwritten; it must not be a file of
    /// the source.
    pub fn new(source: &Disk, target: impl AsRef<Path>, format: impl Into<NewFormat>) -> Self {
        Self {
            create: Create::new(target.as_ref(), format, source.size()),
            target: names::from_os(target.as_ref()),
            source: source.clone(),
            options: CopyOptions::default(),
            progress: None,
            stop: Arc::default(),
        }
    }

    /// Whether to write compressed clusters.
    #[must_use]
    pub fn compress(mut self, compress: bool) -> Self {
        self.options.compress = compress;
        self
    }

    /// Whether unreadable data is copied as zeroes and is not an error.
    #[must_use]
    pub fn salvage(mut self, salvage: bool) -> Self {
        self.options.salvage = salvage;
        self
    }

    /// Limits the rate of copying, in bytes per second.
    #[must_use]
    pub fn rate(mut self, rate: u64) -> Self {
        self.options.rate = Some(rate);
        self
    }

    /// Calls `progress` with the number of bytes done, in increasing order, and the total number. The calls come from I/O
    /// threads.
    #[must_use]
    pub fn progress(mut self, progress: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// A handle to stop the conversion while it runs.
    pub fn stopper(&self) -> Stop {
        Stop(Arc::clone(&self.stop))
    }

    /// Creates the image, copies the disk, and closes the image. When the request has succeeded, the image is flushed.
    ///
    /// # Errors
    /// If the target is a file of the source, or if another process uses one of the files; otherwise the errors of the images
    /// and the system; [`ErrorKind::Cancelled`] if the conversion was stopped. If the creation or the copy fails, files of the
    /// target that did not exist before are removed, unless another process uses them.
    pub fn run(self) -> Request<()> {
        let threads = self.source.threads().clone();
        Request::begin(&threads.clone(), move || self.convert(threads))
    }

    async fn convert(self, threads: IoThreads) -> Result<()> {
        let graph = self.source.graph().clone();
        let source = self.source.backend().node()?;
        refuse_source_file(&source, &self.target)?;
        let reading = lock_out_writers(&source)?;
        let outcome = self.convert_from(threads).await;
        drop(reading);
        // If the disk was closed during the conversion, this was the last use of the source.
        outcome.and(graph.release(source).await)
    }

    async fn convert_from(self, threads: IoThreads) -> Result<()> {
        let format = self.create.format();
        let graph = self.source.graph().clone();
        let created = match self.create.make(&self.stop).await? {
            Creation::Complete(created) => created,
            Creation::Stopped(created) => {
                created.remove_incomplete(&graph).await;
                return Err(stopped());
            }
        };
        let copied = async {
            let target = Disk::options()
                .graph(graph.clone())
                .format(format)
                .cache(Cache::Writeback)
                .open_backend(Some(&self.target))
                .await?;
            let fresh = target.node()?.limits().has_zero_init;
            let copy = Copy {
                sources: vec![self.source.backend().clone()],
                range: None,
                target: target.clone(),
                options: CopyOptions { target_is_zero: fresh, ..self.options },
                observer: Arc::new(ProgressObserver(self.progress)),
                stop: self.stop,
            };
            let copied = copy::run(copy, &helpers(&threads)).await.map_err(reason);
            copied.and(target.close().await)
        };
        let outcome = copied.await;
        if outcome.is_err() {
            // Remove the incomplete image, so that no program uses it as a complete one.
            created.remove_incomplete(&graph).await;
        }
        outcome
    }
}

/// Refuses a target that is a file of the source or of its backing chain, because the creation of the target would destroy the
/// source. The files are compared by device and inode number, since one file can have several names.
fn refuse_source_file(source: &Arc<Node>, target: &str) -> Result<()> {
    let Some(new) = identity(target) else { return Ok(()) };
    let mut nodes = vec![Arc::clone(source)];
    while let Some(node) = nodes.pop() {
        if node.driver().filename().and_then(|name| identity(&name)) == Some(new) {
            let text = format!("The target '{target}' is a file of the source");
            return Err(Error::invalid(text));
        }
        nodes.extend(node.children().iter().map(|(_, edge)| Arc::clone(edge.node())));
    }
    Ok(())
}

/// Device and inode number of an existing file; `None` if the file cannot be examined.
fn identity(name: &str) -> Option<(u64, u64)> {
    let path = names::to_path(name.strip_prefix("file:").unwrap_or(name));
    std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// Attaches the conversion to its source. Until the attachment is dropped, the file locks of the source keep writers in other
/// processes away. A source that is open for writing already has the necessary locks, so it needs no attachment.
fn lock_out_writers(source: &Arc<Node>) -> Result<Option<Attachment>> {
    if !source.is_read_only() {
        return Ok(None);
    }
    let permissions = Permissions {
        taken: Perm::CONSISTENT_READ,
        shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
    };
    Attachment::new(source, "a conversion", "source", permissions).map(Some)
}

/// The threads of the group without the calling thread.
fn helpers(threads: &IoThreads) -> Vec<IoThread> {
    let own = try_thread_index();
    let others = threads.threads().iter().filter(|thread| Some(thread.index()) != own);
    others.cloned().collect()
}

fn stopped() -> Error {
    Error::new(ErrorKind::Cancelled, "The conversion was stopped")
}

/// Converts the failure of a copy to an error of the block layer.
fn reason(failure: CopyError) -> Error {
    match failure.stage {
        Stage::Stopped => stopped(),
        _ => {
            let text = failure.to_string();
            failure.error.reword(text)
        }
    }
}

/// Calls the caller's closure with the progress.
struct ProgressObserver(Option<Progress>);

impl Observer for ProgressObserver {
    fn progress(&self, done: u64, total: u64) {
        if let Some(progress) = &self.0 {
            progress(done, total);
        }
    }

    fn wants_total(&self) -> bool {
        self.0.is_some()
    }
}

impl std::fmt::Debug for Convert {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Convert");
        shown.field("source", &self.source).field("target", &self.target).finish_non_exhaustive()
    }
}
