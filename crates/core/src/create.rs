//! Types for creating and measuring images: tables of options, and requests to drivers.

use std::sync::Arc;

use crate::{Backend, Edge, Options, Result, Secrets};

/// Type of a creation option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionType {
    /// `on` / `off`.
    Bool,
    /// A number with an optional size suffix.
    Size,
    /// A plain number.
    Number,
    /// Text.
    String,
}

/// One option of `create` or `amend`, as `-o help` lists the option.
#[derive(Debug, Clone, Copy)]
pub struct CreateOption {
    /// Name.
    pub name: &'static str,
    /// Type.
    pub kind: OptionType,
    /// Help text.
    pub help: &'static str,
    /// Default shown in the help, if there is one.
    pub default: Option<&'static str>,
}

/// The file or files in which a new image is created.
#[derive(Clone)]
pub enum CreateTarget {
    /// Protocols: create the file with this name.
    Filename(String),
    /// Formats: write the image's metadata and data into this file. The file exists and is open for writing.
    File(Arc<Edge>),
    /// Formats with a separate data file: both files exist and are open for writing, and the data file is empty.
    Files {
        /// The file for the format's metadata.
        file: Arc<Edge>,
        /// The file for the guest data.
        data: Arc<Edge>,
    },
}

/// A request to a driver to create an image.
#[derive(Clone)]
pub struct CreateRequest {
    /// The file or files of the new image.
    pub target: CreateTarget,
    /// The creation options by name, including `size` (bytes).
    pub options: Options,
}

/// A file that a protocol has created. This value identifies the file itself, even if the file's name now refers to
/// another file.
pub trait CreatedFile: Send + Sync {
    /// Removes the file if the file's name still refers to this file. The caller holds permissions that keep other
    /// users from writing to the file.
    ///
    /// If another program replaces the file between the check of the name and the removal, the new file is removed: the
    /// host has no system call that checks and removes a file atomically.
    ///
    /// # Errors
    /// When the host cannot look up the name or cannot remove the file.
    fn remove(&self) -> Result<Removal>;
}

/// The outcome of the removal of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The file was removed.
    Removed,
    /// The file is kept: it existed before, it is a device, or the protocol does not remove files.
    Kept,
    /// Another program has removed the file, or has replaced the file by another file. The other file is kept.
    Replaced,
}

/// A file that [`Created::remove`] was to remove.
#[derive(Debug)]
pub struct FileRemoval {
    /// The name with which the file was created.
    pub filename: String,
    /// The outcome. After an error, the file is kept.
    pub outcome: Result<Removal>,
}

/// The files of a created image: the image file and, if the image has one, the data file. A caller that cannot complete
/// the image can remove the files that did not exist before. Dropping this value keeps the files.
#[derive(Debug, Default)]
pub struct Created {
    pub(crate) files: Vec<NewFile>,
}

/// A file of a created image.
pub(crate) struct NewFile {
    pub(crate) filename: String,
    /// Identifies the file. `None`: the file must not be removed. An error: the protocol cannot identify the file, so
    /// the file is not removed either.
    pub(crate) file: Result<Option<Box<dyn CreatedFile>>>,
}

impl std::fmt::Debug for NewFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewFile").field("filename", &self.filename).finish_non_exhaustive()
    }
}

/// The outcome of [`crate::Graph::create_image_until`].
#[derive(Debug)]
pub enum Creation {
    /// The image is complete.
    Complete(Created),
    /// The creation was stopped. The image is incomplete, and all its files are closed.
    Stopped(Created),
}

/// A request to compute the size of a new image.
pub struct MeasureRequest<'a> {
    /// Creation options of the new image (including `size` if there is no source).
    pub options: Options,
    /// The image whose contents the new image would store, if there is one.
    pub source: Option<&'a Backend>,
    /// The secrets that the options may refer to.
    pub secrets: &'a Secrets,
}

/// The sizes that a new image needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// Bytes for an image with the contents of the source, or, without a source, for an empty image.
    pub required: u64,
    /// Bytes for an image with all clusters allocated.
    pub fully_allocated: u64,
    /// Bytes for the persistent bitmaps of the source, if the source can have such bitmaps.
    pub bitmaps: Option<u64>,
}
