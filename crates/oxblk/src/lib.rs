//! The QEMU block layer as a library.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # std::env::set_current_dir(&folder)?;
//! # std::fs::write("base.raw", vec![7; 1 << 20])?;
//! use oxblk::{Convert, Create, Disk, Format};
//!
//! Create::overlay("overlay.qcow2", "base.raw", Format::Raw).run().wait()?;
//! let disk = Disk::options().format(Format::Qcow2).open("overlay.qcow2").wait()?;
//! disk.write(4096, b"hello".as_slice()).wait()?;
//! disk.flush().wait()?;
//! assert_eq!(disk.read(4096, 5).wait()?[..], *b"hello");
//! Convert::new(&disk, "whole.qcow2", Format::Qcow2).compress(true).run().wait()?;
//! disk.close().wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! A [`Disk`] is an open image with its chain of backing files; [`Create`] makes images, [`Convert`] copies a disk into a new
//! one, [`NbdServer`] serves disks to other programs.
//!
//! # Threads and tokio
//!
//! Disks live on I/O threads, which the library starts: one for each core, shared by all disks, or the [`IoThreads`] that
//! [`OpenOptions::threads`] names. Every method of a disk begins a [`Request`] there and returns it at once. Use the request as
//! it suits your program:
//!
//! - on **plain threads** block with [`Request::wait`];
//! - on **tokio** or any other executor `await` it: a request is an ordinary [`Send`] future. Do not `wait` there: it
//!   would block a thread of the executor;
//! - on an **I/O thread** `await` it as well ([`Request::wait`] refuses), or make requests without a hop between
//!   threads through [`Disk::backend`]. [`Disk::run`] sends a piece of your own code there.
//!
//! A hop costs some microseconds. Programs that make hundreds of thousands of requests in a second send their loop to the I/O
//! threads with [`Disk::run`]; a virtual machine monitor gives each of its queues an I/O thread.
//!
//! # Flushing
//!
//! A write that has completed can be read back at once, but survives a power cut only after a [`Disk::flush`] that began
//! later has succeeded. With [`Cache::Writethrough`] and [`Cache::Directsync`] every write does. A flush that fails
//! means that writes may be lost; it fails for good, since the system does not tell which.
//!
//! # Closing
//!
//! [`Disk::close`] flushes, writes what the format keeps in memory, closes all files and gives up their locks. It
//! tells whether all of this worked, and so belongs at the end of every program.
//!
//! A disk that is dropped without it is closed all the same, while the drop waits; the log (of the crate `tracing`) gets an
//! error, which is also the only one to hear of a failure. On an I/O thread a drop cannot wait: the disk is closed in the
//! background.
//!
//! # Errors
//!
//! There is one [`Error`]. It prints as one line in the words of QEMU's tools; [`Error::kind`] is for programs,
//! [`Error::raw_errno`] for guests, and node, path and offset are there where they are known.
//!
//! # Images from strangers
//!
//! An image may name other files: its backing file, its data file. [`OpenOptions::gate`] says which of these names are
//! followed; for images that others made, that should be [`Gate::Nothing`] or one directory. Name the format of
//! images that a guest has written to.
//!
//! # Below
//!
//! - [`drivers`] is the list of all drivers, for [`core::Graph::new`].
//! - [`copy`], [`compare`], [`commit`] and [`rebase`] work on whole disks, with many requests in flight on several I/O
//!   threads.
//! - [`core`] and [`ring`] are the block graph and the I/O engine; [`exports`] are the servers.
#![forbid(unsafe_code)]

mod buffer;
pub mod commit;
pub mod compare;
mod convert;
pub mod copy;
mod create;
mod disk;
mod drivers;
mod first_by_offset;
mod format;
mod image_info;
mod map;
mod progress;
pub mod qemu_json;
pub mod rebase;
mod request;
mod serve;
pub mod temporary;
mod threads;

pub use convert::{Convert, Stop};
pub use create::Create;
pub use disk::{Cache, Cursor, Disk, OpenOptions};
pub use drivers::{drivers, is_absent};
pub use format::{
    Compression, Format, NewFormat, Qcow2Options, Qcow2Version, RawOptions, VdiOptions,
};
pub use image_info::{BackingName, ImageInfo, has_own_info};
pub use map::{Extent, Extents};
pub use oxblk_core as core;
pub use oxblk_core::bitmap::BitmapInfo;
pub use oxblk_core::snapshot::SnapshotInfo;
pub use oxblk_core::{Error, ErrorKind, Gate, Preallocation, Result, Secrets};
pub use oxblk_exports as exports;
pub use oxblk_ring as ring;
pub use oxblk_ring::{IoBuf, IoBufMut};
pub use request::Request;
pub use serve::NbdServer;
pub use threads::IoThreads;
