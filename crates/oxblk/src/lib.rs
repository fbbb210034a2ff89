//! The QEMU block layer as a library.
//!
//! - [`drivers`] is the list of all drivers, for [`core::Graph::new`].
//! - [`copy`], [`compare`], [`commit`] and [`rebase`] work on whole disks, with many requests in flight on several I/O
//!   threads.
//! - [`core`] and [`ring`] are the block graph and the I/O engine; [`exports`] are the servers.
#![forbid(unsafe_code)]

mod buffer;
pub mod commit;
pub mod compare;
pub mod copy;
mod drivers;
mod lowest;
mod progress;
pub mod rebase;
pub mod temporary;

pub use drivers::{drivers, is_absent};
pub use oxblk_core as core;
pub use oxblk_exports as exports;
pub use oxblk_ring as ring;
