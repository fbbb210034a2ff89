//! Tests of image creation: a protocol whose close fails, and creations that are stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use oxblk_core::create::{
    CreateOption, CreateRequest, CreateTarget, CreatedFile, Creation, OptionType, Removal,
};
use oxblk_core::{
    BoxFuture, ChildSpec, Driver, DriverFactory, DriverKind, Errno, Error, Graph, Limits,
    OpenContext, Options, Permissions, Result, WriteFlags,
};
use oxblk_ring::{IoBuf, IoBufMut, block_on};

use crate::memory::{Memory, MemoryDriver, options};

static SIZE: &[CreateOption] =
    &[CreateOption { name: "size", kind: OptionType::Size, help: "", default: None }];

/// A protocol with one file. The first close of the file fails.
#[derive(Default)]
struct Host {
    /// The file exists.
    exists: AtomicBool,
    /// The format keeps the file when the creation of the image fails, as raw does.
    keeps_file: bool,
    /// After the first close of the file, another process uses the file.
    is_shared: bool,
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

    fn prepare_permissions(&self, permissions: Permissions) -> Result<()> {
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
        self.exists.store(true, SeqCst);
        Some(Box::pin(async { Ok(()) }))
    }

    fn created_file(&self, _filename: &str) -> Result<Option<Box<dyn CreatedFile>>> {
        if !self.exists.load(SeqCst) {
            return Err(Error::from_errno(Errno::NOENT));
        }
        Ok(Some(Box::new(HostFile(Arc::clone(&self.was_removed)))))
    }
}

/// A format that stores nothing.
#[derive(Default)]
struct Empty {
    passes_permissions: bool,
    /// The creation sets this flag, and does not end.
    stops: Option<Arc<AtomicBool>>,
    has_data_file: bool,
}

impl DriverFactory for Empty {
    fn name(&self) -> &'static str {
        "empty"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn children(&self) -> &'static [ChildSpec] {
        if self.passes_permissions { &[ChildSpec::FILTERED] } else { &[ChildSpec::IMAGE] }
    }

    fn open<'a>(&'a self, _context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async { Err(Error::unsupported("this format is only created")) })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        SIZE
    }

    fn new_data_file<'a>(&self, _options: &'a Options) -> Option<&'a str> {
        self.has_data_file.then_some("data")
    }

    fn create<'a>(
        &'a self,
        _: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        assert_eq!(matches!(request.target, CreateTarget::Files { .. }), self.has_data_file);
        Some(Box::pin(async {
            while let Some(stop) = &self.stops {
                oxblk_ring::yield_now().await;
                stop.store(true, SeqCst);
            }
            Ok(())
        }))
    }
}

fn graph(host: Host, format: Empty) -> Graph {
    let drivers: Vec<&'static dyn DriverFactory> =
        vec![Box::leak(Box::new(host)), Box::leak(Box::new(format))];
    Graph::new(drivers.leak(), oxblk_core::Gate::Anything)
}

/// Creates an image whose file cannot be closed. Returns whether the file was removed.
fn is_removed(host: Host) -> bool {
    let was_removed = Arc::clone(&host.was_removed);
    let format = Empty { passes_permissions: host.keeps_file, ..Empty::default() };
    let graph = graph(host, format);
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

/// Stops the creation of an image. Returns the files of the image, and what has become of each.
fn stop(exists: bool, has_data_file: bool) -> Vec<(String, Removal)> {
    let was_closed = Arc::new(AtomicBool::new(true));
    let host = Host { exists: AtomicBool::new(exists), was_closed, ..Host::default() };
    let was_removed = Arc::clone(&host.was_removed);
    let stop = Arc::new(AtomicBool::new(false));
    let format = Empty { stops: Some(Arc::clone(&stop)), has_data_file, ..Empty::default() };
    let graph = graph(host, format);
    block_on(async {
        let size: Options = options("size=512");
        let creation = graph.create_image_until("image", "empty", &size, &stop).await;
        let Creation::Stopped(created) = creation.unwrap() else {
            panic!("the creation was not stopped");
        };
        assert!(graph.nodes().is_empty());
        assert!(!was_removed.load(SeqCst));
        let removals = created.remove(&graph).await;
        assert!(graph.nodes().is_empty());
        removals.into_iter().map(|file| (file.filename, file.outcome.unwrap())).collect()
    })
}

#[test]
fn a_stopped_creation_closes_its_files_and_can_remove_new_ones() {
    let image = |removal| ("image".to_owned(), removal);
    assert_eq!(stop(false, false), [image(Removal::Removed)]);
    assert_eq!(stop(true, false), [image(Removal::Kept)]);
    // The host has only one file, so the data file exists when it is created.
    assert_eq!(stop(false, true), [image(Removal::Removed), ("data".to_owned(), Removal::Kept)]);
}
