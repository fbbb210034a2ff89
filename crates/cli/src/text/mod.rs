//! Text input and output of the tools: sizes, numbers, option lists, image information and progress.
//!
//! Scripts parse the output of these functions, so it must equal the output of QEMU's tools byte for byte. Therefore
//! these functions are separate from the commands and are tested with examples.

pub(crate) mod info;
pub(crate) mod number;
pub(crate) mod option_list;
pub(crate) mod progress;
pub(crate) mod size;
pub(crate) mod snapshot;
