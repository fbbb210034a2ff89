//! `img resize`: changes the virtual size of an image.

use oxblk_core::{Backend, Error, Preallocation, parse_size, size_fault};

use super::{Context, Step, graph, objects};
use crate::getopt::{Found, Operands, Opt, Parser, both, long};
use crate::image::Image;
use crate::program::note;
use crate::text::number::MAX_OFFSET;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('q', "quiet", false),
    long('O', "object", true),
    both('f', "format", true),
    long('I', "image-opts", false),
    long('P', "preallocation", true),
    long('S', "shrink", false),
];

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
        let backend = Image::writable(&arguments.filename)
            .format(arguments.format.as_deref())
            .options_if(arguments.image_options)
            .open_or_say(&context.program, &graph())
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

fn read(context: &Context, arguments: Vec<String>) -> Step<Arguments> {
    let (arguments, shrink_by) = set_apart_size(arguments);
    let mut parser = context.parser(arguments, OPTIONS);
    let mut read = Arguments {
        quiet: false,
        format: None,
        image_options: false,
        shrink: false,
        preallocation: Preallocation::Off,
        filename: String::new(),
        change: Change::To(0),
    };
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        match id {
            'q' => read.quiet = true,
            'f' => read.format = Some(value),
            'I' => read.image_options = true,
            'S' => read.shrink = true,
            'P' => {
                read.preallocation = Preallocation::parse(&value).ok_or_else(|| {
                    context.failed(format_args!("Invalid preallocation mode '{value}'"))
                })?;
            }
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    let mut operands = parser.operands();
    operands.extend(shrink_by);
    let (filename, size) = match operands.as_slice() {
        [filename, size] => (filename, size),
        [] | [_] => return Err(context.misused("Expecting image file name and size")),
        _ => return Err(context.misused("Extra argument(s) in command line")),
    };
    read.filename.clone_from(filename);
    read.change = change(size).map_err(|error| context.error(&error))?;
    Ok(read)
}

/// Separates a last word such as `-1G`, which is a size and not a cluster of options.
fn set_apart_size(mut arguments: Vec<String>) -> (Vec<String>, Option<String>) {
    let is_size = |word: &String| {
        word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let mut size = arguments.pop_if(|word| is_size(word));
    // Without a file name before it, the word is parsed as options.
    if !has_operand(&arguments) {
        arguments.extend(size.take());
    }
    (arguments, size)
}

fn has_operand(arguments: &[String]) -> bool {
    let mut parser = Parser::new("", arguments.to_vec(), OPTIONS, Operands::Anywhere);
    loop {
        match parser.next() {
            Ok(Some(_)) => {}
            Ok(None) => return !parser.operands().is_empty(),
            Err(_) => return false,
        }
    }
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
