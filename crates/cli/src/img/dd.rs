//! `img dd`: copies a range of an image, given in blocks, into a new image. [`oxblk::copy`] does the work.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk::copy::{Copy, CopyOptions, Stage};
use oxblk_core::create::Creation;
use oxblk_core::{Backend, Graph};

use super::create_options::CreateOptions;
use super::stopped::report_stop;
use super::{Context, Exit, Step, graph, threads};
use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::{Value, both, long};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading, writing};
use crate::program::err;
use crate::signals::stop_flag;
use crate::text::number;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::object(),
    Flag::text(
        both('f', "format"),
        Value::FORMAT,
        "format of the input; without it, the format is probed",
        |a| &mut a.format,
    ),
    Flag::value(
        both('O', "output-format"),
        Value::FORMAT.default("raw"),
        "format of the output",
        |a, format| {
            a.output_format = format;
            Ok(())
        },
    ),
    Flag::switch(
        long("image-opts"),
        "INPUT is a list of options, for example driver=qcow2,file.filename=disk.qcow2",
        |a| &mut a.image_options,
    ),
    Flag::switch(both('U', "force-share"), "allow other programs to write to the input", |a| {
        &mut a.share
    }),
    shared::threads(|a, text| threads::set(&mut a.threads, &text)),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img dd",
    about: "copy a range of an image into a new image",
    usage: "[OPTIONS] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    operands: &[Value::file("if=INPUT"), Value::file("of=OUTPUT"), Value::size("bs=SIZE")],
    flags: &FLAGS,
    notes: &[Note::Text(
        "Blocks have bs bytes (default: 512). The copy begins after skip blocks. count includes the skipped blocks.",
    )],
    exit_codes: shared::STOPPABLE_EXIT_CODES,
    examples: &[Example {
        about: "copy the first GiB of a disk",
        arguments: "-f qcow2 -O raw bs=1M count=1024 if=disk.qcow2 of=start.raw",
    }],
};

/// Maximum block size in bytes.
const MAX: u64 = i32::MAX as u64;

struct Arguments {
    format: Option<String>,
    image_options: bool,
    output_format: String,
    share: bool,
    threads: usize,
    input: String,
    output: String,
    block: u64,
    count: Option<u64>,
    skip: u64,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    let helpers = threads::helpers(context, arguments.threads);
    let outcome = context.block_on(async {
        let graph = graph();
        let source = ImageName::file(&arguments.input, arguments.format.as_deref())
            .options_if(arguments.image_options)
            .open_or_report(&context.program, &graph, reading().force_share(arguments.share))
            .await?;
        let outcome = dd(context, &arguments, &graph, &source, helpers.threads()).await;
        let closed = source.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    });
    helpers.join();
    outcome
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments {
        format: None,
        image_options: false,
        output_format: "raw".to_owned(),
        share: false,
        threads: threads::default(),
        input: String::new(),
        output: String::new(),
        block: 512,
        count: None,
        skip: 0,
    };
    for operand in context.parse(FLAGS, words, &mut read)? {
        let Some((key, value)) = operand.split_once('=') else {
            return Err(context.failed(format_args!("unrecognized operand {operand}")));
        };
        match key {
            "if" => read.input = value.to_owned(),
            "of" => read.output = value.to_owned(),
            "bs" => read.block = context.sized("bs", value, 1, MAX)?,
            "count" => read.count = Some(blocks(context, "count", value)?),
            "skip" => read.skip = blocks(context, "skip", value)?,
            _ => return Err(context.failed(format_args!("unrecognized operand {key}"))),
        }
    }
    if read.input.is_empty() || read.output.is_empty() {
        return Err(context.failed("Must specify both input and output files"));
    }
    Ok(read)
}

/// Parses a number of blocks, which must not have a suffix.
fn blocks(context: &Context, what: &str, text: &str) -> Step<u64> {
    let has_suffix = text.ends_with(|last: char| last.is_ascii_alphabetic());
    if has_suffix && !text.starts_with("0x") {
        return Err(context.failed(format_args!("Invalid {what} specified: '{text}'.")));
    }
    context.sized(what, text, 0, number::MAX_OFFSET)
}

async fn dd(
    context: &Context,
    arguments: &Arguments,
    graph: &Graph,
    source: &Backend,
    helpers: &[oxblk_ring::IoThread],
) -> Step {
    let Arguments { input, output, output_format, block, .. } = arguments;
    let driver = graph.driver(output_format).map_err(|_| context.failed("Unknown file format"))?;
    let protocol = graph.protocol_for(output).map_err(|error| context.error(&error))?.0;
    let mut options =
        CreateOptions::new(driver, Some(protocol)).map_err(|error| context.error(&error))?;
    let size = source.size();
    // As in qemu-img, `count` is relative to the start of the input, so `count` includes the skipped blocks.
    let end = arguments.count.map_or(size, |count| count.saturating_mul(*block).min(size));
    let begin = arguments.skip.saturating_mul(*block);
    let length = end.saturating_sub(begin);
    options.set_size(length);
    // Catch signals from here on, so that a signal leaves no incomplete target.
    let stop = stop_flag();
    let made = graph.create_image_until(output, output_format, &options.to_options(), &stop).await;
    let creation = made.map_err(|error| {
        context
            .program
            .report_in(format_args!("{output}: error while creating output image: "), &error);
        Exit(1)
    })?;
    let created = match creation {
        Creation::Complete(created) => created,
        Creation::Stopped(created) => {
            return Err(report_stop(context, graph, "Interrupted", output, Some(created)).await);
        }
    };
    if begin > end {
        err(format_args!("{}: {input}: cannot skip to specified offset\n", context.program.name()));
        return Ok(());
    }
    let opened = ImageName::file(output, Some(output_format))
        .open_or_report(&context.program, graph, writing())
        .await;
    let target = match opened {
        Ok(target) => target,
        Err(exit) => {
            // Remove the new image, since the copy into it cannot start.
            created.remove_incomplete(graph).await;
            return Err(exit.into());
        }
    };
    let copied = copy(source, &target, (begin, length), stop, helpers).await;
    let closed = target.close().await;
    match copied {
        Ok(()) => closed.map_err(|error| context.error(&error)),
        Err(failure) => Err(match failure.stage {
            Stage::Writing => {
                let error = failure.error;
                context.failed(format_args!("error while writing to output image file: {error}"))
            }
            Stage::Stopped => {
                report_stop(context, graph, "Interrupted", output, Some(created)).await
            }
            _ => context.failed(failure),
        }),
    }
}

async fn copy(
    source: &Backend,
    target: &Backend,
    (from, len): (u64, u64),
    stop: Arc<AtomicBool>,
    helpers: &[oxblk_ring::IoThread],
) -> Result<(), oxblk::copy::CopyError> {
    let copy = Copy {
        sources: vec![source.clone()],
        range: Some(from..from.saturating_add(len)),
        target: target.clone(),
        // The block size only determines the start and the end. Every byte is written as data.
        options: CopyOptions { sparse: 0, ..CopyOptions::default() },
        observer: Arc::new(()),
        stop,
    };
    oxblk::copy::run(copy, helpers).await
}
