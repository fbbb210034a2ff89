//! Creating and measuring images: option tables and the requests to drivers.

use std::sync::Arc;

use crate::{Backend, Edge, Options, Secrets};

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

/// One option of `create`, as `-o help` lists it.
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

/// The place where a new image is created.
#[derive(Clone)]
pub enum CreateTarget {
    /// Protocols: create the file of this name.
    Filename(String),
    /// Formats: write the image's metadata and data into this file, which exists and is open for writing.
    File(Arc<Edge>),
    /// Formats with a separate data file: it is empty and open for writing.
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
    /// The place of the new image.
    pub target: CreateTarget,
    /// The creation options by their names; `size` among them (bytes).
    pub options: Options,
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

/// Bytes that a new image needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// With the contents of the source, or, without a source, for an empty image.
    pub required: u64,
    /// With all clusters allocated.
    pub fully_allocated: u64,
    /// For the persistent bitmaps of the source, if it can have any.
    pub bitmaps: Option<u64>,
}
