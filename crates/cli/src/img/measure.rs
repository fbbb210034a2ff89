//! `img measure`: reports the file size that a new image would need. The driver of the format computes the size.

use oxblk::{Measure, qapi, qemu_json};
use oxblk_core::{Backend, DriverFactory, Options};

use super::create_options::{CreateOptions, append};
use super::source_snapshot::Wanted;
use super::{Context, Step, graph};
use crate::flags::page::{Example, Page};
use crate::flags::spec::{Value, both};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading};
use crate::program::out;
use crate::text::number;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    Flag::text(
        both('O', "target-format"),
        Value::FORMAT.default("raw"),
        "format of the new image",
        |a| &mut a.target,
    ),
    Flag::text(
        both('f', "format"),
        Value::FORMAT,
        "format of FILENAME; without it, the format is probed",
        |a| &mut a.format,
    ),
    shared::image_opts(|a| &mut a.image_options),
    Flag::value(
        both('o', "options"),
        shared::OPTIONS,
        "options of the new image (key=value,...)",
        |a, list| Ok(append(&mut a.options, &list)?),
    ),
    Flag::value(both('l', "snapshot"), Wanted::VALUE, Wanted::ABOUT, |a, text| {
        a.snapshot = Some(Wanted::parse(&text)?);
        Ok(())
    }),
    shared::object(),
    shared::output(|a, text| shared::set_json(&mut a.json, &text)),
    Flag::value(both('s', "size"), Value::size("SIZE"), "size of an empty new image", |a, text| {
        a.size = Some(number::bytes("image size", &text)?);
        Ok(())
    }),
    shared::force_share(|a| &mut a.share),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img measure",
    about: "print the file size that a new image needs",
    usage: "[OPTIONS] (--size SIZE | FILENAME)",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[Example {
        about: "print the size of a qcow2 copy of a raw disk",
        arguments: "-f raw -O qcow2 disk.raw",
    }],
};

#[derive(Default)]
struct Arguments {
    target: Option<String>,
    options: Option<String>,
    size: Option<u64>,
    format: Option<String>,
    image_options: bool,
    snapshot: Option<Wanted>,
    json: bool,
    share: bool,
    filename: Option<String>,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let graph = graph();
        let mut source = None;
        if let Some(name) = &arguments.filename {
            let image = ImageName::file(name, arguments.format.as_deref())
                .options_if(arguments.image_options);
            let options = reading().force_share(arguments.share);
            source = Some(image.open_or_report(&context.program, &graph, options).await?);
        }
        let loaded = match (&arguments.snapshot, &source) {
            (Some(snapshot), Some(source)) => snapshot.load(context, source).await,
            _ => Ok(()),
        };
        let outcome = match loaded {
            Ok(()) => measure(context, &arguments, &graph, source.as_ref()).await,
            Err(exit) => Err(exit),
        };
        if let Some(source) = &source {
            source.close().await.map_err(|error| context.error(&error))?;
        }
        print(&outcome?, arguments.json);
        Ok(())
    })
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments::default();
    let mut operands = context.parse(FLAGS, words, &mut read)?.into_iter();
    read.filename = operands.next();
    if operands.next().is_some() {
        return Err(context.failed("At most one filename argument is allowed."));
    }
    let about_a_file = read.image_options || read.format.is_some() || read.snapshot.is_some();
    match (&read.filename, read.size) {
        (None, _) if about_a_file => {
            Err(context.failed("--image-opts, -f, and -l require a filename argument."))
        }
        (None, None) => Err(context.failed("Either --size N or one filename must be specified.")),
        (Some(_), Some(_)) => {
            Err(context.failed("--size N cannot be used together with a filename."))
        }
        _ => Ok(read),
    }
}

async fn measure(
    context: &Context,
    arguments: &Arguments,
    graph: &oxblk_core::Graph,
    source: Option<&Backend>,
) -> Step<Measure> {
    let format = arguments.target.as_deref().unwrap_or("raw");
    let driver = graph
        .driver(format)
        .map_err(|_| context.failed(format_args!("Unknown file format '{format}'")))?;
    let options = options(context, arguments, driver, graph)?;
    let measured = oxblk::measure(graph, format, options, source).await;
    measured.map_err(|error| context.error(&error))
}

fn options(
    context: &Context,
    arguments: &Arguments,
    driver: &'static dyn DriverFactory,
    graph: &oxblk_core::Graph,
) -> Step<Options> {
    let file = graph.driver("file").ok();
    let protocol = file.map(|driver| driver as &dyn DriverFactory);
    let mut options = CreateOptions::new(driver, protocol).map_err(|e| context.error(&e))?;
    if let Some(list) = &arguments.options {
        options.parse(list).map_err(|error| {
            context.program.report(&error);
            context.failed(format_args!("Invalid options for file format '{}'", driver.name()))
        })?;
    }
    if let Some(size) = arguments.size {
        options.set_size(size);
    }
    Ok(options.to_options())
}

fn print(measure: &Measure, as_json: bool) {
    if as_json {
        out(format_args!("{}\n", qemu_json::pretty(&qapi::measure(measure))));
        return;
    }
    out(format_args!("required size: {}\n", measure.required));
    out(format_args!("fully allocated size: {}\n", measure.fully_allocated));
    if let Some(bitmaps) = measure.bitmaps {
        out(format_args!("bitmaps size: {bitmaps}\n"));
    }
}
