//! The one table of what the harnesses run on: a line for each format and variant of it.
//!
//! A new format gets the model, crash and conversion tests by its lines here; hostile images are a
//! table of their own ([`crate::hostile`]), for they know the format's bytes.

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
    /// Clusters can be written compressed.
    pub compress: bool,
    /// Images can be checked, by us and by `qemu-img check`.
    pub check: bool,
    /// After a power cut the image must be opened for writing before it checks clean.
    pub repairs_on_open: bool,
}

const fn raw(name: &'static str) -> Variant {
    Variant {
        name,
        format: "raw",
        options: "",
        cluster: 4096,
        backing: false,
        compress: false,
        check: false,
        repairs_on_open: false,
    }
}

/// Every variant.
pub const VARIANTS: &[Variant] = &[raw("raw")];

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
        assert!(named("qcow").is_empty());
    }
}
