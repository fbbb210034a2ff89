//! `img amend`: changes options of an existing image.

use std::sync::Arc;

use oxblk_core::amend::AmendRequest;
use oxblk_core::{Backend, DriverFactory};

use super::create_options::{CreateOptions, append, asks_for_help};
use super::{Context, Step, graph, objects};
use crate::cache::CacheMode;
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;
use crate::program::{err, out};
use crate::text::progress::{Progress, step};

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('q', "quiet", false),
    both('p', "progress", false),
    long('O', "object", true),
    both('f', "format", true),
    both('t', "cache", true),
    both('o', "options", true),
    long('I', "image-opts", false),
    long('F', "force", false),
];

struct Arguments {
    progress: bool,
    format: Option<String>,
    image_options: bool,
    cache: CacheMode,
    force: bool,
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
    let mut parser = context.parser(words, OPTIONS);
    let (mut quiet, mut cache, mut options) = (false, None, None);
    let mut read = Arguments {
        progress: false,
        format: None,
        image_options: false,
        cache: CacheMode::WRITEBACK,
        force: false,
        options: String::new(),
        filename: None,
    };
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        match id {
            'q' => quiet = true,
            'p' => read.progress = true,
            'f' => read.format = Some(value),
            'I' => read.image_options = true,
            't' => cache = Some(value),
            'o' => append(&mut options, &value).map_err(|text| context.failed(text))?,
            'F' => read.force = true,
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    let Some(options) = options else {
        return Err(context.misused("Must specify options (-o)"));
    };
    read.options = options;
    read.progress &= !quiet;
    let mut operands = parser.operands();
    read.filename = operands.pop().filter(|_| operands.is_empty());
    // A missing file name is reported before an invalid cache mode.
    if let Some(name) = cache.filter(|_| read.filename.is_some()) {
        read.cache = CacheMode::parse(&name)
            .ok_or_else(|| context.failed(format_args!("Invalid cache option: {name}")))?;
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
