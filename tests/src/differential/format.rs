//! Runs the same commands on images of any format with QEMU's tools and with oxblk, and compares the results.
//!
//! The commands are those that every format supports: create, write, zero, discard, map, measure, resize, check, convert. Other
//! tests cover the options of a single format.

use super::Differential;
use super::normalise::Rules;
use crate::formats::{self, FORMATS, Variant};
use crate::program::Tool::{self, Img, Io};

/// The unit of the changes in bytes. Changes cover whole clusters, because the allocation of the unwritten part of a new
/// cluster may differ.
fn unit(variant: &Variant) -> u64 {
    variant.cluster.max(64 << 10)
}

/// The size of a test disk, in units.
const UNITS: u64 = 12;

/// Returns the commands that change the disk, in order.
fn changes(variant: &Variant) -> Vec<String> {
    let at = |units: u64| units * unit(variant);
    let mut changes = vec![
        format!("write -P 1 0 {}", at(1)),
        format!("write -P 2 {} {}", at(4), at(2)),
        format!("write -P 4 {} {}", at(9), at(2)),
    ];
    if variant.zeroes_by_qemu {
        changes.insert(2, format!("write -z {} {}", at(7), at(1)));
    }
    if variant.discards_by_qemu {
        // The discard is last, because the programs may choose different holes for the next write.
        changes.push(format!("discard {} {}", at(4), at(1)));
    }
    changes
}

fn as_commands(changes: &[String]) -> Vec<&str> {
    changes.iter().flat_map(|change| ["-c", change]).collect()
}

/// Runs command lines on images of one variant.
struct Commands<'a> {
    both: &'a Differential,
    variant: &'a Variant,
}

impl Commands<'_> {
    /// Returns the words that choose the image `name` on a command line, with the options that open it.
    fn image(&self, name: &str) -> Vec<String> {
        let driver = self.variant.driver();
        if !self.variant.encrypted {
            return ["-f", driver, name].map(str::to_owned).to_vec();
        }
        let mut words = formats::secret_words();
        let options = format!("driver={driver},file.filename={name},encrypt.key-secret=s0");
        words.extend(["--image-opts".to_owned(), options]);
        words
    }

    /// Runs the same command on the image `name` with every program.
    fn same(&self, tool: Tool, first: &[&str], name: &str, last: &[&str]) {
        let image = self.image(name);
        let words: Vec<&str> = first
            .iter()
            .copied()
            .chain(image.iter().map(String::as_str))
            .chain(last.iter().copied())
            .collect();
        self.both.same(tool, &words);
    }

    /// Returns the words of the `create` command.
    fn create_words(&self, name: &str) -> Vec<String> {
        let variant = self.variant;
        let mut words = vec!["create".to_owned(), "-f".to_owned(), variant.driver().to_owned()];
        words.extend(formats::secret_words().into_iter().filter(|_| variant.encrypted));
        let data = variant.data_file.then(|| format!("data_file={name}.data"));
        for options in [(!variant.options.is_empty()).then(|| variant.options.to_owned()), data] {
            words.extend(options.into_iter().flat_map(|options| ["-o".to_owned(), options]));
        }
        words.extend([name.to_owned(), (UNITS * unit(variant)).to_string()]);
        words
    }

    /// Creates an image with every program. The keys of an encrypted image are random, so an encrypted image is created once
    /// and copied.
    fn create(&self, name: &str) {
        let words = self.create_words(name);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if self.variant.encrypted {
            self.both.made_once(Img, &words);
        } else {
            self.both.same(Img, &words);
        }
    }

    fn inspect(&self, name: &str) {
        self.same(Img, &["info", "--output=json"], name, &[]);
        self.same(Img, &["map", "--output=json"], name, &[]);
        self.same(Img, &["measure", "--output=json", "-O", "raw"], name, &[]);
        if self.variant.measured_by_qemu {
            self.same(Img, &["measure", "-O", self.variant.driver()], name, &[]);
        }
        if self.variant.checked_by_qemu {
            self.same(Img, &["check", "--output=json"], name, &[]);
        }
    }
}

/// Creates, changes, inspects and resizes an image of the variant with every program.
///
/// # Panics
/// When output, exit codes or contents differ.
pub fn life_of_an_image(variant: &Variant) {
    // The unwritten part of a new cluster is a hole with oxblk, and zeroes with QEMU.
    let both = Differential::new().rules(Rules { disk_size: true, ..Rules::default() });
    let commands = Commands { both: &both, variant };
    commands.create("a");
    let changes = changes(variant);
    commands.same(Io, &as_commands(&changes), "a", &[]);
    commands.same(Io, &["-r", "-c", "read -v 65500 40"], "a", &[]);
    commands.inspect("a");
    let size = |units: u64| (units * unit(variant)).to_string();
    commands.same(Img, &["resize"], "a", &[&size(UNITS + 1)]);
    if variant.shrunk_by_qemu {
        commands.same(Img, &["resize", "--shrink"], "a", &[&size(10)]);
    }
    // The programs may choose different lengths of the file in a resize.
    commands.same(Img, &["map", "--output=json"], "a", &[]);
    both.same_content_of(&commands.image("a"), "a");
}

/// Converts an image of the variant to the first variant of every format and back.
///
/// # Panics
/// When output, exit codes or contents differ.
pub fn conversions(variant: &Variant) {
    // Targets that need a key or a data file have their own tests.
    if variant.encrypted || variant.data_file {
        return;
    }
    let both = Differential::new();
    let commands = Commands { both: &both, variant };
    commands.create("a");
    let changes = changes(variant);
    commands.same(Io, &as_commands(&changes), "a", &[]);
    for format in FORMATS {
        let (there, back) = (format!("to-{}", format.name()), format!("from-{}", format.name()));
        let to = ["convert", "-f", variant.driver(), "-O", format.name(), "a", &there];
        both.same(Img, &to);
        let mut from = vec!["convert", "-f", format.name(), "-O", variant.driver()];
        if !variant.options.is_empty() {
            from.extend(["-o", variant.options]);
        }
        from.extend([&*there, &*back]);
        both.same(Img, &from);
        for (name, driver) in [(&there, format.name()), (&back, variant.driver())] {
            let image = ["-f", driver, name].map(str::to_owned);
            both.same_content_of(&image, name);
            both.same(Img, &["compare", "-f", variant.driver(), "-F", driver, "a", name]);
        }
    }
}
