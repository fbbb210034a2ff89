//! Text in and out: how the tools read and print sizes, numbers, option lists and JSON.
//!
//! Everything here is pure, and kept apart from the commands because its output is an interface:
//! scripts parse it, so its layout is QEMU's to the byte and is tested by example.

pub(crate) mod info;
pub(crate) mod number;
pub(crate) mod option_list;
pub(crate) mod progress;
pub(crate) mod size;
pub(crate) mod snapshot;
