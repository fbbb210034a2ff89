//! `img amend`: changes options of an existing image.

use std::sync::Arc;

use oxblk_core::amend::AmendRequest;
use oxblk_core::{Backend, DriverFactory};

use super::create_options::{CreateOptions, append, asks_for_help};
use super::{Context, Step, graph};
use crate::cache::CacheMode;
use crate::flags::page::{Example, Page};
use crate::flags::spec::{Value, both, long};
use crate::flags::{Flag, shared};
use crate::image::Image;
use crate::program::{err, out};
use crate::text::progress::{Progress, step};

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::progress(|a| &mut a.progress),
    shared::object(),
    shared::format(|a| &mut a.format),
    shared::cache('t', |a| &mut a.cache_name),
    Flag::value(
        both('o', "options"),
        shared::OPTIONS,
        "options to change (key=value,...); '-o help' lists them",
        |a, list| Ok(append(&mut a.given, &list)?),
    ),
    shared::image_opts(|a| &mut a.image_options),
    Flag::switch(long("force"), "allow changes that may lock you out of an encrypted image", |a| {
        &mut a.force
    }),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img amend",
    about: "change options of an image",
    usage: "[OPTIONS] -o LIST FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[Example {
        about: "add support for persistent bitmaps to an old image",
        arguments: "-f qcow2 -o compat=1.1 disk.qcow2",
    }],
};

#[derive(Default)]
struct Arguments {
    quiet: bool,
    progress: bool,
    format: Option<String>,
    image_options: bool,
    cache_name: Option<String>,
    cache: CacheMode,
    force: bool,
    /// The values of all `-o`.
    given: Option<String>,
    options: String,
    filename: Option<String>,
}

/// Runs the command.
pub(super) fn run(context: &Context, words: Vec<String>) -> Step {
    let arguments = read(context, words)?;
    let graph = graph();
    if let (Some(format), true) = (&arguments.format, asks_for_help(&arguments.options)) {
        let driver = graph
            .driver(format)
            .map_err(|_| context.failed(format_args!("Unknown file format '{format}'")))?;
        return help(context, driver);
    }
    let Some(filename) = &arguments.filename else {
        return Err(context.failed("Expecting one image file name"));
    };
    let progress = Progress::start(arguments.progress, step::USUAL);
    let outcome = context.block_on(async {
        let image = Image::writable(filename)
            .format(arguments.format.as_deref())
            .options_if(arguments.image_options)
            .cache(arguments.cache)
            .open_or_say(&context.program, &graph)
            .await?;
        let outcome = amend(context, &arguments, &image, &progress).await;
        let closed = image.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    });
    progress.complete();
    progress.end();
    outcome
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments::default();
    let mut operands = context.parse(FLAGS, words, &mut read)?;
    let Some(options) = read.given.take() else {
        return Err(context.misused("Must specify options (-o)"));
    };
    read.options = options;
    read.progress &= !read.quiet;
    read.filename = operands.pop().filter(|_| operands.is_empty());
    // A missing file name is reported before an invalid cache mode.
    if read.filename.is_some() {
        read.cache = context.cache("cache", read.cache_name.as_deref())?;
    }
    Ok(read)
}

fn help(context: &Context, driver: &dyn DriverFactory) -> Step {
    let options = CreateOptions::to_amend(driver).map_err(|error| context.error(&error))?;
    out(format_args!("Amend options for '{}':\n{}", driver.name(), options.help()));
    Ok(())
}

async fn amend(
    context: &Context,
    arguments: &Arguments,
    image: &Backend,
    progress: &Arc<Progress>,
) -> Step {
    let driver = image.node().map_err(|error| context.error(&error))?.factory();
    let mut options = CreateOptions::to_amend(driver).map_err(|error| context.error(&error))?;
    if asks_for_help(&arguments.options) {
        return help(context, driver);
    }
    options.parse(&arguments.options).map_err(|error| {
        let exit = context.error(&error);
        let would_do = CreateOptions::to_create_or_amend(driver).parse(&arguments.options).is_ok();
        if would_do {
            err(format_args!("This option is only supported for image creation\n"));
        }
        exit
    })?;
    let progress = Arc::clone(progress);
    let request = AmendRequest {
        options: options.to_options(),
        force: arguments.force,
        progress: Box::new(move |done, total| progress.set(done, total)),
    };
    image.amend(request).await.map_err(|error| context.error(&error))
}
