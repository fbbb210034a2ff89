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
    /// Removes the file if the file's name still refers to this file.
    ///
    /// # Errors
    /// When the host cannot look up the name or cannot remove the file.
    fn remove(&self) -> Result<Removal>;
}

/// The outcome of [`Created::remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// The file was removed.
    Removed,
    /// The file is kept: it existed before, it is a device, or the protocol does not remove files.
    Kept,
    /// Another program has removed the file, or has replaced the file by another file. The other file is kept.
    Replaced,
}

/// A created image. A caller that cannot complete the image can remove it. Dropping this value keeps the image.
pub struct Created(Result<Option<Box<dyn CreatedFile>>>);

impl Created {
    /// `file` is an error if the protocol cannot identify the file. In this case the file is kept, and [`Self::remove`]
    /// returns the error.
    pub(crate) fn new(file: Result<Option<Box<dyn CreatedFile>>>) -> Self {
        Self(file)
    }

    /// An image whose file existed before. [`Self::remove`] keeps the file.
    pub(crate) fn kept() -> Self {
        Self(Ok(None))
    }

    /// Removes the image's file, if the file's name still refers to this file. If another program replaces the file
    /// between the check and the removal, the new file is removed: the host has no system call that checks and removes
    /// a file atomically.
    ///
    /// # Errors
    /// When the host cannot identify, look up or remove the file.
    pub fn remove(self) -> Result<Removal> {
        self.0?.map_or(Ok(Removal::Kept), |file| file.remove())
    }

    /// Like [`Self::remove`], for a caller that already reports another error. If the removal fails, or if another
    /// program has replaced the file, the log reports this.
    pub fn remove_incomplete(self, filename: &str) {
        match self.remove() {
            Ok(Removal::Removed | Removal::Kept) => {}
            Ok(Removal::Replaced) => {
                tracing::warn!(
                    filename,
                    "another program has replaced the incomplete image; nothing was removed"
                );
            }
            Err(error) => tracing::warn!(filename, %error, "cannot remove an incomplete image"),
        }
    }
}

impl std::fmt::Debug for Created {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Created").finish_non_exhaustive()
    }
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
