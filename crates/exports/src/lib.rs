//! Exports. Other programs access a [`Backend`](oxblk_core::Backend) through an export.
//!
//! * [`nbd`]: the NBD server.

#![forbid(unsafe_code)]

pub mod nbd;
