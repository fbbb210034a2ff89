//! Creates image files, and prepares devices as images.
//!
//! As in QEMU's tools, an existing file is overwritten, but only after its locks are taken (if the host supports locks
//! on the file). So `create` with the file name of the disk of a running guest fails and does not destroy the disk.

use oxblk_core::create::{CreateOption, CreateRequest, CreateTarget, OptionType};
use oxblk_core::{Errno, Error, Perm, Permissions, Preallocation, Result, names, strerror};
use oxblk_ring::{Aio, File, host};
use rustix::fs::{IFlags, Mode, OFlags};
use std::os::fd::{AsFd, OwnedFd};

use super::handle::{self, Access, Handle};
use super::locks::FileLocks;
use super::open::FileFactory;
use super::resize;

const SECTOR: u64 = 512;
const DEFAULT_EXTENT_SIZE_HINT: u64 = 1 << 20;

/// The options for new files, in the order in which `img create` prints them.
pub(super) const CREATE_OPTIONS: &[CreateOption] = &[
    SIZE,
    CreateOption {
        name: "preallocation",
        kind: OptionType::String,
        help: "Preallocation mode (allowed values: off, falloc, full)",
        default: None,
    },
    CreateOption {
        name: "nocow",
        kind: OptionType::Bool,
        help: "Turn off copy-on-write (valid only on btrfs)",
        default: None,
    },
    CreateOption {
        name: "extent_size_hint",
        kind: OptionType::Size,
        help: "Extent size hint for the image file, 0 to disable",
        default: None,
    },
];

const SIZE: CreateOption =
    CreateOption { name: "size", kind: OptionType::Size, help: "Virtual disk size", default: None };

/// The options for devices, which cannot be preallocated.
pub(super) const DEVICE_CREATE_OPTIONS: &[CreateOption] = &[
    SIZE,
    CreateOption {
        name: "preallocation",
        kind: OptionType::String,
        help: "Preallocation mode (allowed values: off)",
        default: None,
    },
];

struct Wanted {
    size: u64,
    preallocation: Preallocation,
    nocow: bool,
    extent_size_hint: u32,
}

fn parse(mut request: CreateRequest) -> Result<(String, Wanted)> {
    let options = &mut request.options;
    let size = options.take_size("size")?.unwrap_or(0);
    let size = size
        .checked_next_multiple_of(SECTOR)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::from_errno(Errno::INVAL).prefix("Could not resize file"))?;
    let preallocation = match options.take_str("preallocation")? {
        None => Preallocation::Off,
        Some(name) => Preallocation::parse(&name)
            .ok_or_else(|| Error::invalid(format!("invalid parameter value: {name}")))?,
    };
    let extent_size_hint = options.take_size("extent_size_hint")?;
    let extent_size_hint = extent_size_hint.unwrap_or(DEFAULT_EXTENT_SIZE_HINT);
    let extent_size_hint = u32::try_from(extent_size_hint)
        .map_err(|_| Error::invalid("Extent size hint is too large"))?;
    let nocow = options.take_bool("nocow")?.unwrap_or(false);
    let CreateTarget::Filename(name) = request.target else {
        return Err(Error::invalid("A protocol is created by file name"));
    };
    Ok((name, Wanted { size, preallocation, nocow, extent_size_hint }))
}

/// Creates a file, or prepares an existing file or device as an image.
pub(super) async fn create(factory: &FileFactory, request: CreateRequest) -> Result<()> {
    let (name, wanted) = parse(request)?;
    let path = factory.path_of(&name);
    if factory.device {
        prepare_device(factory, path, &wanted).await
    } else {
        make(path, &wanted).await
    }
}

async fn make(path: &str, wanted: &Wanted) -> Result<()> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOCTTY;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let fd = rustix::fs::open(&*names::to_path(path), flags, mode).map_err(|errno| {
        let code = errno.raw_os_error();
        Error::from_errno(code).reword(format!("Could not create '{path}': {}", strerror(code)))
    })?;
    let locks = lock(&fd, path)?;
    apply_hints(&fd, wanted);
    let file = File::from_fd(fd, Aio::default());
    file.set_len(0).await.map_err(|e| Error::from(e).prefix("Could not clear the file"))?;
    let sync = async || file.sync(false).await.map_err(Error::from);
    let outcome = resize::set_size(&file, wanted.size, wanted.preallocation, sync).await;
    let closed = close(file).await;
    drop(locks);
    outcome.and(closed)
}

async fn close(file: File) -> Result<()> {
    file.close().await.map_err(|e| Error::from(e).prefix("Could not close the new file"))
}

/// Takes the locks for creating an image; `None` if the host supports no locks on the file. While these locks are held,
/// no other process that uses the locks can change the size.
fn lock(fd: &OwnedFd, path: &str) -> Result<Option<FileLocks>> {
    let locks = FileLocks::new(fd, path)?;
    if let Some(locks) = &locks {
        locks.set(Permissions {
            taken: Perm::WRITE | Perm::RESIZE,
            shared: Perm::all() - Perm::RESIZE,
        })?;
    }
    Ok(locks)
}

/// Applies hints. Errors are ignored, because only some file systems support these hints.
fn apply_hints(fd: &OwnedFd, wanted: &Wanted) {
    if wanted.nocow
        && let Ok(flags) = rustix::fs::ioctl_getflags(fd)
    {
        let _ = rustix::fs::ioctl_setflags(fd, flags | IFlags::NOCOW);
    }
    if wanted.extent_size_hint > 0 {
        let _ = host::set_extent_size_hint(fd.as_fd(), wanted.extent_size_hint);
    }
}

fn open_device(factory: &FileFactory, path: &str) -> Result<Handle> {
    factory.check_named(path)?;
    let access = Access { read_only: false, direct: false, no_symlinks: false };
    let handle = handle::open(path, access).map_err(|e| handle::open_error(path, e, false))?;
    factory.check_kind(Some(handle.kind), path)?;
    Ok(handle)
}

/// Prepares an existing device as an image.
async fn prepare_device(factory: &FileFactory, path: &str, wanted: &Wanted) -> Result<()> {
    if wanted.preallocation != Preallocation::Off {
        let mode = wanted.preallocation.name();
        return Err(Error::unsupported(format!("Unsupported preallocation mode '{mode}'")));
    }
    let handle = open_device(factory, path).map_err(|error| {
        error.prefix(format_args!(
            "Protocol driver '{}' does not support creating new images, so an existing image must be \
             selected as the target; however, opening the given target as an existing image failed",
            factory.name
        ))
    })?;
    let locks = lock(&handle.fd, path)?;
    let file = File::from_fd(handle.fd, Aio::default());
    let size = file.len().await?;
    if size < wanted.size {
        return Err(Error::invalid("Cannot grow device files"));
    }
    // Clear the first sector, so that probing does not find the previous contents.
    let head = usize::try_from(size.min(SECTOR)).unwrap_or(0);
    let clear = oxblk_ring::IoBuf::zeroes(head);
    let cleared = file.write_all_at(clear, 0, false).await;
    let cleared =
        cleared.map_err(|e| Error::from(e).prefix("Failed to clear the new image's first sector"));
    let closed = close(file).await;
    drop(locks);
    cleared.and(closed)
}
