//! The formats that the harnesses run on.
//!
//! A [`TestFormat`] describes a format to the harnesses: the variants of its images, the abilities of each variant, and ways to
//! corrupt an image. A format that is added to [`FORMATS`] takes part in these tests:
//!
//! - random operations against a model, from one thread and from four, with cancelled requests ([`crate::model`]);
//! - power cuts and failing disks ([`crate::crash`]);
//! - damaged images, at random ([`crate::hostile::mutate`]) and by the format's own table ([`TestFormat::hostile`]);
//! - the same commands with both programs ([`crate::differential::format`]), and conversions between all formats;
//! - the soak.
//!
//! No harness depends on the name of a format. Some tests have their own list of formats (CONTRIBUTING.md, "Add an image
//! format").

mod parallels;
mod qcow2;
mod qed;
mod raw;
mod variant;
mod vdi;
mod vpc;

use std::fmt::Debug;
use std::panic::RefUnwindSafe;
use std::sync::LazyLock;

use oxblk_core::{Options, Secrets};
use oxblk_crypto::secret::Secret;

use crate::hostile::Table;
use crate::hostile::mutate;
use crate::program::Program;
use crate::random::Random;

pub use variant::Variant;

/// The table of formats.
pub static FORMATS: &[&dyn TestFormat] =
    &[&raw::Raw, &qcow2::Qcow2, &vdi::Vdi, &parallels::Parallels, &qed::Qed, &vpc::Vpc];

/// A format, as the harnesses use it.
pub trait TestFormat: Debug + Sync + RefUnwindSafe {
    /// The name of the driver, as used after `-f`.
    fn name(&self) -> &'static str;

    /// The variants of images that the harnesses create. The first variant has no creation options.
    fn variants(&self) -> &'static [Variant];

    /// Adds options that are needed to open an image of this variant but are not stored in the image.
    fn add_open_options(&self, variant: &Variant, options: &mut Options) {
        let _ = (variant, options);
    }

    /// Adds options that limit the driver's metadata caches to a few slices, so that requests evict and reload slices often.
    fn limit_caches(&self, variant: &Variant, options: &mut Options) {
        let _ = (variant, options);
    }

    /// Whether a file that begins with these bytes (at most 512) is an image of the format. Raw images match if no other format
    /// does.
    fn is_image(&self, start: &[u8]) -> bool;

    /// Damages some words of an image at random. A format overrides this if its structures do not consist of big-endian words
    /// of four or eight bytes.
    fn damage(&self, variant: &Variant, random: &mut Random, bytes: &mut [u8]) {
        mutate::words(random, bytes, variant.cluster);
    }

    /// Writes another disk size, in bytes, into the header. Returns whether the header has such a field.
    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        let _ = (bytes, size);
        false
    }

    /// Corrupt images, each with its expected result. The list is empty for a format whose images cannot be corrupt.
    fn hostile(&self) -> Vec<Table>;
}

/// Identifier of the secret that encrypts and decrypts images.
pub(crate) const SECRET: &str = "s0";
/// The value of the secret.
const PASSWORD: &str = "open sesame";

/// Returns the secrets that encrypted images need, for a graph.
///
/// # Panics
/// Never.
pub fn secrets() -> Secrets {
    let secrets = Secrets::default();
    secrets.add(SECRET, Secret::from_slice(PASSWORD.as_bytes())).expect("the first one");
    secrets
}

/// Returns the command-line words that pass the secrets of encrypted images to a tool.
pub fn secret_words() -> Vec<String> {
    vec!["--object".to_owned(), format!("secret,id={SECRET},data={PASSWORD}")]
}

/// Adds the secrets of encrypted images to the command line of a QEMU tool.
pub fn with_secrets(program: Program) -> Program {
    program.args(secret_words())
}

/// Every variant of every format.
pub fn variants() -> &'static [&'static Variant] {
    static ALL: LazyLock<Vec<&'static Variant>> =
        LazyLock::new(|| FORMATS.iter().flat_map(|format| format.variants()).collect());
    &ALL
}

/// Returns the variant with this name, and the variants whose name begins with `name` and a dash (`qcow2` returns all of its
/// variants).
pub fn named(name: &str) -> Vec<&'static Variant> {
    let family = format!("{name}-");
    let chosen = |v: &&Variant| v.name == name || v.name.starts_with(&family);
    variants().iter().copied().filter(chosen).collect()
}

/// Returns the format of an image that begins with these bytes. Raw, which matches anything, is tried last.
pub fn probe(start: &[u8]) -> Option<&'static dyn TestFormat> {
    FORMATS.iter().rev().copied().find(|format| format.is_image(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_name_selects_all_its_variants_and_a_variant_name_one() {
        assert_eq!(named("raw").len(), 1);
        assert!(named("qcow2").len() >= 13);
        assert_eq!(named("qcow2-1m").len(), 1);
        assert!(named("qcow").is_empty());
    }

    #[test]
    fn each_variant_belongs_to_its_format_and_has_a_unique_name() {
        let mut names = std::collections::BTreeSet::new();
        for format in FORMATS {
            assert!(!format.variants().is_empty(), "{}", format.name());
            for variant in format.variants() {
                assert_eq!(variant.format.name(), format.name(), "{}", variant.name);
                assert!(names.insert(variant.name), "{} twice", variant.name);
            }
        }
    }

    #[test]
    fn an_image_is_recognised_by_its_first_bytes() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03").map(TestFormat::name), Some("qcow2"));
        assert_eq!(probe(b"").map(TestFormat::name), Some("raw"));
    }
}
