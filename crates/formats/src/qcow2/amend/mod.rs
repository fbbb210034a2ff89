//! Amending: changing the options of an existing image.
//!
//! The options, the snapshots and the refcounts are checked first. Then passwords are changed, if encryption options are given.
//! Then these steps follow. The image is valid after each step:
//!
//! 1. for an upgrade: complete the snapshot table for version 3, then write the header of version 3;
//! 2. change the feature bits and the data file's name in the header;
//! 3. grow the disk, if its size increases;
//! 4. for a downgrade to version 2: replace the zero clusters (`downgrade`);
//! 5. shrink the disk, if its size decreases: this cannot be undone;
//! 6. write refcounts of another width to new clusters (`clusters/width`), then write the header that refers to these refcounts
//!    and has the final version.
//!
//! If step 4 or 6 fails and the disk has grown, the amend tries to shrink the disk to its old size. If step 6 fails after the
//! disk has shrunk, the error says so.
//!
//! Lazy refcounts are off during these steps. After the amend, the old setting applies again, unless step 2 has changed the
//! setting. The new setting also applies after a failure of a later step, because the header contains the new setting.
//!
//! After a change of the version or of the refcount width, the state in memory is out of date. So the image fails all further
//! requests until it is opened again.

mod downgrade;

use oxblk_core::amend::{Amend, AmendRequest};
use oxblk_core::create::{CreateOption, OptionType};
use oxblk_core::{BoxFuture, Error, Options, Preallocation, Result};

use super::Qcow2;
use super::create_options::{option, refcount_order};
use super::image_state::run_options::Modes;
use super::image_state::stopped::Replaced;
use super::layout::{Autoclear, Compatible, CryptMethod, Header, Incompatible};

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

/// Error text for encryption options of an image that is not encrypted.
const NOT_ENCRYPTED: &str = "Can't amend encryption options - encryption not present";

/// The requested changes. `None` means no change.
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
    /// The encryption options, without the prefix `encrypt.` of their names.
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
            refcount_bits: options.take_number("refcount_bits")?,
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

    /// Binary logarithm of the requested refcount width.
    fn refcount_order(&self) -> Result<Option<u32>> {
        self.refcount_bits.map(|bits| refcount_order(Some(bits))).transpose()
    }

    /// Refuses changes that are impossible for an image with this header. If several options are wrong, the reported error is
    /// the same as in QEMU.
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

/// The steps of an amend that change more than single fields of the header.
struct Steps {
    /// Version 2 becomes version 3.
    upgrade: bool,
    /// Version 3 becomes version 2.
    downgrade: bool,
    /// The new size of the disk, if it changes.
    size: Option<u64>,
    /// Binary logarithm of the new refcount width, if it changes.
    order: Option<u32>,
}

/// Refuses a downgrade of an image with features that version 2 does not have.
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
        let mut lazy = self.image_state.modes() & Modes::LAZY;
        let amended = self.amend_eagerly(request, &mut lazy).await;
        self.image_state.add_modes(lazy);
        amended
    }

    /// Amends the image with lazy refcounts turned off. When the header has a new value of the option `lazy_refcounts`, sets
    /// `lazy` to this value, also if a later step fails.
    async fn amend_eagerly(&self, request: AmendRequest, lazy: &mut Modes) -> Result<()> {
        self.image_state.check_writable()?;
        let wanted = Wanted::read(request.options)?;
        let header = self.image_state.header_on_disk().await?;
        wanted.check(&header)?;
        // Freed clusters must have their final refcounts on disk before refcounts are checked and new structures are laid out.
        self.metadata.close_image().await?;
        self.metadata.stop_postponing().await?;
        let steps = self.plan_steps(&wanted, &header).await?;
        if !wanted.encrypt.is_empty() {
            self.amend_keys(wanted.encrypt.clone(), request.force).await?;
        }
        if steps.upgrade {
            self.metadata.complete_snapshots().await?;
            self.metadata.rewrite_header(|header| header.version = 3).await?;
        }
        self.amend_header(&wanted).await?;
        if let Some(on) = wanted.lazy_refcounts {
            *lazy = if on { Modes::LAZY } else { Modes::empty() };
        }
        let old_size = self.image_state.size();
        if let Some(size) = steps.size.filter(|size| *size > old_size) {
            self.resize_image(size, Preallocation::Off).await?;
        }
        let entry_not_in_use = self.finish_amend(&steps, old_size, &*request.progress).await;
        if entry_not_in_use.is_err() {
            // The image stays open. The bitmaps may have been stored already, so the bitmaps are marked as in use again.
            self.bitmaps.use_bitmaps().await;
            self.shrink_back(old_size).await;
        }
        entry_not_in_use?;
        if steps.upgrade || steps.downgrade || steps.order.is_some() {
            // The state in memory has the old version or refcount width: the image must be opened again.
            self.image_state.stop_requests(Replaced::Amend);
        }
        Ok(())
    }

    /// Returns the steps of the amend, and refuses changes that the image does not allow. The caller has written all dirty
    /// metadata.
    async fn plan_steps(&self, wanted: &Wanted, header: &Header) -> Result<Steps> {
        let version = wanted.version.unwrap_or(header.version);
        let steps = Steps {
            upgrade: header.version < 3 && version >= 3,
            downgrade: header.version >= 3 && version < 3,
            size: wanted.size.filter(|size| *size != header.size),
            order: wanted.refcount_order()?.filter(|o| *o != header.geometry.refcount_order),
        };
        if steps.downgrade {
            self.metadata.check_needs_no_repair()?;
            self.check_snapshots_for_downgrade(wanted.size.unwrap_or(header.size)).await?;
        }
        if steps.size.is_some() && version < 3 && header.version < 3 {
            self.check_resizable()?;
        }
        if let Some(order) = steps.order {
            self.clusters.check_refcounts_fit(order).await?;
        }
        Ok(steps)
    }

    /// Changes the passwords of an encrypted image.
    async fn amend_keys(&self, options: Options, force: bool) -> Result<()> {
        let Some(encryption) = self.data.encryption() else {
            return Err(Error::invalid(NOT_ENCRYPTED));
        };
        let file = self.image_state.file()?;
        // While the header lock is held, a compaction does not move the LUKS header.
        let _guard = self.image_state.lock_header().await;
        encryption.change_keys(&file, options, force).await
    }

    /// Changes the feature bits and the data file's name in the header.
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
        self.metadata.rewrite_header(amend).await?;
        if wanted.data_file_raw == Some(false) {
            self.image_state.remove_modes(Modes::RAW_DATA);
        }
        Ok(())
    }

    /// Shrinks the disk to its old `size` if the failed amend has grown the disk. An error of the shrinking is only logged.
    async fn shrink_back(&self, size: u64) {
        if size < self.image_state.size()
            && self.image_state.check_usable().is_ok()
            && let Err(error) = self.resize_image(size, Preallocation::Off).await
        {
            tracing::warn!("qcow2: the disk could not be shrunk to its old size: {error}");
        }
    }

    /// Executes steps 4 to 6: replaces zero clusters for a downgrade, shrinks the disk, writes refcounts of another width, and
    /// writes the final header.
    async fn finish_amend(
        &self,
        steps: &Steps,
        old_size: u64,
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        if steps.downgrade {
            self.expand_zero_clusters(progress).await?;
            self.metadata.check_needs_no_repair()?;
        }
        let smaller = steps.size.filter(|size| *size < old_size);
        if let Some(size) = smaller {
            self.resize_image(size, Preallocation::Off).await?;
        }
        let written = self.write_final_header(steps, progress).await;
        written.map_err(|error| match smaller {
            Some(_) => {
                error.prefix("The disk has its new size, but the other options did not change")
            }
            None => error,
        })
    }

    async fn write_final_header(&self, steps: &Steps, progress: &dyn Fn(u64, u64)) -> Result<()> {
        if steps.order.is_none() && !steps.downgrade {
            return self.metadata.close_image().await;
        }
        // Metadata and bitmaps cannot be written after the version or the refcount width has changed.
        self.complete_image().await?;
        let refcounts = match steps.order {
            Some(order) => Some(self.clusters.write_refcounts(order, progress).await?),
            None => None,
        };
        let finish = |header: &mut Header| {
            if let Some(new) = &refcounts {
                header.geometry.refcount_order = new.order;
                header.refcount_table_offset = new.table_offset;
                header.refcount_table_clusters = new.table_clusters;
            }
            if steps.downgrade {
                header.version = 2;
                header.incompatible = Incompatible::empty();
                header.compatible = Compatible::empty();
                header.autoclear = Autoclear::empty();
                header.unknown_fields.clear();
            }
        };
        self.metadata.rewrite_header(finish).await?;
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
    fn options_are_parsed_and_invalid_options_are_refused() {
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
