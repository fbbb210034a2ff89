//! Runtime options of an open image. A reopen can change these options. The options are not stored in the image, but the
//! default of `lazy-refcounts` is a bit of the image header.
//!
//! - `lazy-refcounts`: write-back cycles do not write refcounts. Refcounts are written at the latest when the image is closed.
//!   The dirty bit of the header is set before the disk gets a reference to a cluster whose refcount is not on disk. The bit is
//!   cleared when all refcounts are on disk. Opening a dirty image for writing repairs its refcounts.
//! - `pass-discard-*`, `discard-no-unref`: which freed clusters are discarded on the host, and whether discarded clusters are
//!   freed at all.
//! - `cache-clean-interval`: the time after which unused slices of the caches are dropped (see `slice_cache`).
//! - `overlap-check`: which metadata structures are protected from writes that overlap them (see `metadata/overlap`).

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::time::Duration;

use oxblk_core::{Error, Options, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ImageState;
use crate::qcow2::layout::{Autoclear, Compatible, Header};

bitflags::bitflags! {
    /// The effective runtime options.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in crate::qcow2) struct Modes: u32 {
        /// Refcounts are written at the latest when the image is closed, not in each write-back cycle.
        const LAZY = 1;
        /// Clusters that the guest discards are discarded on the host.
        const PASS_REQUEST = 1 << 1;
        /// Clusters that are freed by an operation on snapshots, or by emptying the image, are discarded on the host.
        const PASS_SNAPSHOT = 1 << 2;
        /// Other freed clusters are discarded on the host. Clusters behind the end of a shrunk disk are always discarded.
        const PASS_OTHER = 1 << 3;
        /// Discarded clusters whose copied flag is set stay allocated.
        const NO_UNREF = 1 << 4;
        /// The data file is a valid raw image. This value is a bit of the header, not an option.
        const RAW_DATA = 1 << 5;
        const MAIN_HEADER = 1 << 8;
        const ACTIVE_L1 = 1 << 9;
        const ACTIVE_L2 = 1 << 10;
        const REFCOUNT_TABLE = 1 << 11;
        const REFCOUNT_BLOCK = 1 << 12;
        const SNAPSHOT_TABLE = 1 << 13;
        const INACTIVE_L1 = 1 << 14;
        const INACTIVE_L2 = 1 << 15;
        const BITMAP_DIRECTORY = 1 << 16;
        /// The template `constant` of `overlap-check`: structures that can be checked in constant time.
        const CONSTANT = Self::MAIN_HEADER.bits() | Self::ACTIVE_L1.bits()
            | Self::REFCOUNT_TABLE.bits() | Self::SNAPSHOT_TABLE.bits()
            | Self::BITMAP_DIRECTORY.bits();
        /// The template `cached` of `overlap-check`: structures that can be checked without I/O.
        const CACHED = Self::CONSTANT.bits() | Self::ACTIVE_L2.bits()
            | Self::REFCOUNT_BLOCK.bits() | Self::INACTIVE_L1.bits();
        const EVERYTHING = Self::CACHED.bits() | Self::INACTIVE_L2.bits();
    }
}

/// The suboptions of `overlap-check`, each with its structure.
pub(in crate::qcow2) const STRUCTURES: [(&str, Modes); 9] = [
    ("main-header", Modes::MAIN_HEADER),
    ("active-l1", Modes::ACTIVE_L1),
    ("active-l2", Modes::ACTIVE_L2),
    ("refcount-table", Modes::REFCOUNT_TABLE),
    ("refcount-block", Modes::REFCOUNT_BLOCK),
    ("snapshot-table", Modes::SNAPSHOT_TABLE),
    ("inactive-l1", Modes::INACTIVE_L1),
    ("inactive-l2", Modes::INACTIVE_L2),
    ("bitmap-directory", Modes::BITMAP_DIRECTORY),
];

/// The names of structures, for messages.
pub(in crate::qcow2) fn structure_names(structures: Modes) -> String {
    let named = STRUCTURES.iter().filter(|(_, one)| structures.contains(*one));
    let written_out = |name: &str| match name.rsplit_once('-') {
        Some((state, level @ ("l1" | "l2"))) => format!("{state} {} table", level.to_uppercase()),
        _ => name.replace('-', " "),
    };
    let names: Vec<String> = named.map(|(name, _)| written_out(name)).collect();
    names.join(", ")
}

/// Default of `cache-clean-interval`, in seconds.
const CLEAN_INTERVAL: u64 = 600;

/// The options as they were given, apart from `overlap-check`.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Fields {
    lazy_refcounts: Option<bool>,
    pass_discard_request: Option<bool>,
    pass_discard_snapshot: Option<bool>,
    pass_discard_other: Option<bool>,
    discard_no_unref: Option<bool>,
    cache_clean_interval: Option<u64>,
}

/// The requested runtime options.
pub(in crate::qcow2) struct RunOptions {
    fields: Fields,
    protected: Modes,
}

impl RunOptions {
    /// Removes the runtime options from `options`.
    ///
    /// # Errors
    /// When a value is wrong. The text is the same as in QEMU's tools.
    pub(in crate::qcow2) fn take(options: &mut Options) -> Result<Self> {
        let interval = options.take_number("cache-clean-interval")?;
        let mut fields: Fields = options.extract()?;
        fields.cache_clean_interval = interval;
        if fields.cache_clean_interval.is_some_and(|seconds| u32::try_from(seconds).is_err()) {
            return Err(Error::invalid("Cache clean interval too big"));
        }
        let protected = match options.take("overlap-check") {
            None => Modes::CACHED,
            Some(Value::Object(map)) => protected(Options::from_map(map)?)?,
            Some(value) => template(value.as_str().unwrap_or_default())?,
        };
        Ok(Self { fields, protected })
    }

    /// The time after which unused slices of the caches are dropped. Zero means never.
    pub(in crate::qcow2) fn clean_interval(&self) -> Duration {
        Duration::from_secs(self.fields.cache_clean_interval.unwrap_or(CLEAN_INTERVAL))
    }

    /// The effective options for an image with this header. `unmap`: guest discards are passed to the host by default.
    ///
    /// # Errors
    /// When the image's version does not support a requested option.
    pub(in crate::qcow2) fn effective_modes(&self, header: &Header, unmap: bool) -> Result<Modes> {
        let fields = &self.fields;
        let lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        let lazy = fields.lazy_refcounts.unwrap_or(lazy && header.version >= 3);
        if lazy && header.version < 3 {
            return Err(Error::invalid(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
            ));
        }
        let no_unref = fields.discard_no_unref.unwrap_or(false);
        if no_unref && header.version < 3 {
            return Err(Error::invalid("discard-no-unref is only supported since qcow2 version 3"));
        }
        let mut modes = self.protected;
        modes.set(Modes::LAZY, lazy);
        modes.set(Modes::PASS_REQUEST, fields.pass_discard_request.unwrap_or(unmap));
        modes.set(Modes::PASS_SNAPSHOT, fields.pass_discard_snapshot.unwrap_or(true));
        modes.set(Modes::PASS_OTHER, fields.pass_discard_other.unwrap_or(false));
        modes.set(Modes::NO_UNREF, no_unref);
        modes.set(Modes::RAW_DATA, header.autoclear.contains(Autoclear::RAW_DATA_FILE));
        Ok(modes)
    }
}

fn template(name: &str) -> Result<Modes> {
    match name {
        "none" => Ok(Modes::empty()),
        "constant" => Ok(Modes::CONSTANT),
        "cached" => Ok(Modes::CACHED),
        "all" => Ok(Modes::EVERYTHING),
        other => Err(Error::invalid(format!(
            "Unsupported value '{other}' for qcow2 option 'overlap-check'. Allowed are any of the \
             following: none, constant, cached, all"
        ))),
    }
}

fn protected(mut options: Options) -> Result<Modes> {
    let mut modes = match (options.take_str("")?, options.take_str("template")?) {
        (Some(plain), Some(name)) if plain != name => {
            return Err(Error::invalid(format!(
                "Conflicting values for qcow2 options 'overlap-check' ('{plain}') and \
                 'overlap-check.template' ('{name}')"
            )));
        }
        (Some(name), _) | (None, Some(name)) => template(&name)?,
        (None, None) => Modes::CACHED,
    };
    for (name, structure) in STRUCTURES {
        let on = options.take_bool(name).map_err(|_| {
            Error::invalid(format!("Parameter 'overlap-check.{name}' expects 'on' or 'off'"))
        })?;
        if let Some(on) = on {
            modes.set(structure, on);
        }
    }
    match options.first_key() {
        None => Ok(modes),
        Some(key) => Err(Error::invalid(format!(
            "Block format 'qcow2' does not support the option 'overlap-check.{key}'"
        ))),
    }
}

impl ImageState {
    /// The effective options.
    pub(in crate::qcow2) fn modes(&self) -> Modes {
        Modes::from_bits_retain(self.modes.load(Acquire))
    }

    /// Sets the effective options.
    pub(in crate::qcow2) fn set_modes(&self, modes: Modes) {
        self.modes.store(modes.bits(), Release);
    }

    /// Turns these options on.
    pub(in crate::qcow2) fn add_modes(&self, modes: Modes) {
        self.modes.fetch_or(modes.bits(), AcqRel);
    }

    /// Turns these options off.
    pub(in crate::qcow2) fn remove_modes(&self, modes: Modes) {
        self.modes.fetch_and(!modes.bits(), AcqRel);
    }
}

impl ImageState {
    /// Whether clusters that the guest discards stay allocated. Never true with a data file, because each cluster of a data
    /// file belongs to one guest cluster.
    pub(in crate::qcow2) fn keeps_discarded(&self) -> bool {
        self.modes().contains(Modes::NO_UNREF) && !self.geometry.data_file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pairs: &[(&str, &str)]) -> Result<RunOptions> {
        let mut options = Options::new();
        for (key, value) in pairs {
            options.set(key, *value)?;
        }
        RunOptions::take(&mut options)
    }

    #[test]
    fn overlap_check_switches_modify_the_template() {
        let protected = |pairs| take(pairs).unwrap().protected;
        assert_eq!(protected(&[]), Modes::CACHED);
        assert_eq!(protected(&[("overlap-check", "none")]), Modes::empty());
        assert_eq!(
            protected(&[
                ("overlap-check.template", "constant"),
                ("overlap-check.main-header", "off"),
                ("overlap-check.inactive-l2", "on"),
            ]),
            (Modes::CONSTANT - Modes::MAIN_HEADER) | Modes::INACTIVE_L2
        );
    }

    #[test]
    fn wrong_values_fail_with_the_messages_of_qemus_tools() {
        let told = |pairs| take(pairs).err().unwrap().to_string();
        assert_eq!(
            told(&[("overlap-check", "foo")]),
            "Unsupported value 'foo' for qcow2 option 'overlap-check'. Allowed are any of the \
             following: none, constant, cached, all"
        );
        assert_eq!(
            told(&[("overlap-check", "constant"), ("overlap-check.template", "all")]),
            "Conflicting values for qcow2 options 'overlap-check' ('constant') and \
             'overlap-check.template' ('all')"
        );
        assert_eq!(
            told(&[("overlap-check.main-header", "x")]),
            "Parameter 'overlap-check.main-header' expects 'on' or 'off'"
        );
        assert_eq!(
            told(&[("overlap-check.foo", "on")]),
            "Block format 'qcow2' does not support the option 'overlap-check.foo'"
        );
        assert_eq!(
            told(&[("cache-clean-interval", "99999999999")]),
            "Cache clean interval too big"
        );
    }
}
