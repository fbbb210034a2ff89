//! oxblk is a reimplementation of QEMU's block layer as a Rust library.
//!
//! # Why
//!
//! A disk image is more than a file with the bytes of a disk. A qcow2 image maps clusters through tables, reads unallocated
//! clusters from a chain of backing files, and stores snapshots and dirty bitmaps. The order of writes to the image decides
//! whether the image survives a power cut. Programs that need such images usually start QEMU's tools and parse the output of
//! the tools.
//!
//! With oxblk, a program opens, reads, writes, creates, copies and serves disk images itself. Image formats and option
//! names are the same as in QEMU, so both can use the same images. Requests run on `io_uring` if the kernel allows it,
//! with many requests in flight.
//!
//! # A first program
//!
//! This program creates an overlay over an existing raw image, writes to it, and converts the disk into one compressed image:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # std::env::set_current_dir(&folder)?;
//! # std::fs::write("base.raw", vec![7; 1 << 20])?;
//! use oxblk::{Convert, Create, Disk, Format};
//!
//! // The overlay has the size of its backing file, and stores only what is written to the overlay.
//! Create::overlay("overlay.qcow2", "base.raw", Format::Raw).run().wait()?;
//! let disk = Disk::options().format(Format::Qcow2).open("overlay.qcow2").wait()?;
//! disk.write(4096, b"hello".as_slice()).wait()?;
//! // After the flush, the write survives a power cut.
//! disk.flush().wait()?;
//! assert_eq!(disk.read(4096, 5).wait()?[..], *b"hello");
//! // The new image has no backing file: it stores the data of the complete chain.
//! Convert::new(&disk, "whole.qcow2", Format::Qcow2).compress(true).run().wait()?;
//! disk.close().wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! - A [`Disk`] is an open image with its chain of backing files. [`Disk::options`] opens it with options.
//! - [`Create`] creates an image.
//! - [`Convert`] copies a disk into a new image.
//! - [`NbdServer`] serves disks to other programs.
//! - A [`Request`] is one operation in flight. Every method of a disk that does I/O returns one; a `Cursor` waits for its
//!   requests.
//!
//! The folder `examples` contains small programs for snapshots, incremental backups, NBD, tokio, and a driver of your own.
//!
//! # Closing
//!
//! Call [`Disk::close`] when you do not need a disk any more. The close writes cached metadata, flushes, closes all files and
//! releases their locks. It returns an error if any of these steps fails.
//!
//! Dropping the last handle of a disk also closes the disk. A drop cannot return an error, so failures are only logged (with
//! the crate `tracing`). The drop itself is logged as an error too. The drop waits until the disk is closed. On an I/O thread a
//! drop cannot wait, so the disk is closed in the background.
//!
//! # Flushing
//!
//! When a write has completed, later reads return its data. The write survives a power cut only after a [`Disk::flush`] that
//! began after the write completed has succeeded. With [`Cache::Writethrough`] and [`Cache::Directsync`], each write is flushed
//! before it completes. With [`Cache::Unsafe`], flushes do nothing.
//!
//! If a flush fails, completed writes may be lost. The system does not report which writes were lost. So every later flush of
//! that file fails too, if the file uses the page cache.
//!
//! # Threads and tokio
//!
//! Requests run on I/O threads, which the library starts: by default one for each core (16 at most), shared by all disks. To
//! use other threads, pass [`IoThreads`] to [`OpenOptions::threads`]. A method of a disk starts its request on an I/O thread
//! and immediately returns a [`Request`]. How to get the result depends on the caller:
//!
//! - on a **plain thread**, block with [`Request::wait`];
//! - on **tokio** or any other executor, `await` the request: it is an ordinary [`Send`] future. Do not call `wait` there,
//!   since it blocks a thread of the executor;
//! - on an **I/O thread**, `await` the request as well ([`Request::wait`] fails there).
//!
//! Sending a request to an I/O thread and its result back takes some microseconds. A program that makes hundreds of thousands
//! of requests per second should send its loop to the I/O threads with [`Disk::run`]. There, [`Disk::backend`] makes requests
//! without changing threads. A virtual machine monitor should give an I/O thread to each queue of a device. A program that runs
//! on its own I/O threads opens images with [`OpenOptions::open_backend`].
//!
//! # Formats
//!
//! [`Format`] lists the formats that can be opened and created: raw, qcow2, VDI, Parallels, QED and VPC (VHD). To create an
//! image, pass a [`Format`] for QEMU's default options, or an options type such as [`Qcow2Options`]. Other formats, such as
//! VMDK and VHDX, are recognised and refused, so that such an image is never opened as a raw image.
//!
//! If you do not specify the format, the library probes the first bytes of the file. Specify the format with
//! [`OpenOptions::format`] whenever you know it, and always for images that a guest has written to: a guest can write the
//! header of another format to a raw disk.
//!
//! # Errors
//!
//! Disks, requests and servers report failures as one [`Error`] type. Its text is one line. For most failures that QEMU's
//! tools report too, the words are the same. Use [`Error::kind`] for decisions of the program, and [`Error::raw_errno`]
//! for the errno value that is passed to a guest. An error also contains the node, the path and the offset if they are
//! known.
//!
//! # Untrusted images
//!
//! An image may contain the names of other files: its backing file and its data file. [`OpenOptions::gate`] sets which of these
//! files may be opened. For images from untrusted sources, use [`Gate::Nothing`] or restrict the files to one directory, and
//! specify the format.
//!
//! # Other modules
//!
//! - [`check`] checks and repairs images, as [`Disk::check`] does. [`qapi`] converts results to JSON objects of QEMU.
//! - [`drivers`] returns the table of all drivers, for [`core::Graph::new`].
//! - [`copy`], [`compare`], [`commit`] and [`rebase`] process complete disks, with many requests in flight on several
//!   I/O threads. [`workers`] distributes their workers over the threads.
//! - [`core`] is the block graph, [`ring`] the I/O engine, and [`exports`] contains the servers.
#![forbid(unsafe_code)]

mod buffer;
mod cache;
pub mod check;
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
mod measure;
mod objects;
mod progress;
pub mod qapi;
pub mod qemu_json;
pub mod rebase;
mod request;
mod sectors;
mod serve;
mod socket_file;
mod stop;
pub mod temporary;
mod threads;
pub mod workers;

pub use cache::{Cache, parse_discard};
pub use convert::{Convert, Stop};
pub use create::Create;
pub use disk::{Cursor, Disk, OpenOptions, Sharing, TakenRanges};
pub use drivers::{absent_error, drivers, is_absent};
pub use format::{
    Compression, Format, NewFormat, ParallelsOptions, Qcow2Options, Qcow2Version, QedOptions,
    RawOptions, VdiOptions, VpcOptions,
};
pub use image_info::name::of_node as name_of_node;
pub use image_info::{BackingName, ImageInfo, has_own_info};
pub use map::{Extent, Extents};
pub use measure::measure;
pub use objects::{check_identifier, define_object, object_help};
pub use oxblk_core as core;
pub use oxblk_core::bitmap::BitmapInfo;
pub use oxblk_core::create::Measure;
pub use oxblk_core::snapshot::SnapshotInfo;
pub use oxblk_core::{Error, ErrorKind, Gate, Objects, Options, Preallocation, Result, Secrets};
pub use oxblk_exports as exports;
pub use oxblk_ring as ring;
pub use oxblk_ring::{Aio, IoBuf, IoBufMut};
pub use request::Request;
pub use sectors::{SECTOR, in_sectors};
pub use serve::NbdServer;
pub use socket_file::SocketFile;
pub use threads::IoThreads;
