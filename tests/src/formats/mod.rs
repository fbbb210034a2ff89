//! The formats that the harnesses run on.
//!
//! A [`TestFormat`] tells the harnesses all that they need to know of a format: in which variants its images are made,
//! what the variants can do, how an image is spoiled, and what QEMU's tools say of it. A format that is added to
//! [`FORMATS`] gets every test that is not about one format alone:
//!
//! - random operations against a model, from one thread and from four, with cancelled requests ([`crate::model`]);
//! - power cuts and failing disks ([`crate::crash`]);
//! - damaged images, at random ([`crate::hostile::mutate`]) and by the format's own table ([`TestFormat::hostile`]);
//! - the same commands through both programs ([`crate::differential::format`]), and conversions between all formats;
//! - its share of the soak.
//!
//! No harness asks for a format by its name.

mod parallels;
mod qcow2;
mod raw;
mod variant;
mod vdi;

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

/// The one table of formats.
pub static FORMATS: &[&dyn TestFormat] =
    &[&raw::Raw, &qcow2::Qcow2, &vdi::Vdi, &parallels::Parallels];

/// A format as the harnesses see it.
pub trait TestFormat: Debug + Sync + RefUnwindSafe {
    /// The name of the driver, as after `-f`.
    fn name(&self) -> &'static str;

    /// The ways of making images that the harnesses go through. The first one has no options.
    fn variants(&self) -> &'static [Variant];

    /// Adds to the options of opening an image of this variant what its contents cannot tell.
    fn add_open_options(&self, variant: &Variant, options: &mut Options) {
        let _ = (variant, options);
    }

    /// Adds options that leave the driver's caches of metadata room for a few pieces only, so that they come and go under
    /// the requests.
    fn limit_caches(&self, variant: &Variant, options: &mut Options) {
        let _ = (variant, options);
    }

    /// Whether a file with these first bytes, 512 or fewer, is an image of the format. Raw images are recognised by
    /// being nothing else.
    fn is_image(&self, start: &[u8]) -> bool;

    /// Damages some words of an image at random. An image whose structures are not strewn with big-endian words of
    /// four or eight bytes needs a way of its own.
    fn damage(&self, variant: &Variant, random: &mut Random, bytes: &mut [u8]) {
        mutate::words(random, bytes, variant.cluster);
    }

    /// Writes another disk size, in bytes, into the header. Tells whether the format has such a field.
    fn set_size(&self, bytes: &mut [u8], size: u64) -> bool {
        let _ = (bytes, size);
        false
    }

    /// Images spoiled on purpose, and what must come of each.
    fn hostile(&self) -> Vec<Table> {
        Vec::new()
    }
}

/// Identifier of the secret that encrypted images are made and opened with.
pub(crate) const SECRET: &str = "s0";
/// Its value.
const PASSWORD: &str = "open sesame";

/// The secrets that encrypted images need, for a graph.
///
/// # Panics
/// Never.
pub fn secrets() -> Secrets {
    let secrets = Secrets::default();
    secrets.add(SECRET, Secret::from_slice(PASSWORD.as_bytes())).expect("the first one");
    secrets
}

/// The words of a command line that give a tool the secrets that encrypted images need.
pub fn secret_words() -> Vec<String> {
    vec!["--object".to_owned(), format!("secret,id={SECRET},data={PASSWORD}")]
}

/// Gives a QEMU tool the secrets that encrypted images need.
pub fn with_secrets(program: Program) -> Program {
    program.args(secret_words())
}

/// Every variant of every format.
pub fn variants() -> &'static [&'static Variant] {
    static ALL: LazyLock<Vec<&'static Variant>> =
        LazyLock::new(|| FORMATS.iter().flat_map(|format| format.variants()).collect());
    &ALL
}

/// The variants whose name begins with `name` and a dash, or is `name` (`qcow2` gives them all).
pub fn named(name: &str) -> Vec<&'static Variant> {
    let family = format!("{name}-");
    let chosen = |v: &&Variant| v.name == name || v.name.starts_with(&family);
    variants().iter().copied().filter(chosen).collect()
}

/// The format of an image with these first bytes; the last resort is the format that recognises anything.
pub fn probe(start: &[u8]) -> Option<&'static dyn TestFormat> {
    FORMATS.iter().rev().copied().find(|format| format.is_image(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_name_gives_all_its_variants_and_a_full_name_one() {
        assert_eq!(named("raw").len(), 1);
        assert!(named("qcow2").len() >= 13);
        assert_eq!(named("qcow2-1m").len(), 1);
        assert!(named("qcow").is_empty());
    }

    #[test]
    fn each_variant_belongs_to_its_format_and_has_a_name_of_its_own() {
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
