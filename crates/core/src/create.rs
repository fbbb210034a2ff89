//! Making images: option tables, and what drivers are asked for.

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
    /// Default shown in the help, where there is one.
    pub default: Option<&'static str>,
}

/// Where a new image is made.
#[derive(Clone)]
pub enum CreateTarget {
    /// Protocols: make the file of this name.
    Filename(String),
    /// Formats: write the format's structures into this file, which exists and is opened for writing.
    File(Arc<Edge>),
    /// The same, but that guest data goes into a file of its own, empty and opened for writing.
    Files {
        /// What the format's structures are written into.
        file: Arc<Edge>,
        /// What guest data will be written into.
        data: Arc<Edge>,
    },
}

/// What a driver is asked to make.
#[derive(Clone)]
pub struct CreateRequest {
    /// Where.
    pub target: CreateTarget,
    /// The creation options by their names; `size` among them (bytes).
    pub options: Options,
}

/// What an image would be measured for.
pub struct MeasureRequest<'a> {
    /// Creation options of the new image (`size` among them where there is no source).
    pub options: Options,
    /// The image whose contents are to be stored, where there is one.
    pub source: Option<&'a Backend>,
    /// The secrets that options may name.
    pub secrets: &'a Secrets,
}

/// Bytes that a new image needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// For the contents of the source, or an empty image.
    pub required: u64,
    /// When everything is allocated.
    pub fully_allocated: u64,
    /// For the persistent bitmaps of the source, where there are any.
    pub bitmaps: Option<u64>,
}
