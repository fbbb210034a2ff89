//! Intended differences. docs/differences.md explains each of them.

use std::sync::LazyLock;

use regex_lite::Regex;

use super::Case;
use crate::program::{Reply, Tool};

static PATTERNS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    let regex = |pattern| Regex::new(pattern).expect("a constant pattern");
    vec![
        // QEMU puts random digits into generated node names.
        (regex(r"#block[0-9]+"), "#blockN"),
        // oxblk prints a hint if O_DIRECT is refused.
        (regex(r"(does not support O_DIRECT\n)Try cache.direct=off\n"), "$1"),
        // The text of `help` is oxblk's own.
        (regex(r"(?s)Usage: qemu-io \[OPTIONS\].*$"), "USAGE"),
        // The JSON parsers describe syntax errors in different words.
        (
            regex(r"(?m)Could not parse the JSON options: .*$"),
            "Could not parse the JSON options: FAULT",
        ),
    ]
});

/// Removes intended differences from the output of one program. Called for the outputs of both programs.
pub(super) fn normalise(text: &str) -> String {
    let mut text = text.to_owned();
    for (pattern, with) in PATTERNS.iter() {
        text = pattern.replace_all(&text, *with).into_owned();
    }
    // QEMU opens a raw image a second time before it reports that the image has no snapshots, and repeats its warning.
    let warning = text.find("WARNING: Image format").and_then(|start| {
        let end = start + text[start..].find("remove the restrictions.\n")?;
        Some(text[start..end + "remove the restrictions.\n".len()].to_owned())
    });
    match warning {
        Some(warning) => text.replace(&warning.repeat(2), &warning),
        None => text,
    }
}

/// Whether both tools fail to make an image, QEMU because it cannot create the file. oxblk checks the options before it creates
/// the file, so the last line of its error output may name an option instead of the file.
pub(super) fn creation_fails(case: &Case, theirs: &Reply, ours: &Reply) -> bool {
    makes_an_image(case)
        && (theirs.code(), ours.code()) == (1, 1)
        && theirs.err().lines().last().is_some_and(|line| line.contains("Could not create '"))
}

/// Returns a text without its last line.
pub(super) fn without_last_line(text: &str) -> &str {
    let end = text.trim_end_matches('\n');
    end.rfind('\n').and_then(|at| text.get(..=at)).unwrap_or_default()
}

fn makes_an_image(case: &Case) -> bool {
    let makes = ["create", "convert", "dd"];
    case.tool == Tool::Img
        && case.arguments.first().is_some_and(|name| makes.contains(&name.as_str()))
}

/// Whether the order of the output lines is undefined: concurrent requests end in any order.
pub(super) fn is_unordered(case: &Case) -> bool {
    case.tool == Tool::Io && case.arguments.iter().any(|word| word.starts_with("aio_"))
}

/// Whether a failed command of oxblk leaves all files as they were before. QEMU may have made a part of the changes. Opening an
/// image with bitmaps for writing changes the image.
pub(super) fn changes_all_or_nothing(case: &Case) -> bool {
    case.tool == Tool::Img
        && case.arguments.first().is_some_and(|name| name == "amend")
        && !case.arguments.iter().any(|word| word.contains("m.qcow2"))
}

/// Whether the contents of files may differ: `bench` ends after a failed request, and both programs have sent different requests
/// by then; concurrent changes of overlapping ranges have no defined order.
pub(super) fn contents_may_differ(case: &Case, code: i32) -> bool {
    let begins = |part: &str| case.arguments.iter().any(|word| word.starts_with(part));
    match case.tool {
        Tool::Img => code != 0 && case.arguments.first().is_some_and(|name| name == "bench"),
        Tool::Io => begins("aio_write") && count(case, "write") + count(case, "discard") > 1,
    }
}

/// Whether the bytes of files may differ although a guest reads the same contents.
pub(super) fn bytes_may_differ(case: &Case) -> bool {
    let has = |part: &str| case.arguments.iter().any(|word| word.contains(part));
    let begins = |parts: &[&str]| {
        case.arguments.iter().any(|word| parts.iter().any(|part| word.starts_with(part)))
    };
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // The file contains the time of the snapshot. A disk to which a snapshot is applied gets a new L1 table.
        (Tool::Img, "snapshot") => begins(&["-c", "-a"]),
        // Concurrent requests have no defined order.
        (Tool::Img, "bench") => begins(&["-w", "--w"]),
        // A repair by oxblk does not move bitmaps.
        (Tool::Img, "check") => has("m.qcow2") && begins(&["-r", "--r"]),
        // In an image with bitmaps, refcount blocks of another width may have other offsets. A snapshot with zero clusters gets
        // new tables when the image becomes version 2.
        (Tool::Img, "amend") => {
            has("refcount_bits") && has("m.qcow2")
                || has("a.qcow2") && (has("compat=0.10") || has("compat=v2"))
        }
        // The compressors differ, and out-of-order writes have no defined order. In an existing target, oxblk reuses freed
        // clusters later.
        (Tool::Img, "convert") => begins(&["-c", "-W", "--oob", "-n", "--no-c"]),
        // oxblk stores zeroes as zero clusters, and changes nothing before a failure.
        (Tool::Img, "rebase") => !begins(&["-u", "--backing-u"]),
        // Copy-on-read stores nothing where no image of the chain has data. A disk that was shrunk may have grown again.
        // Discarded clusters are reused later.
        (Tool::Io, _) => {
            begins(&["-C", "--cop"])
                || writes_compressed(case)
                || has("open -")
                || has("discard")
                || has("old.qcow2") && has("-z")
                || count(case, "truncate") > 1
        }
        _ => false,
    }
}

/// Whether the disk was shrunk and therefore has a new L1 table.
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

/// Whether a discard covers only a part of some sector of a raw image.
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

/// Whether the command rebases the image with this name.
fn rebases(case: &Case, name: &str) -> bool {
    let mut words = case.arguments.iter().map(String::as_str);
    let mut before = "";
    words.any(|word| {
        let is_value = ["-b", "--backing", "-F", "-f", "-t", "-T"].contains(&before);
        before = word;
        word.ends_with(name) && !is_value && !word.starts_with("-b") && !word.starts_with("--b")
    })
}

/// Whether the command gives a backing format but no backing file.
fn lacks_backing(case: &Case) -> bool {
    let mut words = case.arguments.iter().map(String::as_str);
    let names = |word: &str| {
        word.starts_with("-b") || word == "--backing" || word.starts_with("--backing=")
    };
    !words.clone().any(names)
        && words.any(|word| word.starts_with("-F") || word.starts_with("--backing-f"))
}

/// Whether the two tools are intended to give different results for this command line.
pub(super) fn is_meant(case: &Case) -> bool {
    let has = |part: &str| case.arguments.iter().any(|word| word.contains(part));
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // Version 2 cannot store bitmaps; QEMU leaks their clusters.
        // QEMU ignores an amend to the value of the runtime option.
        (Tool::Img, "amend") => {
            has("m.qcow2") && (has("compat=0.10") || has("compat=v2"))
                || has("lazy_refcounts") && has("lazy-refcounts=")
        }
        // oxblk also applies a snapshot to a disk with bitmaps.
        (Tool::Img, "snapshot") => has("m.qcow2"),
        // oxblk checks the options before it creates the file; QEMU fails because it cannot create the file.
        (Tool::Img, "create") => case.arguments.iter().any(String::is_empty) && lacks_backing(case),
        // Only QEMU refuses this option.
        (Tool::Img, "measure") => has("compat=v"),
        // QEMU loses zeroes of a version 2 image here.
        (Tool::Img, "rebase") => rebases(case, "old.qcow2"),
        (Tool::Io, _) => {
            // oxblk does not discard a part of a block.
            discards_part_of_a_sector(case)
                // Copy-on-read stores nothing where no image of the chain has data, and a map shows this.
                || has("map")
                    && case.arguments.iter().any(|word| word == "-C" || word.starts_with("--cop"))
                // The message about bitmaps that do not fit an empty disk has other words.
                || has("truncate 0") && has("m.qcow2")
                // QEMU fails, because it has already removed the temporary file.
                || has("reopen") && has("-s")
        }
        _ => false,
    }
}

/// Whether the two tools are intended to give different results because QEMU's tool refused something.
pub(super) fn is_meant_refusal(case: &Case, theirs: &Reply) -> bool {
    let (out, err) = (theirs.out(), theirs.err());
    match (case.tool, case.arguments.first().map_or("", String::as_str)) {
        // oxblk first checks whether the image can have backing files. A name below `json:` is relative to the image's file.
        (Tool::Img, "rebase") => {
            err.contains("could not get block driver info")
                || err.contains("Cannot use relative backing file names for 'json:")
        }
        // oxblk replaces allocated clusters by compressed clusters.
        (Tool::Img, "convert") => {
            err.contains("error while writing at byte") && err.contains("Input/output error")
        }
        (Tool::Io, _) => {
            writes_compressed(case) && out.contains("write failed: Input/output error")
        }
        _ => false,
    }
}

/// Whether a command of `io` writes compressed clusters.
fn writes_compressed(case: &Case) -> bool {
    let writes = |word: &String| word.starts_with("write ") && word.contains(" -c");
    case.tool == Tool::Io && case.arguments.iter().any(writes)
}

/// Whether a failed command has removed the target that it had created. oxblk removes a target that it cannot open.
pub(super) fn target_is_removed(case: &Case, ours: &Reply) -> bool {
    let refusals = ["Could not open ", "Invalid cache option"];
    makes_an_image(case)
        && ours.code() != 0
        && refusals.iter().any(|refusal| ours.err().contains(refusal))
}

/// Whether a failed command may leave its old target in place. oxblk checks the options before it creates the file. QEMU
/// removes the file in which it could not create an image.
pub(super) fn target_may_survive(case: &Case, code: i32) -> bool {
    code != 0 && makes_an_image(case)
}
