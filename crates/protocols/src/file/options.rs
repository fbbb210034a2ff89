//! Options of `file` and `host_device`.

use oxblk_core::{Error, Result};
use oxblk_ring::Aio;
use serde::{Deserialize, Serialize};

/// The driver's own options, by their names in `-blockdev`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FileOptions {
    /// Path of the file.
    pub filename: Option<String>,
    /// `on`, `off` or `auto`.
    pub locking: Option<String>,
    /// `threads`, `native` or `io_uring`.
    pub aio: Option<String>,
    /// Maximum number of requests per submission to the kernel. The value has no effect, because `oxblk_ring`
    /// chooses the size of its batches.
    pub aio_max_batch: Option<u64>,
    /// ID of the object that manages persistent reservations. Such objects do not exist, so the option is refused.
    pub pr_manager: Option<String>,
    /// Whether a migration to another host drops the page cache. The option is accepted and has no effect.
    pub drop_cache: Option<bool>,
    /// Debugging aid for `drop_cache`. The option is accepted and has no effect.
    pub x_check_cache_dropped: Option<bool>,
}

/// Whether file locks keep other processes from using the file in conflicting ways.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Locks are used if the host supports locks on the file.
    #[default]
    Auto,
    /// Locks are used; opening fails if the host does not support locks on the file.
    On,
    /// No locks are used.
    Off,
}

/// The `aio` option.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AioOption {
    /// The option is not given: io_uring if it is available, otherwise worker threads.
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
    /// The corresponding I/O method of `oxblk_ring`.
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
    /// If the value is none of the three words.
    pub fn locking(&self) -> Result<Locking> {
        match self.locking.as_deref() {
            None | Some("auto") => Ok(Locking::Auto),
            Some("on") => Ok(Locking::On),
            Some("off") => Ok(Locking::Off),
            Some(other) => Err(invalid_value(other)),
        }
    }

    /// The `aio` option, or `preferred` if the option is not given. `direct` is the cache mode (`cache.direct`).
    ///
    /// # Errors
    /// If the value is none of the three words, or is `native` without `cache.direct=on`.
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

    /// Refuses the option `pr-manager`, because persistent reservation managers are not supported.
    ///
    /// # Errors
    /// If the option is given.
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
