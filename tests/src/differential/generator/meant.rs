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
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // The time of a snapshot is in them.
        (Tool::Img, "snapshot")
        // Bitmaps stay where they are in a repair, and requests of threads are in no order.
        | (Tool::Img, "check" | "bench") => true,
        // The refcount table stays where it is.
        (Tool::Img, "create") => has("falloc") || has("full"),
        // Tables of refcounts of another width may lie elsewhere in an image with bitmaps.
        (Tool::Img, "amend") if has("refcount_bits") => has("m.qcow2"),
        // Only the name changes.
        (Tool::Img, "rebase") if has("-u") || has("unsafe") => false,
        (Tool::Img, command) => places_differ(command),
        // `truncate` can preallocate as well; freed clusters are not used again at once.
        (Tool::Io, _) => {
            ["discard", "truncate", "-z", "-C"].iter().any(|part| has(part))
                || case.arguments.iter().any(|word| word.starts_with("--cop"))
        }
        _ => false,
    }
}

/// Commands that put clusters in another order than QEMU: their requests are those of several threads, or they
/// cut a file off in another way.
fn places_differ(command: &str) -> bool {
    matches!(command, "convert" | "dd" | "rebase" | "resize")
}

/// Whether the tools are meant to do different things.
pub(super) fn is_meant(case: &Case) -> bool {
    let has = |part: &str| case.arguments.iter().any(|word| word.contains(part));
    let count = |part: &str| case.arguments.iter().filter(|word| word.contains(part)).count();
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // Version 2 has no words for bitmaps; QEMU leaks them.
        (Tool::Img, "amend") => has("m.qcow2") && (has("compat=0.10") || has("compat=v2")),
        // A snapshot is applied to a disk with bitmaps, too.
        (Tool::Img, "snapshot") => has("m.qcow2"),
        // A refusal of QEMU's alone.
        (Tool::Img, "measure") => has("compat=v"),
        (Tool::Io, _) => {
            // QEMU reads the second `-m` as a size.
            count("truncate -m") > 1
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
