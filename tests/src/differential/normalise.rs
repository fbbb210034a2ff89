//! Replaces those parts of a tool's output that differ between two correct runs.
//!
//! The scratch directory's path, times and rates are always replaced. [`Rules`] can add the space that a file uses on the host,
//! and the steps of the progress. Spacing, order and wording are not changed, so they are compared.

use std::path::Path;
use std::sync::LazyLock;

use regex_lite::{Captures, Regex};

/// Chooses further parts of the output to replace.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// `disk size:` and `actual-size`: the two programs may lay out an image differently.
    pub disk_size: bool,
    /// The steps of `-p`: only the existence of progress and its last value are compared.
    pub progress: bool,
}

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern")
}

static TIMINGS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    vec![
        // qemu-io: 4 KiB, 1 ops; 00.01 sec (2.5 MiB/sec and 641.0256 ops/sec)
        (
            // and, if the request takes a second or more: 4 KiB, 1 ops; 0:00:01.50 (2.5 KiB/sec and 0.6410 ops/sec)
            regex(r"ops; [0-9:.]+(?: sec)? \([^()]+/sec and [^()]+ ops/sec\)"),
            "ops; TIME sec (RATE/sec and RATE ops/sec)",
        ),
        // qemu-io -C: 4096,1,00:00:00.00,12.5,3.2
        (regex(r"(?m)^([0-9]+,[0-9]+),[0-9:.]+,[0-9.einf-]+,[0-9.einf-]+$"), "$1,TIME,RATE,RATE"),
        // qemu-img bench
        (regex(r"Run completed in [0-9.]+ seconds"), "Run completed in TIME seconds"),
    ]
});
static DISK_SIZE: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    vec![
        (regex(r"disk size: [^\n]*"), "disk size: SIZE"),
        (regex(r#""actual-size": [0-9]+"#), "\"actual-size\": SIZE"),
    ]
});
static PROGRESS: LazyLock<Regex> = LazyLock::new(|| regex(r"(?: +\(([0-9.]+)/100%\)\r?)+"));

/// Returns the output of a tool that ran in `directory`, without the parts that cannot be compared.
pub fn normalise(output: &[u8], directory: &Path, rules: Rules) -> String {
    let mut text =
        String::from_utf8_lossy(output).replace(&*directory.to_string_lossy(), "DIRECTORY");
    let mut apply = |table: &[(Regex, &'static str)]| {
        for (pattern, with) in table {
            text = pattern.replace_all(&text, *with).into_owned();
        }
    };
    apply(&TIMINGS);
    if rules.disk_size {
        apply(&DISK_SIZE);
    }
    if rules.progress {
        text = PROGRESS
            .replace_all(&text, |last: &Captures<'_>| format!("PROGRESS to {}", &last[1]))
            .into_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> String {
        normalise(text.as_bytes(), Path::new("/tmp/x/qemu"), Rules::default())
    }

    #[test]
    fn timings_and_rates_are_blanked_and_the_rest_is_kept() {
        assert_eq!(
            plain(
                "wrote 4096/4096 bytes at offset 0\n4 KiB, 1 ops; 00.01 sec (2.504 MiB/sec and 641.0256 ops/sec)\n"
            ),
            "wrote 4096/4096 bytes at offset 0\n4 KiB, 1 ops; TIME sec (RATE/sec and RATE ops/sec)\n"
        );
        assert_eq!(
            plain("4 KiB, 1 ops; 0:00:01.50 (2.504 KiB/sec and 0.6410 ops/sec)\n"),
            "4 KiB, 1 ops; TIME sec (RATE/sec and RATE ops/sec)\n"
        );
        assert_eq!(plain("4096,1,00:00:00.00,12.5,3.2\n"), "4096,1,TIME,RATE,RATE\n");
        assert_eq!(plain("Run completed in 0.004 seconds.\n"), "Run completed in TIME seconds.\n");
    }

    #[test]
    fn the_scratch_directory_is_blanked() {
        assert_eq!(plain("image: /tmp/x/qemu/a.img"), "image: DIRECTORY/a.img");
    }

    #[test]
    fn the_disk_size_is_blanked_only_when_asked() {
        let text = "disk size: 196 KiB\n\"actual-size\": 200704,\n";
        assert_eq!(plain(text), text);
        let rules = Rules { disk_size: true, ..Rules::default() };
        let blanked = normalise(text.as_bytes(), Path::new("/none"), rules);
        assert_eq!(blanked, "disk size: SIZE\n\"actual-size\": SIZE,\n");
    }

    #[test]
    fn only_the_last_value_of_progress_is_kept() {
        let rules = Rules { progress: true, ..Rules::default() };
        let text = b"    (0.00/100%)\r    (50.00/100%)\r    (100.00/100%)\r\n";
        assert_eq!(normalise(text, Path::new("/none"), rules), "PROGRESS to 100.00\n");
    }
}
