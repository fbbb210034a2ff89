//! Cache, discard and AIO modes, by the names that the command line uses.

use oxblk_core::OpenFlags;
use oxblk_ring::Aio;

/// The properties of a cache mode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CacheMode {
    /// Bypass the host's page cache.
    pub(crate) direct: bool,
    /// Flushes do nothing.
    pub(crate) no_flush: bool,
    /// Each write is durable when it completes.
    pub(crate) write_through: bool,
}

impl CacheMode {
    /// `writeback`: the default of most commands.
    pub(crate) const WRITEBACK: Self =
        Self { direct: false, no_flush: false, write_through: false };
    /// `unsafe`: the default for a new target, since a crash makes an incomplete target useless anyway.
    pub(crate) const UNSAFE: Self = Self { direct: false, no_flush: true, write_through: false };

    /// Reads a mode's name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (direct, no_flush, write_through) = match name {
            "none" | "off" => (true, false, false),
            "directsync" => (true, false, true),
            "writeback" => (false, false, false),
            "unsafe" => (false, true, false),
            "writethrough" => (false, false, true),
            _ => return None,
        };
        Some(Self { direct, no_flush, write_through })
    }

    /// Sets the flags of the mode.
    pub(crate) fn apply(self, flags: &mut OpenFlags) {
        flags.direct = self.direct;
        flags.no_flush = self.no_flush;
    }
}

/// Reads a discard mode: whether discards reach the host.
pub(crate) fn parse_discard(name: &str) -> Option<bool> {
    match name {
        "unmap" | "on" => Some(true),
        "ignore" | "off" => Some(false),
        _ => None,
    }
}

/// Reads the name of an AIO mode.
pub(crate) fn parse_aio(name: &str) -> Option<Aio> {
    match name {
        "threads" => Some(Aio::Threads),
        "native" => Some(Aio::Native),
        "io_uring" => Some(Aio::IoUring),
        _ => None,
    }
}
