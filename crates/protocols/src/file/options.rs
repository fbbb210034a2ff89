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
    /// Maximum number of requests submitted to the kernel in one call. The engine batches by itself, so the value is only
    /// checked.
    pub aio_max_batch: Option<u64>,
    /// Object that manages persistent reservations: not available.
    pub pr_manager: Option<String>,
    /// Drop the page cache when a migration transfers the image to another host.
    pub drop_cache: Option<bool>,
    /// Debugging aid for `drop_cache`; accepted and without effect.
    pub x_check_cache_dropped: Option<bool>,
}

/// Whether other processes are excluded by locks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// If the host supports locks on the file.
    #[default]
    Auto,
    /// Always; opening fails if the host does not support it.
    On,
    /// Never.
    Off,
}

/// The `aio` option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AioOption {
    /// No option given: io_uring if it is available, which is always the fastest here.
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
    /// The engine's value for it.
    pub fn engine(self) -> Aio {
        match self {
            Self::Default | Self::IoUring => Aio::IoUring,
            Self::Threads => Aio::Threads,
            Self::Native => Aio::Native,
        }
    }
}

impl From<Aio> for AioOption {
    fn from(aio: Aio) -> Self {
        match aio {
            Aio::IoUring => Self::IoUring,
            Aio::Native => Self::Native,
            Aio::Threads => Self::Threads,
        }
    }
}

impl FileOptions {
    /// The `locking` option.
    ///
    /// # Errors
    /// If it is none of the three words.
    pub fn locking(&self) -> Result<Locking> {
        match self.locking.as_deref() {
            None | Some("auto") => Ok(Locking::Auto),
            Some("on") => Ok(Locking::On),
            Some("off") => Ok(Locking::Off),
            Some(other) => Err(invalid_value(other)),
        }
    }

    /// The `aio` option, or the opener's preference if there is none, checked against the cache mode.
    ///
    /// # Errors
    /// If it is none of the three words, or `native` without `cache.direct=on`.
    pub fn aio(&self, direct: bool, preferred: Option<Aio>) -> Result<AioOption> {
        let wanted = match (self.aio.as_deref(), preferred) {
            (None, None) => AioOption::Default,
            (Some(name), _) => Aio::parse(name).ok_or_else(|| invalid_value(name))?.into(),
            (None, Some(preferred)) => preferred.into(),
        };
        if wanted == AioOption::Native && !direct {
            return Err(Error::invalid(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        Ok(wanted)
    }

    /// Refuses a persistent reservation manager: there is none.
    ///
    /// # Errors
    /// If one was named.
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
