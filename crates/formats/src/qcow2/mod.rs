//! qcow2: QEMU's copy-on-write image format, versions 2 and 3.

#[doc(hidden)]
pub mod compression;
#[doc(hidden)]
pub mod create;
#[doc(hidden)]
pub mod layout;
