//! Tests of the creation of images and data files with a protocol whose operations fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use oxblk_core::create::{CreateOption, CreateRequest, CreatedFile, OptionType, Removal};
use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Errno, Error, Graph, Limits, OpenContext,
    Options, Permissions, Result, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on};

use crate::memory::{Memory, MemoryDriver, options};

static SIZE: &[CreateOption] =
    &[CreateOption { name: "size", kind: OptionType::Size, help: "", default: None }];

/// A protocol with one file. The first close of the file fails.
#[derive(Default)]
struct Host {
    /// The format keeps the file when the creation of the image fails, as raw does.
    keeps_file: bool,
    /// After the first close of the file, another process uses the file.
    is_shared: bool,
    /// The file cannot be opened.
    is_unreadable: bool,
    was_created: AtomicBool,
    was_closed: Arc<AtomicBool>,
    was_removed: Arc<AtomicBool>,
}

/// The driver in memory, with a close that fails.
struct HostDriver {
    memory: MemoryDriver,
    is_shared: bool,
    was_closed: Arc<AtomicBool>,
}

impl Driver for HostDriver {
    fn read(&self, offset: u64, buf: IoBufMut) -> BoxFuture<'_, Result<IoBufMut>> {
        self.memory.read(offset, buf)
    }

    fn write(&self, offset: u64, data: IoBuf, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.memory.write(offset, data, flags)
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        if self.is_shared && self.was_closed.load(SeqCst) && permissions != Permissions::NONE {
            return Err(Error::from_errno(Errno::AGAIN));
        }
        Ok(())
    }

    fn close(&self) -> Option<BoxFuture<'_, Result<()>>> {
        Some(Box::pin(async {
            if self.was_closed.swap(true, SeqCst) {
                return Ok(());
            }
            Err(Error::from_errno(Errno::DQUOT))
        }))
    }
}

struct HostFile(Arc<AtomicBool>);

impl CreatedFile for HostFile {
    fn remove(&self) -> Result<Removal> {
        self.0.store(true, SeqCst);
        Ok(Removal::Removed)
    }
}

impl DriverFactory for Host {
    fn name(&self) -> &'static str {
        "file"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn probe_path(&self, _path: &str) -> u32 {
        100
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            context.options.take("filename");
            if self.is_unreadable {
                return Err(Error::from_errno(Errno::ACCES));
            }
            let driver: Box<dyn Driver> = Box::new(HostDriver {
                memory: MemoryDriver(Memory::new(0, Limits::default())),
                is_shared: self.is_shared,
                was_closed: Arc::clone(&self.was_closed),
            });
            Ok(driver)
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        SIZE
    }

    fn create<'a>(&'a self, _: &'a Graph, _: CreateRequest) -> Option<BoxFuture<'a, Result<()>>> {
        self.was_created.store(true, SeqCst);
        Some(Box::pin(async { Ok(()) }))
    }

    fn created_file(&self, _filename: &str) -> Result<Option<Box<dyn CreatedFile>>> {
        let file = || -> Box<dyn CreatedFile> { Box::new(HostFile(Arc::clone(&self.was_removed))) };
        Ok(self.was_created.load(SeqCst).then(file))
    }
}

/// A format that stores nothing.
struct Empty {
    passes_permissions: bool,
}

impl DriverFactory for Empty {
    fn name(&self) -> &'static str {
        "empty"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn passes_permissions(&self) -> bool {
        self.passes_permissions
    }

    fn open<'a>(&'a self, _context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::unsupported("this format is only created")) })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        SIZE
    }

    fn create<'a>(&'a self, _: &'a Graph, _: CreateRequest) -> Option<BoxFuture<'a, Result<()>>> {
        Some(Box::pin(async { Ok(()) }))
    }
}

/// Creates an image whose file cannot be closed. Returns whether the file was removed.
fn is_removed(host: Host) -> bool {
    let was_removed = Arc::clone(&host.was_removed);
    let format = Empty { passes_permissions: host.keeps_file };
    let drivers: Vec<&'static dyn DriverFactory> =
        vec![Box::leak(Box::new(host)), Box::leak(Box::new(format))];
    let graph = Graph::new(drivers.leak(), oxblk_core::Gate::Anything);
    let size: Options = options("size=512");
    let created = block_on(graph.create_image("image", "empty", &size));
    assert_eq!(created.unwrap_err().raw_errno(), Errno::DQUOT);
    assert!(graph.nodes().is_empty());
    was_removed.load(SeqCst)
}

#[test]
fn an_image_whose_file_cannot_be_closed_is_removed() {
    assert!(is_removed(Host::default()));
}

#[test]
fn an_image_whose_file_cannot_be_closed_is_kept_if_it_is_raw_or_in_use() {
    assert!(!is_removed(Host { keeps_file: true, ..Host::default() }));
    assert!(!is_removed(Host { is_shared: true, ..Host::default() }));
}

/// Creates a data file, and closes it. Returns the error, and whether the file was removed.
fn create_data(host: Host) -> (Error, bool) {
    let was_removed = Arc::clone(&host.was_removed);
    let drivers: Vec<&'static dyn DriverFactory> = vec![Box::leak(Box::new(host))];
    let graph = Graph::new(drivers.leak(), oxblk_core::Gate::Anything);
    let outcome = block_on(async { graph.create_data_file("data").await?.complete().await });
    assert!(graph.nodes().is_empty());
    (outcome.unwrap_err(), was_removed.load(SeqCst))
}

#[test]
fn a_new_data_file_that_cannot_be_opened_or_closed_is_removed() {
    let (error, removed) = create_data(Host { is_unreadable: true, ..Host::default() });
    assert_eq!((error.raw_errno(), removed), (Errno::ACCES, true));
    let (error, removed) = create_data(Host::default());
    assert_eq!((error.raw_errno(), removed), (Errno::DQUOT, true));
}

#[test]
fn a_data_file_that_cannot_be_closed_is_kept_if_it_is_in_use_or_not_new() {
    let (error, removed) = create_data(Host { is_shared: true, ..Host::default() });
    assert_eq!((error.raw_errno(), removed), (Errno::DQUOT, false));
    let (error, removed) = create_data(Host { was_created: true.into(), ..Host::default() });
    assert_eq!((error.raw_errno(), removed), (Errno::DQUOT, false));
}
