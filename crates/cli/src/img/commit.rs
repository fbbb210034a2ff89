//! `img commit`: options and messages. [`oxblk::commit`] does the work.

use std::sync::Arc;

use oxblk::Cache;
use oxblk::commit::{Commit, CommitError};
use oxblk::copy::{Observer, Stage};
use oxblk_core::{Backend, ChildIdx, Node, strerror};
use oxblk_ring::IoThread;

use super::{Context, Exit, Step, graph, threads};
use crate::flags::page::{Example, Page};
use crate::flags::spec::{Value, both};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, writing};
use crate::program::note;
use crate::signals::stop_flag;
use crate::text::progress::{Progress, step};

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::object(),
    shared::format(|a| &mut a.format),
    shared::image_opts(|a| &mut a.image_options),
    shared::cache('t', |a| &mut a.cache_name),
    Flag::switch(both('d', "drop"), "do not empty FILENAME afterwards", |a| &mut a.keep),
    Flag::value(
        both('b', "base"),
        Value::file("FILE").default("the backing file"),
        "image of the backing chain that receives the data; implies -d",
        |a, name| {
            a.base = Some(name);
            // If the image were empty, reads would return the data of the images between it and the base, instead of the
            // committed data.
            a.keep = true;
            Ok(())
        },
    ),
    shared::progress(|a| &mut a.progress),
    shared::rate(|a, text| shared::set_rate(&mut a.rate, &text)),
    shared::threads(|a, text| threads::set(&mut a.threads, &text)),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img commit",
    about: "write the data of an overlay to its backing file",
    usage: "[OPTIONS] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::STOPPABLE_EXIT_CODES,
    examples: &[Example {
        about: "commit an overlay to its backing file and empty it",
        arguments: "-f qcow2 overlay.qcow2",
    }],
};

struct Arguments {
    quiet: bool,
    progress: bool,
    format: Option<String>,
    image_options: bool,
    cache_name: Option<String>,
    cache: Cache,
    /// Do not empty the image.
    keep: bool,
    base: Option<String>,
    rate: Option<u64>,
    threads: usize,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, words: Vec<String>) -> Step {
    let arguments = read(context, words)?;
    let helpers = threads::helpers(context, arguments.threads);
    let progress = Progress::start(arguments.progress && !arguments.quiet, step::USUAL);
    let outcome = context.block_on(commit(context, &arguments, helpers.threads(), &progress));
    helpers.join();
    if outcome.is_ok() {
        progress.complete();
    }
    progress.end();
    outcome?;
    if !arguments.quiet {
        note(format_args!("Image committed.\n"));
    }
    Ok(())
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments {
        quiet: false,
        progress: false,
        format: None,
        image_options: false,
        cache_name: None,
        cache: Cache::Writeback,
        keep: false,
        base: None,
        rate: None,
        threads: threads::default(),
        filename: String::new(),
    };
    let mut operands = context.parse(FLAGS, words, &mut read)?;
    match (operands.pop(), operands.is_empty()) {
        (Some(filename), true) => read.filename = filename,
        _ => return Err(context.misused("Expecting one image file name")),
    }
    read.cache = context.cache("cache", read.cache_name.as_deref())?;
    Ok(read)
}

async fn commit(
    context: &Context,
    arguments: &Arguments,
    helpers: &[IoThread],
    progress: &Arc<Progress>,
) -> Step {
    let image = ImageName::file(&arguments.filename, arguments.format.as_deref())
        .options_if(arguments.image_options);
    let options = writing().cache(arguments.cache).discard(true);
    let top = image.open_or_report(&context.program, &graph(), options).await?;
    let outcome = match base(context, arguments, &top) {
        Ok(base) => {
            let commit = Commit {
                top: top.clone(),
                base,
                empty: !arguments.keep,
                parallel: threads::requests(helpers),
                rate: arguments.rate,
                observer: Arc::new(ProgressObserver(Arc::clone(progress))),
                stop: stop_flag(),
            };
            let committed = oxblk::commit::run(commit, helpers).await;
            committed.map_err(|failure| failed(context, arguments, &failure))
        }
        Err(exit) => Err(exit),
    };
    let closed = top.close().await;
    outcome?;
    closed.map_err(|error| context.error(&error))
}

/// The image that receives the data.
fn base(context: &Context, arguments: &Arguments, top: &Backend) -> Step<Arc<Node>> {
    let node = top.node().map_err(|error| context.error(&error))?;
    let Some(name) = &arguments.base else {
        let below = node.skip_filters().child(ChildIdx::BACKING);
        return below
            .map(|below| below.skip_filters())
            .ok_or_else(|| context.failed("Image does not have a backing file"));
    };
    node.find_backing(name).ok_or_else(|| {
        context.failed(format_args!(
            "Did not find '{name}' in the backing chain of '{}'",
            arguments.filename
        ))
    })
}

fn failed(context: &Context, arguments: &Arguments, failure: &CommitError) -> Exit {
    match failure {
        CommitError::Top(error) | CommitError::Base(error) => context.error(error),
        CommitError::Copy(failure) if failure.stage == Stage::Stopped => {
            context.program.error(failure);
            Exit::INTERRUPTED
        }
        CommitError::Copy(failure) => {
            let reason = strerror(failure.error.raw_errno());
            context.failed(format_args!("Block job failed: {reason}"))
        }
        CommitError::Close(error) => context.failed(format_args!("Block job failed: {error}")),
        CommitError::Empty(error) => {
            context.failed(format_args!("Could not empty {}: {error}", arguments.filename))
        }
    }
}

/// Passes the progress of the commit to [`Progress`].
struct ProgressObserver(Arc<Progress>);

impl Observer for ProgressObserver {
    fn progress(&self, done: u64, total: u64) {
        self.0.set(done, total);
    }

    fn wants_total(&self) -> bool {
        self.0.is_shown()
    }
}
