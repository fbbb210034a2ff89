//! Amending: other options for an image that exists.
//!
//! Everything that can be refused is refused before anything changes. Then come, each of them leaving a whole image:
//!
//! 1. the header of version 3, if the image gets that, after what snapshots must have in it;
//! 2. features and the data file's name;
//! 3. the size, if the disk grows;
//! 4. for version 2: zero clusters become data, or nothing (`downgrade`);
//! 5. the size, if the disk shrinks: what is cut off does not come back;
//! 6. refcounts of another width, written beside the old ones (`refcount_width`), and the header that names them and has
//!    its final version.
//!
//! If one of the last three fails, a disk that has grown gets its old size back.
//!
//! What is in memory is of the old version and width; so the image takes no more requests once either has changed.

mod downgrade;
mod refcount_width;

use std::sync::atomic::Ordering::{AcqRel, Release};

use oxblk_core::amend::{Amend, AmendRequest};
use oxblk_core::create::{CreateOption, OptionType};
use oxblk_core::{BoxFuture, ChildIdx, Error, Options, Preallocation, Result};

use super::Qcow2;
use super::create::refcount_order;
use super::layout::{Autoclear, Compatible, CryptMethod, Header, Incompatible};
use super::run_options::Modes;

const fn option(name: &'static str, kind: OptionType, help: &'static str) -> CreateOption {
    CreateOption { name, kind, help, default: None }
}

/// The options that can be amended.
pub(super) static AMEND_OPTIONS: &[CreateOption] = &[
    option("backing_file", OptionType::String, "File name of a base image"),
    option("backing_fmt", OptionType::String, "Image format of the base image"),
    option("compat", OptionType::String, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    option("data_file", OptionType::String, "File name of an external data file"),
    option(
        "data_file_raw",
        OptionType::Bool,
        "The external data file must stay valid as a raw image",
    ),
    option("encrypt.iter-time", OptionType::Number, "Time to spend in PBKDF in milliseconds"),
    option("encrypt.keyslot", OptionType::Number, "Select a single keyslot to modify explicitly"),
    option(
        "encrypt.new-secret",
        OptionType::String,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    option(
        "encrypt.old-secret",
        OptionType::String,
        "Select all keyslots that match this password",
    ),
    option(
        "encrypt.state",
        OptionType::String,
        "Select new state of affected keyslots (active/inactive)",
    ),
    option("lazy_refcounts", OptionType::Bool, "Postpone refcount updates"),
    option("refcount_bits", OptionType::Number, "Width of a reference count entry in bits"),
    option("size", OptionType::Size, "Virtual disk size"),
];

/// What is said where there are no keys to change.
const NOT_ENCRYPTED: &str = "Can't amend encryption options - encryption not present";

/// What an image is to become; nothing for what stays as it is.
#[derive(Debug, Default)]
struct Wanted {
    version: Option<u32>,
    size: Option<u64>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
    backing_file: Option<String>,
    backing_format: Option<String>,
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    /// Options of encryption.
    encrypt: Options,
}

impl Wanted {
    fn read(mut options: Options) -> Result<Self> {
        let version = match options.take_str("compat")?.as_deref() {
            None => None,
            Some("0.10" | "v2") => Some(2),
            Some("1.1" | "v3") => Some(3),
            Some(other) => {
                return Err(Error::invalid(format!("Unknown compatibility level {other}")));
            }
        };
        let mut encrypt = options.take_options("encrypt").unwrap_or_default();
        let wanted = Self {
            version,
            size: options.take_size("size")?.filter(|size| *size > 0),
            lazy_refcounts: options.take_bool("lazy_refcounts")?,
            refcount_bits: options.take_size("refcount_bits")?,
            backing_file: options.take_str("backing_file")?,
            backing_format: options.take_str("backing_fmt")?,
            data_file: options.take_str("data_file")?,
            data_file_raw: options.take_bool("data_file_raw")?,
            encrypt: Options::new(),
        };
        let rest: Vec<String> = options.keys().map(str::to_owned).collect();
        for key in rest {
            match (key.strip_prefix("encrypt."), options.take(&key)) {
                (Some(own), Some(value)) => encrypt.insert(own, value),
                _ => return Err(Error::invalid(format!("Invalid parameter '{key}'"))),
            }
        }
        Ok(Self { encrypt, ..wanted })
    }

    /// The width of refcounts.
    fn refcount_order(&self) -> Result<Option<u32>> {
        self.refcount_bits.map(|bits| refcount_order(Some(bits))).transpose()
    }

    /// Refuses what cannot be; of several faults it reports the one that QEMU does.
    fn check(&self, header: &Header) -> Result<()> {
        let version = self.version.unwrap_or(header.version);
        let fault = |text: &'static str| Err(Error::invalid(text));
        if !self.encrypt.is_empty() && header.crypt_method == CryptMethod::None {
            return fault(NOT_ENCRYPTED);
        }
        if self.data_file.is_some() && !header.incompatible.contains(Incompatible::DATA_FILE) {
            return fault("data-file can only be set for images that use an external data file");
        }
        let raw = header.autoclear.contains(Autoclear::RAW_DATA_FILE);
        if self.data_file_raw == Some(true) && !raw {
            return fault("data-file-raw cannot be set on existing images");
        }
        let order = self.refcount_order()?.unwrap_or(header.geometry.refcount_order);
        if order != header.geometry.refcount_order && order != 4 && version < 3 {
            return Err(Error::unsupported(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            ));
        }
        let backing = (&self.backing_file, &self.backing_format);
        let now = (&header.backing_file, &header.extensions.backing_format);
        if backing != (&None, &None) && backing != now {
            return Err(Error::invalid("Cannot amend the backing file")
                .with_hint("You can use 'qemu-img rebase' instead."));
        }
        let lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        if self.lazy_refcounts == Some(true) && !lazy && version < 3 {
            return fault(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use compat=1.1 or greater)",
            );
        }
        if self.size.is_some_and(|size| !size.is_multiple_of(512)) {
            return fault("The new size must be a multiple of 512");
        }
        if header.version >= 3 && version < 3 {
            return check_downgrade(header, order);
        }
        Ok(())
    }
}

/// Refuses version 2 for what it has no words for.
fn check_downgrade(header: &Header, refcount_order: u32) -> Result<()> {
    if refcount_order != 4 {
        return Err(Error::unsupported("compat=0.10 requires refcount_bits=16"));
    }
    if header.incompatible.contains(Incompatible::DATA_FILE) {
        return Err(Error::unsupported("Cannot downgrade an image with a data file"));
    }
    let features = header.incompatible.difference(Incompatible::DIRTY);
    if !features.is_empty() {
        return Err(Error::unsupported(format!(
            "Cannot downgrade an image with incompatible features {:#x} set",
            features.bits()
        )));
    }
    if header.extensions.bitmaps.is_some() {
        return Err(Error::unsupported("Cannot downgrade an image with persistent bitmaps"));
    }
    Ok(())
}

impl Qcow2 {
    async fn amend_image(&self, request: AmendRequest) -> Result<()> {
        self.check_writable()?;
        let wanted = Wanted::read(request.options)?;
        let header = self.header_on_disk().await?;
        wanted.check(&header)?;
        if !wanted.encrypt.is_empty() {
            self.amend_keys(wanted.encrypt.clone(), request.force).await?;
        }
        let version = wanted.version.unwrap_or(header.version);
        if header.version >= 3 && version < 3 {
            self.check_needs_no_repair()?;
            self.check_snapshots_for_downgrade(wanted.size.unwrap_or(header.size)).await?;
        }
        let size = wanted.size.filter(|size| *size != header.size);
        if size.is_some() && version < 3 && header.version < 3 {
            self.check_resizable()?;
        }
        // What is freed has to be free, and written, before anything is laid out anew.
        self.close_image().await?;
        self.stop_postponing().await?;
        let order = wanted.refcount_order()?.filter(|o| *o != header.geometry.refcount_order);
        if let Some(order) = order {
            self.check_refcounts_fit(order).await?;
        }
        if header.version < 3 && version >= 3 {
            self.complete_snapshots().await?;
            self.rewrite_header(|header| header.version = 3).await?;
        }
        self.amend_header(&wanted).await?;
        let old_size = self.size();
        if let Some(size) = size.filter(|size| *size > old_size) {
            self.resize_image(size, Preallocation::Off).await?;
        }
        let smaller = size.filter(|size| *size < old_size);
        let downgraded = header.version >= 3 && version < 3;
        let finished = self.finish_amend(order, downgraded, smaller, &*request.progress).await;
        if finished.is_err() {
            // Requests go on, and the bitmaps may have been completed.
            self.use_bitmaps().await;
            self.shrink_back(old_size).await;
        }
        finished?;
        if version != header.version || order.is_some() {
            // What is in memory tells of the image as it was: it has to be opened again.
            self.corrupt.store(true, Release);
        }
        Ok(())
    }

    /// Passwords of an encrypted image.
    async fn amend_keys(&self, options: Options, force: bool) -> Result<()> {
        let Some(encryption) = &self.encryption else {
            return Err(Error::invalid(NOT_ENCRYPTED));
        };
        let file = self.children.require(ChildIdx::FILE)?;
        // The LUKS header stays where it is meanwhile.
        let _turn = self.hold_header().await;
        encryption.change_keys(&file, options, force).await
    }

    /// Features and names, which the header alone tells.
    async fn amend_header(&self, wanted: &Wanted) -> Result<()> {
        let amend = |header: &mut Header| {
            if let Some(lazy) = wanted.lazy_refcounts
                && header.version >= 3
            {
                header.compatible.set(Compatible::LAZY_REFCOUNTS, lazy);
            }
            if wanted.data_file_raw == Some(false) {
                header.autoclear.remove(Autoclear::RAW_DATA_FILE);
            }
            if let Some(name) = &wanted.data_file {
                header.extensions.data_file = Some(name.clone()).filter(|name| !name.is_empty());
            }
        };
        self.rewrite_header(amend).await?;
        if wanted.data_file_raw == Some(false) {
            self.modes.fetch_and(!Modes::RAW_DATA.bits(), AcqRel);
        }
        Ok(())
    }

    /// Gives a disk that has grown its old size back, as the rest of what was wanted has failed.
    async fn shrink_back(&self, size: u64) {
        if size < self.size()
            && self.check_usable().is_ok()
            && let Err(error) = self.resize_image(size, Preallocation::Off).await
        {
            tracing::warn!("qcow2: the disk stays larger than it was: {error}");
        }
    }

    /// Leaves no zero clusters for version 2, shrinks the disk to `smaller`, writes refcounts of another width if one is
    /// given, and the header as it stays.
    async fn finish_amend(
        &self,
        order: Option<u32>,
        downgrade: bool,
        smaller: Option<u64>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        if downgrade {
            self.expand_zero_clusters(progress).await?;
            self.check_needs_no_repair()?;
        }
        if let Some(size) = smaller {
            self.resize_image(size, Preallocation::Off).await?;
        }
        if order.is_some() || downgrade {
            // They cannot be written once refcounts are of another kind.
            self.complete_image().await?;
        } else {
            self.close_image().await?;
        }
        let refcounts = match order {
            Some(order) => Some(self.write_refcounts(order, progress).await?),
            None => None,
        };
        let finish = |header: &mut Header| {
            if let Some(new) = &refcounts {
                header.geometry.refcount_order = new.order;
                header.refcount_table_offset = new.table_offset;
                header.refcount_table_clusters = new.table_clusters;
            }
            if downgrade {
                header.version = 2;
                header.incompatible = Incompatible::empty();
                header.compatible = Compatible::empty();
                header.autoclear = Autoclear::empty();
                header.unknown_fields.clear();
            }
        };
        self.rewrite_header(finish).await?;
        if let Some(new) = refcounts {
            new.keep();
        }
        Ok(())
    }
}

impl Amend for Qcow2 {
    fn amend(&self, request: AmendRequest) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.amend_image(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Wanted> {
        let mut options = Options::new();
        for (key, value) in pairs {
            options.insert(key, *value);
        }
        Wanted::read(options)
    }

    #[test]
    fn options_are_read_and_wrong_ones_refused() {
        let wanted = read(&[("compat", "v2"), ("size", "0"), ("refcount_bits", "64")]).unwrap();
        assert_eq!((wanted.version, wanted.size), (Some(2), None));
        assert_eq!(wanted.refcount_order().unwrap(), Some(6));
        assert_eq!(
            read(&[("compat", "0.9")]).unwrap_err().to_string(),
            "Unknown compatibility level 0.9"
        );
        assert_eq!(
            read(&[("cluster_size", "4k")]).unwrap_err().to_string(),
            "Invalid parameter 'cluster_size'"
        );
        let wanted = read(&[("encrypt.state", "active"), ("encrypt.keyslot", "1")]).unwrap();
        assert_eq!(wanted.encrypt.get_str("state"), Some("active"));
    }
}
