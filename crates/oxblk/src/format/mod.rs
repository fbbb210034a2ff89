//! Image formats by name, and typed options for new images of each format.

mod parallels;
mod qcow2;
mod qed;
mod raw;
mod vdi;
mod vpc;

use std::fmt;
use std::str::FromStr;

use oxblk_core::{Error, Options};

pub use parallels::ParallelsOptions;
pub use qcow2::{Compression, Qcow2Options, Qcow2Version};
pub use qed::QedOptions;
pub use raw::RawOptions;
pub use vdi::VdiOptions;
pub use vpc::VpcOptions;

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the disk without metadata.
    Raw,
    /// QEMU's own format.
    Qcow2,
    /// VirtualBox's format.
    Vdi,
    /// The expandable format of Parallels.
    Parallels,
    /// QEMU Enhanced Disk, a former format of QEMU.
    Qed,
    /// The VHD format of Virtual PC, Hyper-V and Azure.
    Vpc,
}

impl Format {
    /// Every format.
    pub const ALL: &[Self] =
        &[Self::Raw, Self::Qcow2, Self::Vdi, Self::Parallels, Self::Qed, Self::Vpc];

    /// The QEMU name of the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vdi => "vdi",
            Self::Parallels => "parallels",
            Self::Qed => "qed",
            Self::Vpc => "vpc",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|format| format.name() == name);
        found.copied().ok_or_else(|| Error::invalid(format!("Unknown driver '{name}'")))
    }
}

/// A format, with the options of a new image. A [`Format`] converts into this type with QEMU's default options.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum NewFormat {
    /// A raw image.
    Raw(RawOptions),
    /// A qcow2 image.
    Qcow2(Qcow2Options),
    /// A VDI image.
    Vdi(VdiOptions),
    /// A parallels image.
    Parallels(ParallelsOptions),
    /// A QED image.
    Qed(QedOptions),
    /// A VPC image.
    Vpc(VpcOptions),
}

impl NewFormat {
    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
            Self::Vdi(_) => Format::Vdi,
            Self::Parallels(_) => Format::Parallels,
            Self::Qed(_) => Format::Qed,
            Self::Vpc(_) => Format::Vpc,
        }
    }

    /// The options by their QEMU names.
    pub fn to_options(&self) -> Options {
        match self {
            Self::Raw(options) => options.to_options(),
            Self::Qcow2(options) => options.to_options(),
            Self::Vdi(options) => options.to_options(),
            Self::Parallels(options) => options.to_options(),
            Self::Qed(options) => options.to_options(),
            Self::Vpc(options) => options.to_options(),
        }
    }
}

impl From<Format> for NewFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw(RawOptions::default()),
            Format::Qcow2 => Self::Qcow2(Qcow2Options::default()),
            Format::Vdi => Self::Vdi(VdiOptions::default()),
            Format::Parallels => Self::Parallels(ParallelsOptions::default()),
            Format::Qed => Self::Qed(QedOptions::default()),
            Format::Vpc => Self::Vpc(VpcOptions::default()),
        }
    }
}

impl From<RawOptions> for NewFormat {
    fn from(options: RawOptions) -> Self {
        Self::Raw(options)
    }
}

impl From<Qcow2Options> for NewFormat {
    fn from(options: Qcow2Options) -> Self {
        Self::Qcow2(options)
    }
}

impl From<VdiOptions> for NewFormat {
    fn from(options: VdiOptions) -> Self {
        Self::Vdi(options)
    }
}

impl From<ParallelsOptions> for NewFormat {
    fn from(options: ParallelsOptions) -> Self {
        Self::Parallels(options)
    }
}

impl From<QedOptions> for NewFormat {
    fn from(options: QedOptions) -> Self {
        Self::Qed(options)
    }
}

impl From<VpcOptions> for NewFormat {
    fn from(options: VpcOptions) -> Self {
        Self::Vpc(options)
    }
}
