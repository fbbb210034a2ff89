//! Exports: other programs access a [`Backend`](oxblk_core::Backend) through them.
//!
//! * [`nbd`]: the NBD server.

#![forbid(unsafe_code)]

pub mod nbd;
