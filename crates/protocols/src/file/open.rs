//! The two factories, `file` and `host_device`, and how they open a file or device.

use oxblk_core::create::{CreateOption, CreateRequest, CreatedFile};
use oxblk_core::{
    BoxFuture, Driver, DriverFactory, DriverKind, Error, Graph, OpenContext, Options, Result, names,
};
use oxblk_ring::File;
use rustix::fs::FileType;
use rustix::io::Errno;

use super::align::{self, Alignment};
use super::create::{self, CREATE_OPTIONS};
use super::created;
use super::driver::{FileDriver, Parts, wrong_kind};
use super::handle::{self, Access, Handle, Kind};
use super::locks::FileLocks;
use super::options::{FileOptions, Locking};

/// The `file` driver: regular files.
pub static FILE: FileFactory = FileFactory { name: "file", device: false };
/// The `host_device` driver: block and character devices.
pub static HOST_DEVICE: FileFactory = FileFactory { name: "host_device", device: true };

/// Makes [`FileDriver`]s.
#[derive(Debug)]
pub struct FileFactory {
    pub(super) name: &'static str,
    pub(super) device: bool,
}

impl FileFactory {
    /// The path in a file name: the name without the prefix of this driver.
    pub(super) fn path_of<'n>(&self, filename: &'n str) -> &'n str {
        let rest = filename.strip_prefix(self.name).and_then(|rest| rest.strip_prefix(':'));
        rest.unwrap_or(filename)
    }

    /// Refuses an empty path.
    pub(super) fn check_named(&self, path: &str) -> Result<()> {
        if path.is_empty() {
            let text = format!("The '{}' block driver requires a file name", self.name);
            return Err(Error::invalid(text));
        }
        Ok(())
    }

    pub(super) fn check_kind(&self, kind: Option<Kind>, path: &str) -> Result<()> {
        match (self.device, kind) {
            (false, Some(Kind::Regular)) | (true, Some(Kind::Block | Kind::Character)) => Ok(()),
            (false, _) => Err(wrong_kind(self.name, path, "a regular file")),
            (true, _) => Err(wrong_kind(self.name, path, "either a character or block device")),
        }
    }

    async fn open_file(&self, context: &mut OpenContext) -> Result<FileDriver> {
        // A value that is not a string counts as an empty file name, which is refused.
        let path = context.options.get_str("filename").unwrap_or_default().to_owned();
        self.check_named(&path)?;
        let options: FileOptions = context.options.extract()?;
        let locking = options.locking()?;
        let aio = options.aio(context.flags.direct, context.flags.aio)?;
        options.refuse_pr_manager()?;
        let handle = self.open_handle(&path, context)?;
        let locks = make_locks(&handle, &path, locking)?;
        let direct = context.flags.direct;
        let file = File::from_fd(handle.fd, aio.engine());
        let size = file.len().await.map_err(|error| {
            Error::from(error).prefix(format!("Could not determine the size of '{path}'"))
        })?;
        let alignment = if direct { align::probe(&file).await? } else { Alignment::NONE };
        Ok(FileDriver::new(Parts {
            file,
            kind: handle.kind,
            path,
            size,
            aio,
            read_only: context.flags.read_only,
            direct,
            no_flush: context.flags.no_flush,
            alignment,
            locks,
        }))
    }

    fn open_handle(&self, path: &str, context: &mut OpenContext) -> Result<Handle> {
        let direct = context.flags.direct;
        let no_symlinks = context.flags.no_symlinks;
        let mut access = Access { read_only: context.flags.read_only, direct, no_symlinks };
        let mut opened = handle::open(path, access);
        let denied = matches!(opened, Err(Errno::ACCESS | Errno::PERM | Errno::ROFS));
        if denied && !access.read_only && context.flags.auto_read_only {
            context.fall_back_to_read_only("Permission denied")?;
            access.read_only = true;
            opened = handle::open(path, access);
        }
        let handle = opened.map_err(|errno| match errno {
            Errno::NOTSUP => match self.check_kind(None, path) {
                Err(error) => error,
                Ok(()) => handle::open_error(path, errno, direct),
            },
            errno => handle::open_error(path, errno, direct),
        })?;
        self.check_kind(Some(handle.kind), path)?;
        Ok(handle)
    }
}

fn make_locks(handle: &Handle, path: &str, locking: Locking) -> Result<Option<FileLocks>> {
    if locking == Locking::Off {
        return Ok(None);
    }
    let locks = FileLocks::new(&handle.fd, path)?;
    if locks.is_none() {
        if locking == Locking::On {
            return Err(Error::unsupported(format!(
                "'{path}' cannot be locked: its file system or the kernel has no open file description locks"
            )));
        }
        tracing::warn!(
            path,
            "the file is not locked against other programs: its file system or the kernel has no open file description locks"
        );
    }
    Ok(locks)
}

impl DriverFactory for FileFactory {
    fn name(&self) -> &'static str {
        self.name
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Protocol
    }

    fn schemes(&self) -> &'static [&'static str] {
        if self.device { &["host_device"] } else { &["file"] }
    }

    fn probe_path(&self, path: &str) -> u32 {
        let stat = rustix::fs::stat(&*names::to_path(path)).ok();
        let kind = stat.map(|stat| FileType::from_raw_mode(stat.st_mode));
        let is_device = matches!(kind, Some(FileType::BlockDevice | FileType::CharacterDevice));
        if self.device && is_device { 100 } else { 0 }
    }

    fn parse_filename(&self, filename: &str) -> Result<Options> {
        let mut options = Options::new();
        let path = self.path_of(filename);
        let first = path.split('/').next().unwrap_or_default();
        if path != filename && first.contains(':') {
            // Without the prefix, the path would begin with something that looks like another prefix.
            options.insert("filename", format!("./{path}"));
        } else {
            options.insert("filename", path);
        }
        Ok(options)
    }

    fn open<'a>(&'a self, context: &'a mut OpenContext) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let driver = self.open_file(context).await?;
            Ok(Box::new(driver) as Box<dyn Driver>)
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        if self.device { create::DEVICE_CREATE_OPTIONS } else { CREATE_OPTIONS }
    }

    fn create<'a>(
        &'a self,
        _graph: &'a Graph,
        request: CreateRequest,
    ) -> Option<BoxFuture<'a, Result<()>>> {
        Some(Box::pin(create::create(self, request)))
    }

    fn created_file(&self, filename: &str) -> Result<Option<Box<dyn CreatedFile>>> {
        created::hold(self.path_of(filename))
    }
}
