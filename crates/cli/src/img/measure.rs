//! `img measure`: reports the file size that a new image would need. The driver of the format computes it.

use oxblk_core::create::{Measure, MeasureRequest};
use oxblk_core::{Backend, DriverFactory, Options};
use serde_json::{Map, json};

use super::create_options::{CreateOptions, append};
use super::source_snapshot::Wanted;
use super::{Context, Step, graph, objects};
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;
use crate::program::out;
use oxblk::qemu_json;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('O', "target-format", true),
    both('f', "format", true),
    long('I', "image-opts", false),
    both('o', "options", true),
    both('l', "snapshot", true),
    long('B', "object", true),
    long('J', "output", true),
    both('s', "size", true),
    both('U', "force-share", false),
];

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
            let image = Image::read_only(name)
                .format(arguments.format.as_deref())
                .options_if(arguments.image_options)
                .share_if(arguments.share);
            source = Some(image.open_or_say(&context.program, &graph).await?);
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

fn read(context: &Context, arguments: Vec<String>) -> Step<Arguments> {
    let mut parser = context.parser(arguments, OPTIONS);
    let mut read = Arguments::default();
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        match id {
            'O' => read.target = Some(value),
            'o' => append(&mut read.options, &value).map_err(|text| context.failed(text))?,
            's' => read.size = Some(context.bytes("image size", &value)?),
            'f' => read.format = Some(value),
            'I' => read.image_options = true,
            'l' => read.snapshot = Some(Wanted::parse(context, &value)?),
            'J' => read.json = context.wants_json(&value)?,
            'U' => read.share = true,
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    let mut operands = parser.operands().into_iter();
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
    let unsupported = || {
        context.failed(format_args!("Block driver '{format}' does not support size measurement"))
    };
    let request = MeasureRequest { options, source, secrets: graph.secrets() };
    let measured = driver.measure(request).ok_or_else(unsupported)?;
    measured.await.map_err(|error| context.error(&error))
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
        let mut map = Map::new();
        map.insert("required".to_owned(), json!(measure.required));
        map.insert("fully-allocated".to_owned(), json!(measure.fully_allocated));
        if let Some(bitmaps) = measure.bitmaps {
            map.insert("bitmaps".to_owned(), json!(bitmaps));
        }
        out(format_args!("{}\n", qemu_json::pretty(&map.into())));
        return;
    }
    out(format_args!("required size: {}\n", measure.required));
    out(format_args!("fully allocated size: {}\n", measure.fully_allocated));
    if let Some(bitmaps) = measure.bitmaps {
        out(format_args!("bitmaps size: {bitmaps}\n"));
    }
}
