//! Exports: ways for other programs to reach a [`Backend`](oxblk_core::Backend).
//!
//! * [`nbd`]: the NBD server.

#![forbid(unsafe_code)]

pub mod nbd;
