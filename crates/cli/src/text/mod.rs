//! Text input and output of the tools: sizes, numbers, option lists, image information and progress.
//!
//! Scripts parse this output, so it must equal that of QEMU's tools byte for byte. For this reason it is separate from the
//! commands and tested with examples.

pub(crate) mod info;
pub(crate) mod number;
pub(crate) mod option_list;
pub(crate) mod progress;
pub(crate) mod size;
pub(crate) mod snapshot;
