//! A variant of a format: creation options, and the abilities of images with these options.

use oxblk_core::Options;

use super::TestFormat;

/// One way to create images.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// The name in test output and on the command line of the soak.
    pub name: &'static str,
    /// The format of the images.
    pub format: &'static dyn TestFormat,
    /// Creation options, as written after `-o`.
    pub options: &'static str,
    /// Further creation options, with which a disk gets exactly the requested size.
    pub exact_size: &'static str,
    /// The unit of allocation in bytes. Tests choose offsets around multiples of this unit.
    pub cluster: u64,
    /// Images can have a backing file.
    pub backing: bool,
    /// Guest data is encrypted, so opening an image needs the password.
    pub encrypted: bool,
    /// Clusters can be written compressed.
    pub compress: bool,
    /// oxblk can check images.
    pub check: bool,
    /// `qemu-img check` can check images, if oxblk can.
    pub checked_by_qemu: bool,
    /// After a power cut an image must be opened for writing before it passes the check.
    pub repairs_on_open: bool,
    /// Images can have internal snapshots.
    pub snapshots: bool,
    /// Persistent bitmaps record the writes to an image.
    pub bitmaps: bool,
    /// Guest data is in a data file, apart from the metadata.
    pub data_file: bool,
    /// The data file is a raw image of the disk.
    pub raw_data: bool,
    /// Images can be resized.
    pub resizes: bool,
    /// QEMU can make the disk smaller.
    pub shrunk_by_qemu: bool,
    /// QEMU releases discarded space to the host.
    pub discards_by_qemu: bool,
    /// QEMU punches holes in the file for written zeroes, if the format can mark ranges as zero.
    pub zeroes_by_qemu: bool,
    /// `qemu-img measure` can compute the size of a new image.
    pub measured_by_qemu: bool,
}

impl Variant {
    /// A variant whose images can be created, read, written and resized; all other abilities are off. `cluster` is in bytes.
    pub(super) const fn new(
        format: &'static dyn TestFormat,
        name: &'static str,
        options: &'static str,
        cluster: u64,
    ) -> Self {
        Self {
            name,
            format,
            options,
            exact_size: "",
            cluster,
            backing: false,
            encrypted: false,
            compress: false,
            check: false,
            checked_by_qemu: true,
            repairs_on_open: false,
            snapshots: false,
            bitmaps: false,
            data_file: false,
            raw_data: false,
            resizes: true,
            shrunk_by_qemu: true,
            discards_by_qemu: true,
            zeroes_by_qemu: true,
            measured_by_qemu: true,
        }
    }

    /// The name of the format's driver.
    pub fn driver(&self) -> &'static str {
        self.format.name()
    }

    /// The creation options of a disk with exactly the requested size, as written after `-o`.
    pub fn exact_options(&self) -> String {
        let parts = [self.options, self.exact_size];
        let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        parts.join(",")
    }

    /// Adds the options that are needed to open an image of this variant.
    pub fn add_open_options(&self, options: &mut Options) {
        self.format.add_open_options(self, options);
    }
}
