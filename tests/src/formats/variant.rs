//! A variant of a format: creation options, and what images made with them can do.

use oxblk_core::Options;

use super::TestFormat;

/// A way to make images.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// Names it in test output and on the command line of the soak.
    pub name: &'static str,
    /// The format of the images.
    pub format: &'static dyn TestFormat,
    /// Creation options, as after `-o`.
    pub options: &'static str,
    /// The unit of allocation in bytes, around which offsets are chosen.
    pub cluster: u64,
    /// Images can have a backing file.
    pub backing: bool,
    /// Guest data is encrypted: it takes the password to open an image.
    pub encrypted: bool,
    /// Clusters can be written compressed.
    pub compress: bool,
    /// Images can be checked, by us and by `qemu-img check`.
    pub check: bool,
    /// After a power cut the image must be opened for writing before it checks clean.
    pub repairs_on_open: bool,
    /// Images can have internal snapshots.
    pub snapshots: bool,
    /// Persistent bitmaps record what is written.
    pub bitmaps: bool,
    /// Guest data lies in a file of its own.
    pub data_file: bool,
    /// The data file is by itself what a guest reads.
    pub raw_data: bool,
    /// Images can change their size.
    pub resizes: bool,
    /// QEMU gives space back that is discarded.
    pub discards_by_qemu: bool,
    /// QEMU has the file hold zeroes that are written as holes, where the image tells of them.
    pub zeroes_by_qemu: bool,
    /// QEMU can tell how large a new image would be.
    pub measured_by_qemu: bool,
}

impl Variant {
    /// A variant whose images can be created, read, written and resized, and nothing more. `cluster` is in bytes.
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
            cluster,
            backing: false,
            encrypted: false,
            compress: false,
            check: false,
            repairs_on_open: false,
            snapshots: false,
            bitmaps: false,
            data_file: false,
            raw_data: false,
            resizes: true,
            discards_by_qemu: true,
            zeroes_by_qemu: true,
            measured_by_qemu: true,
        }
    }

    /// The name of the format's driver.
    pub fn driver(&self) -> &'static str {
        self.format.name()
    }

    /// Adds to the options that an image is opened with what this variant needs.
    pub fn add_open_options(&self, options: &mut Options) {
        self.format.add_open_options(self, options);
    }
}
