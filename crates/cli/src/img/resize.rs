//! `img resize`: changes the virtual size of an image.

use oxblk_core::{Backend, Error, Preallocation, parse_size, size_fault};

use super::{Context, Step, graph};
use crate::flags::page::{Example, Note, Page};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, long};
use crate::flags::{self, Flag, shared};
use crate::image::{ImageName, writing};
use crate::program::note;
use crate::text::number::MAX_OFFSET;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::object(),
    shared::format(|a| &mut a.format),
    shared::image_opts(|a| &mut a.image_options),
    Flag::value(
        long("preallocation"),
        Value::PREALLOCATION.default("off"),
        "how to allocate the added space",
        |a, text| {
            let unknown = || Refusal::failed(format!("Invalid preallocation mode '{text}'"));
            a.preallocation = Preallocation::parse(&text).ok_or_else(unknown)?;
            Ok(())
        },
    ),
    Flag::switch(long("shrink"), "allow the image to become smaller", |a| &mut a.shrink),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img resize",
    about: "change the size of the disk in an image",
    usage: "[OPTIONS] FILENAME [+|-]SIZE",
    operands: &[Value::FILENAME, Value::size("SIZE")],
    flags: &FLAGS,
    notes: &[Note::Text("With a sign, SIZE is added to the old size or subtracted from it.")],
    exit_codes: shared::EXIT_CODES,
    examples: &[
        Example { about: "add 10 GiB", arguments: "-f qcow2 disk.qcow2 +10G" },
        Example {
            about: "shrink a disk; data behind the new end is lost",
            arguments: "-f qcow2 --shrink disk.qcow2 5G",
        },
    ],
};

/// The new size, absolute or relative to the old size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    To(u64),
    Grow(u64),
    Shrink(u64),
}

struct Arguments {
    quiet: bool,
    format: Option<String>,
    image_options: bool,
    shrink: bool,
    preallocation: Preallocation,
    filename: String,
    change: Change,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let backend = ImageName::file(&arguments.filename, arguments.format.as_deref())
            .options_if(arguments.image_options)
            .open_or_report(&context.program, &graph(), writing().resizable(true))
            .await?;
        let outcome = resize(context, &arguments, &backend).await;
        let closed = backend.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))?;
        if !arguments.quiet {
            note(format_args!("Image resized.\n"));
        }
        Ok(())
    })
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let (words, shrink_by) = set_apart_size(words);
    let extra_before_end = extra_before_end_of_options(&words);
    let mut read = Arguments {
        quiet: false,
        format: None,
        image_options: false,
        shrink: false,
        preallocation: Preallocation::Off,
        filename: String::new(),
        change: Change::To(0),
    };
    let mut operands = context.parse(FLAGS, words, &mut read)?;
    operands.extend(shrink_by);
    let (filename, size) = match operands.as_slice() {
        [filename, size] => (filename, size),
        [] | [_] => return Err(context.misused("Expecting image file name and size")),
        _ if extra_before_end => {
            return Err(context.misused("Extra argument(s) in command line"));
        }
        _ => return Err(context.misused("Expecting image file name and size")),
    };
    read.filename.clone_from(filename);
    read.change = change(size).map_err(|error| context.error(&error))?;
    Ok(read)
}

/// Whether more than two operands precede the word `--`, or the end of a command line without this word. Two messages of qemu-img
/// differ in this.
fn extra_before_end_of_options(words: &[String]) -> bool {
    let ends = words.iter().enumerate().filter(|(_, word)| *word == "--").map(|(at, _)| at);
    // A word `--` may also be the value of an option: then the words in front of it are not a command line.
    let before = ends.filter_map(|at| flags::operands(words.get(..at)?.to_vec(), FLAGS)).next();
    let operands = before.or_else(|| flags::operands(words.to_vec(), FLAGS));
    operands.is_some_and(|operands| operands.len() > 2)
}

/// Separates a word such as `-1G` directly behind the file name: the word is a size and not a cluster of options.
fn set_apart_size(mut arguments: Vec<String>) -> (Vec<String>, Option<String>) {
    let is_size = |word: &String| {
        word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let operands_before = |at: usize| {
        let words = arguments.get(..at).unwrap_or_default().to_vec();
        flags::operands(words, FLAGS).map_or(0, |operands| operands.len())
    };
    let behind_name = |at: usize| operands_before(at) == 1 && operands_before(at - 1) == 0;
    let place =
        (1..arguments.len()).find(|at| arguments.get(*at).is_some_and(is_size) && behind_name(*at));
    let size = place.map(|at| arguments.remove(at));
    (arguments, size)
}

fn change(text: &str) -> Result<Change, Error> {
    let (make, number): (fn(u64) -> Change, &str) = match text.split_at_checked(1) {
        Some(("+", rest)) => (Change::Grow, rest),
        Some(("-", rest)) => (Change::Shrink, rest),
        _ => (Change::To, text),
    };
    parse_size(number).map(make).map_err(|error| size_fault(error, "size", number))
}

async fn resize(context: &Context, arguments: &Arguments, backend: &Backend) -> Step {
    let old = backend.size();
    let new = match arguments.change {
        Change::To(size) => Some(size),
        Change::Grow(by) => old.checked_add(by),
        Change::Shrink(by) => old.checked_sub(by),
    };
    let Some(new) = new.filter(|size| *size > 0 && *size <= MAX_OFFSET) else {
        return Err(context.failed("New image size must be positive"));
    };
    if new <= old && arguments.preallocation != Preallocation::Off {
        return Err(context.failed("Preallocation can only be used for growing images"));
    }
    if new < old && !arguments.shrink {
        context.program.error("Use the --shrink option to perform a shrink operation.");
        context.program.warn("Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there.");
        return Err(super::Exit(1));
    }
    backend.resize(new, arguments.preallocation).await.map_err(|error| context.error(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_makes_the_size_relative() {
        assert_eq!(change("8M").unwrap(), Change::To(8 << 20));
        assert_eq!(change("+1k").unwrap(), Change::Grow(1024));
        assert_eq!(change("-1k").unwrap(), Change::Shrink(1024));
        assert!(change("").is_err());
        assert!(change("foo").is_err());
    }
}
