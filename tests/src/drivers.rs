//! The one table of what the harnesses run on: a line for each format and variant of it.
//!
//! A new format gets the model, crash and conversion tests by its lines here; hostile images are a
//! table of their own ([`crate::hostile`]), for they know the format's bytes.

use oxblk_core::{Options, Secrets};
use oxblk_crypto::secret::Secret;

use crate::program::Program;

/// Identifier of the secret that encrypted images are made and opened with.
const SECRET: &str = "s0";
/// What it holds.
const PASSWORD: &str = "open sesame";

/// A way to make images.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// Names it in test output and on the command line of the soak.
    pub name: &'static str,
    /// The driver's name.
    pub format: &'static str,
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
    /// Persistent bitmaps record what is written.
    pub bitmaps: bool,
    /// Guest data lies in a file of its own.
    pub data_file: bool,
}

const fn raw(name: &'static str) -> Variant {
    Variant {
        name,
        format: "raw",
        options: "",
        cluster: 4096,
        backing: false,
        encrypted: false,
        compress: false,
        check: false,
        repairs_on_open: false,
        bitmaps: false,
        data_file: false,
    }
}

const fn qcow2(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant {
        name,
        format: "qcow2",
        options,
        cluster,
        backing: true,
        encrypted: false,
        compress: true,
        check: true,
        repairs_on_open: false,
        bitmaps: false,
        data_file: false,
    }
}

const fn encrypted(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    Variant { encrypted: true, compress: false, ..qcow2(name, options, cluster) }
}

impl Variant {
    /// Adds to the options that an image is opened with what this one needs.
    pub fn add_key(&self, options: &mut Options) {
        if self.encrypted {
            let mut encrypt = Options::new();
            encrypt.insert("key-secret", SECRET);
            options.insert("encrypt", encrypt.to_json());
        }
    }
}

/// The secrets that encrypted images need, for a graph.
///
/// # Panics
/// Never.
pub fn secrets() -> Secrets {
    let secrets = Secrets::default();
    secrets.add(SECRET, Secret::from_slice(PASSWORD.as_bytes())).expect("the first one");
    secrets
}

/// Gives a QEMU tool the secrets that encrypted images need.
pub fn with_secrets(program: Program) -> Program {
    program.arg("--object").arg(format!("secret,id={SECRET},data={PASSWORD}"))
}

const fn data_file(name: &'static str, options: &'static str, cluster: u64) -> Variant {
    // Neither is for images whose clusters are not counted.
    Variant { compress: false, data_file: true, ..qcow2(name, options, cluster) }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Every variant.
pub const VARIANTS: &[Variant] = &[
    raw("raw"),
    qcow2("qcow2-512", "cluster_size=512", 512),
    qcow2("qcow2-1k", "cluster_size=1k", KIB),
    qcow2("qcow2-2k", "cluster_size=2k", 2 * KIB),
    qcow2("qcow2-4k", "cluster_size=4k", 4 * KIB),
    qcow2("qcow2-8k", "cluster_size=8k", 8 * KIB),
    qcow2("qcow2-16k", "cluster_size=16k", 16 * KIB),
    qcow2("qcow2-32k", "cluster_size=32k", 32 * KIB),
    qcow2("qcow2-64k", "", 64 * KIB),
    qcow2("qcow2-128k", "cluster_size=128k", 128 * KIB),
    qcow2("qcow2-256k", "cluster_size=256k", 256 * KIB),
    qcow2("qcow2-512k", "cluster_size=512k", 512 * KIB),
    qcow2("qcow2-1m", "cluster_size=1M", MIB),
    qcow2("qcow2-2m", "cluster_size=2M", 2 * MIB),
    qcow2("qcow2-v2", "compat=0.10,cluster_size=4k", 4 * KIB),
    qcow2("qcow2-refcount1", "refcount_bits=1,cluster_size=4k", 4 * KIB),
    qcow2("qcow2-refcount64", "refcount_bits=64,cluster_size=4k", 4 * KIB),
    qcow2("qcow2-zstd", "compression_type=zstd,cluster_size=16k", 16 * KIB),
    qcow2("qcow2-ext-16k", "extended_l2=on,cluster_size=16k", 16 * KIB),
    qcow2("qcow2-ext-64k", "extended_l2=on", 64 * KIB),
    qcow2("qcow2-ext-2m", "extended_l2=on,cluster_size=2M", 2 * MIB),
    // Short keys make for a small LUKS header, and few iterations for images that open at once.
    encrypted(
        "qcow2-luks",
        "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1,encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,cluster_size=4k",
        4 * KIB,
    ),
    encrypted(
        "qcow2-aes-ext",
        "encrypt.format=aes,encrypt.key-secret=s0,extended_l2=on,cluster_size=16k",
        16 * KIB,
    ),
    data_file("qcow2-datafile", "cluster_size=4k", 4 * KIB),
    data_file("qcow2-datafile-ext", "extended_l2=on,cluster_size=16k", 16 * KIB),
    Variant {
        // Such images have no backing files.
        backing: false,
        ..data_file("qcow2-datafile-raw", "data_file_raw=on,cluster_size=4k", 4 * KIB)
    },
    Variant {
        repairs_on_open: true,
        ..qcow2("qcow2-lazy", "lazy_refcounts=on,cluster_size=4k", 4 * KIB)
    },
    Variant { bitmaps: true, ..qcow2("qcow2-bitmaps", "cluster_size=4k", 4 * KIB) },
];

impl Variant {
    /// Whether the data file is by itself what a guest reads.
    pub fn has_raw_data(&self) -> bool {
        self.options.contains("data_file_raw=on")
    }
}

/// The variants whose name begins with `name` and a dash, or is `name` (`qcow2` gives them all).
pub fn named(name: &str) -> Vec<&'static Variant> {
    let family = format!("{name}-");
    VARIANTS.iter().filter(|v| v.name == name || v.name.starts_with(&family)).collect()
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
}
