//! [`Cache`]: the cache mode of an image. The cache modes and discard modes have the same names as in QEMU.

use std::fmt;
use std::str::FromStr;

use oxblk_core::{Error, OpenFlags};

/// Defines when writes reach the disk of the host, and whether the host's page cache is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// Writes go through the host's page cache, and survive a power cut after a flush. This is the default mode.
    #[default]
    Writeback,
    /// Writes bypass the host's page cache (`O_DIRECT`), and survive a power cut after a flush.
    None,
    /// Writes go through the host's page cache, and each write is flushed before it completes.
    Writethrough,
    /// Writes bypass the host's page cache (`O_DIRECT`), and each write is flushed before it completes.
    Directsync,
    /// Writes go through the host's page cache, and flushes do nothing. Use this mode for disks that are not needed
    /// after a crash.
    Unsafe,
}

impl Cache {
    /// Every cache mode.
    pub const ALL: &[Self] =
        &[Self::Writeback, Self::None, Self::Writethrough, Self::Directsync, Self::Unsafe];

    /// The mode with this QEMU name; `off` is another name of `none`. `None`: no mode has this name.
    pub fn parse(name: &str) -> Option<Self> {
        let name = if name == "off" { Self::None.name() } else { name };
        Self::ALL.iter().copied().find(|mode| mode.name() == name)
    }

    /// The QEMU name of the mode.
    pub fn name(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::None => "none",
            Self::Writethrough => "writethrough",
            Self::Directsync => "directsync",
            Self::Unsafe => "unsafe",
        }
    }

    /// Whether the host's page cache is bypassed (the option `cache.direct`).
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether flushes do nothing (the option `cache.no-flush`).
    pub fn ignores_flushes(self) -> bool {
        self == Self::Unsafe
    }

    /// Whether each write is flushed before it completes.
    pub fn is_write_through(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// Sets the flags for direct I/O and ignored flushes as the mode requires.
    pub(crate) fn apply(self, flags: &mut OpenFlags) {
        flags.direct = self.is_direct();
        flags.no_flush = self.ignores_flushes();
    }
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Cache {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::parse(name).ok_or_else(|| Error::invalid(format!("Invalid cache mode '{name}'")))
    }
}

/// The discard mode with this QEMU name: `Some(true)` if discards free space on the host (`unmap`, `on`), `Some(false)`
/// if discards are ignored (`ignore`, `off`). `None`: no mode has this name.
pub fn parse_discard(name: &str) -> Option<bool> {
    match name {
        "unmap" | "on" => Some(true),
        "ignore" | "off" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cache_mode_is_found_by_its_name() {
        for mode in Cache::ALL {
            assert_eq!(Cache::parse(mode.name()), Some(*mode));
        }
        assert_eq!("off".parse::<Cache>().unwrap(), Cache::None);
        assert_eq!(
            "write-back".parse::<Cache>().unwrap_err().to_string(),
            "Invalid cache mode 'write-back'"
        );
    }

    #[test]
    fn a_cache_mode_sets_the_same_options_as_in_qemu() {
        let options =
            |mode: Cache| (mode.is_direct(), mode.ignores_flushes(), mode.is_write_through());
        assert_eq!(options(Cache::Writeback), (false, false, false));
        assert_eq!(options(Cache::None), (true, false, false));
        assert_eq!(options(Cache::Writethrough), (false, false, true));
        assert_eq!(options(Cache::Directsync), (true, false, true));
        assert_eq!(options(Cache::Unsafe), (false, true, false));
    }
}
