//! Options of `file` and `host_device`.

use oxblk_core::{Error, Result};
use oxblk_ring::Aio;
use serde::{Deserialize, Serialize};

/// The driver's own options, by their names in `-blockdev`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FileOptions {
    /// Path of the file, with or without the protocol's prefix.
    pub filename: Option<String>,
    /// `on`, `off` or `auto`.
    pub locking: Option<String>,
    /// `threads`, `native` or `io_uring`.
    pub aio: Option<String>,
    /// Most requests handed to the kernel at once; the engine batches by itself, so this is only checked.
    pub aio_max_batch: Option<u64>,
    /// Object that helps with persistent reservations: not available.
    pub pr_manager: Option<String>,
    /// Drop the page cache when a migration hands the image over.
    pub drop_cache: Option<bool>,
    /// Debugging aid of the above; accepted and without effect.
    pub x_check_cache_dropped: Option<bool>,
}

/// Whether other processes are kept out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// If the file system can lock.
    #[default]
    Auto,
    /// Always; opening fails where that is impossible.
    On,
    /// Never.
    Off,
}

/// How I/O is carried out, as the option says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AioOption {
    /// Nothing said: io_uring where it can be had, which is always the fastest here.
    #[default]
    Default,
    /// Blocking calls on worker threads.
    Threads,
    /// Linux AIO.
    Native,
    /// io_uring.
    IoUring,
}

impl AioOption {
    /// The engine's name for it.
    pub fn engine(self) -> Aio {
        match self {
            Self::Default | Self::IoUring => Aio::IoUring,
            Self::Threads => Aio::Threads,
            Self::Native => Aio::Native,
        }
    }
}

impl FileOptions {
    /// The `locking` option.
    ///
    /// # Errors
    /// When it is none of the three words.
    pub fn locking(&self) -> Result<Locking> {
        match self.locking.as_deref() {
            None | Some("auto") => Ok(Locking::Auto),
            Some("on") => Ok(Locking::On),
            Some("off") => Ok(Locking::Off),
            Some(other) => Err(invalid_value(other)),
        }
    }

    /// The `aio` option, or else what the opener prefers, checked against the cache mode.
    ///
    /// # Errors
    /// When it is none of the three words, or `native` without `cache.direct=on`.
    pub fn aio(&self, direct: bool, preferred: Option<Aio>) -> Result<AioOption> {
        let wanted = match (self.aio.as_deref(), preferred) {
            (None, None) => AioOption::Default,
            (Some("threads"), _) | (None, Some(Aio::Threads)) => AioOption::Threads,
            (Some("io_uring"), _) | (None, Some(Aio::IoUring)) => AioOption::IoUring,
            (Some("native"), _) | (None, Some(Aio::Native)) => AioOption::Native,
            (Some(other), _) => return Err(invalid_value(other)),
        };
        if wanted == AioOption::Native && !direct {
            return Err(Error::invalid(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        Ok(wanted)
    }

    /// Refuses a persistent reservation manager: there is none to be had.
    ///
    /// # Errors
    /// When one was named.
    pub fn refuse_pr_manager(&self) -> Result<()> {
        match &self.pr_manager {
            None => Ok(()),
            Some(id) => {
                Err(Error::invalid(format!("No persistent reservation manager with id '{id}'")))
            }
        }
    }
}

fn invalid_value(value: &str) -> Error {
    Error::invalid(format!("invalid parameter value: {value}"))
}
