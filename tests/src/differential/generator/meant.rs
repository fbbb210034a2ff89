//! What may differ, each with the line of docs/differences.md that says why.

use std::sync::LazyLock;

use regex_lite::Regex;

use super::Case;
use crate::program::Tool;

static PATTERNS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    let regex = |pattern| Regex::new(pattern).expect("a constant pattern");
    vec![
        // Names that nodes get by themselves have random digits in QEMU.
        (regex(r"#block[0-9]+"), "#blockN"),
        // What help says is oxblk's own.
        (regex(r"(?s)Usage: qemu-io \[OPTIONS\].*$"), "USAGE"),
        // Malformed json: names have texts of their own.
        (
            regex(r"(?m)Could not parse the JSON options: .*$"),
            "Could not parse the JSON options: FAULT",
        ),
    ]
});

/// Text with meant differences taken out, on both sides alike.
pub(super) fn normalise(text: &str) -> String {
    let mut text = text.to_owned();
    for (pattern, with) in PATTERNS.iter() {
        text = pattern.replace_all(&text, *with).into_owned();
    }
    // QEMU opens a raw image anew before it says that it has no snapshots, and warns again.
    let warning = text.find("WARNING: Image format").and_then(|start| {
        let end = start + text[start..].find("remove the restrictions.\n")?;
        Some(text[start..end + "remove the restrictions.\n".len()].to_owned())
    });
    match warning {
        Some(warning) => text.replace(&warning.repeat(2), &warning),
        None => text,
    }
}

/// Whether the lines of the output come in no order: requests in flight end when they end.
pub(super) fn is_unordered(case: &Case) -> bool {
    case.tool == Tool::Io && case.arguments.iter().any(|word| word.starts_with("aio_"))
}

/// Whether the bytes of files may differ as long as the guest's view is the same.
pub(super) fn bytes_may_differ(case: &Case) -> bool {
    let has = |part: &str| case.arguments.iter().any(|word| word.contains(part));
    let begins = |parts: &[&str]| {
        case.arguments.iter().any(|word| parts.iter().any(|part| word.starts_with(part)))
    };
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // The time of a snapshot is in them. One that is applied gets a new L1 table.
        (Tool::Img, "snapshot") => begins(&["-c", "-a"]),
        // Requests in flight at once are in no order.
        (Tool::Img, "bench") => begins(&["-w", "--w"]),
        // Bitmaps stay where they are in a repair.
        (Tool::Img, "check") => has("m.qcow2") && begins(&["-r", "--r"]),
        // Tables of refcounts of another width may lie elsewhere in an image with bitmaps.
        // A snapshot with zero clusters gets new tables for version 2.
        (Tool::Img, "amend") => {
            has("refcount_bits") && has("m.qcow2")
                || has("a.qcow2") && (has("compat=0.10") || has("compat=v2"))
        }
        // Compressors differ; out-of-order writes are in no order.
        (Tool::Img, "convert") => begins(&["-c", "-W", "--oob"]),
        // What reads as zeroes is kept as zero clusters, and nothing is changed before a failure.
        (Tool::Img, "rebase") => !begins(&["-u", "--backing-u"]),
        // Copy-on-read keeps nothing where no image has data; a disk that became smaller may have grown again.
        (Tool::Io, _) => begins(&["-C", "--cop"]) || has("open -") || count(case, "truncate") > 1,
        _ => false,
    }
}

/// Whether a disk became smaller, so that it has a new L1 table.
pub(super) fn is_shrunk(before: Option<&Vec<u8>>, after: &[u8]) -> bool {
    let size = |bytes: &[u8]| {
        let field = bytes.get(24..32).filter(|_| bytes.starts_with(b"QFI\xfb"));
        field.and_then(|field| field.try_into().ok()).map(u64::from_be_bytes)
    };
    let before = before.and_then(|bytes| size(bytes));
    before.is_some_and(|before| size(after).is_some_and(|after| after < before))
}

fn count(case: &Case, part: &str) -> usize {
    case.arguments.iter().filter(|word| word.contains(part)).count()
}

/// Whether a discard takes in a part of a sector of a raw image.
fn discards_part_of_a_sector(case: &Case) -> bool {
    let is_whole = |word: &str| {
        let whole = ["0", "512", "4k", "64k", "65536", "1M", "4096", "3M", "1.5M", "0x10000"];
        word.starts_with('-') || whole.contains(&word)
    };
    let discards = |word: &String| {
        word.strip_prefix("discard").is_some_and(|rest| !rest.split_whitespace().all(is_whole))
    };
    case.arguments.iter().any(discards) && case.arguments.iter().any(|word| word.contains(".raw"))
}

/// Whether the image that is rebased has a name.
fn rebases(case: &Case, name: &str) -> bool {
    let mut words = case.arguments.iter().map(String::as_str);
    let mut before = "";
    words.any(|word| {
        let is_value = ["-b", "--backing", "-F", "-f", "-t", "-T"].contains(&before);
        before = word;
        word.ends_with(name) && !is_value && !word.starts_with("-b") && !word.starts_with("--b")
    })
}

/// Whether a format is given for a backing file that is not.
fn lacks_backing(case: &Case) -> bool {
    let mut words = case.arguments.iter().map(String::as_str);
    let names = |word: &str| {
        word.starts_with("-b") || word == "--backing" || word.starts_with("--backing=")
    };
    !words.clone().any(names)
        && words.any(|word| word.starts_with("-F") || word.starts_with("--backing-f"))
}

/// Whether the tools are meant to do different things.
pub(super) fn is_meant(case: &Case) -> bool {
    let has = |part: &str| case.arguments.iter().any(|word| word.contains(part));
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // Version 2 has no words for bitmaps; QEMU leaks them.
        (Tool::Img, "amend") => has("m.qcow2") && (has("compat=0.10") || has("compat=v2")),
        // A snapshot is applied to a disk with bitmaps, too.
        (Tool::Img, "snapshot") => has("m.qcow2"),
        // Options are checked before the file is made, which QEMU could not make.
        (Tool::Img, "create") => case.arguments.iter().any(String::is_empty) && lacks_backing(case),
        // A refusal of QEMU's alone.
        (Tool::Img, "measure") => has("compat=v"),
        // QEMU loses zeroes of an image of version 2.
        (Tool::Img, "rebase") => rebases(case, "old.qcow2"),
        (Tool::Io, _) => {
            // Less than a block is not discarded.
            discards_part_of_a_sector(case)
                // Copy-on-read keeps nothing where no image has data, which a map shows.
                || has("map")
                    && case.arguments.iter().any(|word| word == "-C" || word.starts_with("--cop"))
                // QEMU reads the second `-m` as a size.
                || count(case, "truncate -m") > 1
                // QEMU has removed the temporary file.
                || has("reopen") && has("-s")
        }
        _ => false,
    }
}

/// Whether a command failed before it touched its target: options are checked before a file is made, where QEMU
/// removes the file that it could not make an image of.
pub(super) fn target_may_survive(case: &Case, code: i32) -> bool {
    let makes = ["create", "convert", "dd"];
    code != 0 && case.arguments.first().is_some_and(|name| makes.contains(&name.as_str()))
}
