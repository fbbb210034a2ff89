//! `img convert`: options and messages. [`target`] prepares the target, and [`oxblk::copy`] does the copy.

mod arguments;
mod bitmaps;
mod target;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk::Sharing;
use oxblk::copy::{Copy, CopyError, CopyOptions, Observer, Stage};
use oxblk_core::create::Created;
use oxblk_core::{Backend, Error, Graph};
use oxblk_ring::IoThread;

use super::create::print_options;
use super::create_options::asks_for_help;
use super::source_snapshot::Wanted;
use super::stopped::report_stop;
use super::{Context, Exit, Step, graph, threads};
use crate::image::{ImageName, reading};
use crate::program::Program;
use crate::signals::catch_stop;
use crate::text::progress::{Progress, step};
use arguments::Arguments;
pub(super) use arguments::PAGE;
use target::Unprepared;

/// Runs the command.
pub(super) fn run(context: &Context, words: Vec<String>) -> Step {
    let arguments = arguments::read(context, words)?;
    let graph = graph();
    if arguments.options.as_deref().is_some_and(asks_for_help) {
        let target = Some(arguments.target.as_str()).filter(|name| !name.is_empty());
        return print_options(context, &graph, arguments.new_format(), target);
    }
    let helpers = threads::helpers(context, arguments.threads);
    let progress = Progress::start(arguments.progress && !arguments.quiet, step::USUAL);
    let outcome =
        context.block_on(convert(context, &arguments, &graph, helpers.threads(), &progress));
    helpers.join();
    if outcome.is_ok() {
        progress.complete();
    }
    progress.end();
    outcome
}

async fn convert(
    context: &Context,
    arguments: &Arguments,
    graph: &Graph,
    helpers: &[IoThread],
    progress: &Arc<Progress>,
) -> Step {
    let mut sources = Vec::new();
    let mut outcome = Ok(());
    for name in &arguments.sources {
        let image = ImageName::file(name, arguments.source_format.as_deref())
            .options_if(arguments.source_options);
        let options = reading()
            .cache(arguments.source_cache)
            .force_share(arguments.share)
            .sharing(Sharing::ReadOnly);
        match image.open_or_report(&context.program, graph, options).await {
            Ok(source) => sources.push(source),
            Err(unopened) => {
                outcome = Err(unopened.into());
                break;
            }
        }
    }
    if let (Some(snapshot), Ok(())) = (&arguments.snapshot, &outcome) {
        outcome = load_snapshot(context, snapshot, &sources).await;
    }
    if outcome.is_ok() {
        let stop = Arc::default();
        let job = Job { context, arguments, graph, helpers, progress, stop };
        outcome = job.run(&sources).await;
    }
    for source in sources {
        // The sources were opened read-only, so an error of the close is ignored.
        drop(source.close().await);
    }
    outcome
}

async fn load_snapshot(context: &Context, snapshot: &Wanted, sources: &[Backend]) -> Step {
    match (snapshot, sources) {
        (_, [source]) | (Wanted::Both { .. }, [source, ..]) => snapshot.load(context, source).await,
        _ => Err(context.failed("No support for concatenating multiple snapshot")),
    }
}

struct Job<'a> {
    context: &'a Context,
    arguments: &'a Arguments,
    graph: &'a Graph,
    helpers: &'a [IoThread],
    progress: &'a Arc<Progress>,
    /// Set by a signal. The signals are caught before the target is created, or after an existing target was opened.
    stop: Arc<AtomicBool>,
}

impl Job<'_> {
    async fn run(&self, sources: &[Backend]) -> Step {
        if self.arguments.create {
            catch_stop(&self.stop);
        }
        let prepared =
            target::prepare(self.context, self.arguments, self.graph, sources, &self.stop).await;
        let target = match prepared {
            Ok(target) => target,
            Err(Unprepared::Failed(exit)) => return Err(exit),
            Err(Unprepared::Stopped(created)) => return Err(self.report_stop(Some(created)).await),
        };
        if !self.arguments.create {
            catch_stop(&self.stop);
        }
        let copied = self.copy_all(sources, &target).await;
        let closed = target.backend.close().await;
        if let Err(Exit::INTERRUPTED) = copied {
            return Err(self.report_stop(target.created).await);
        }
        copied?;
        closed.map_err(|error| self.context.error(&error))
    }

    /// Removes the target after a signal if this run created it, and reports what remains.
    async fn report_stop(&self, created: Option<Created>) -> Exit {
        let what = format!("Stopped at {:.2} %", self.progress.percent());
        self.progress.end();
        report_stop(self.context, self.graph, &what, &self.arguments.target, created).await
    }

    async fn copy_all(&self, sources: &[Backend], target: &target::Target) -> Step {
        let Some(skip_broken) = self.arguments.bitmaps else {
            return self.copy(sources, target).await;
        };
        bitmaps::check_target(self.context, &target.backend)?;
        self.copy(sources, target).await?;
        match sources {
            [source] => bitmaps::copy(self.context, source, &target.backend, skip_broken).await,
            _ => Ok(()),
        }
    }

    async fn copy(&self, sources: &[Backend], target: &target::Target) -> Step {
        let Arguments { compress, sparse, salvage, offload, rate, out_of_order, .. } =
            *self.arguments;
        // An existing target is overwritten in place, with zeroes where the sources have no data. Emptying the target
        // first would free its space on the host, and the copy would allocate the same space again.
        let options = CopyOptions {
            parallel: self.arguments.parallel,
            sparse,
            compress,
            target_is_zero: target.is_zero,
            backing: target.backing,
            offload,
            salvage,
            rate,
            in_order: !out_of_order,
            ..CopyOptions::default()
        };
        let observer = Arc::new(ProgressObserver {
            program: self.context.program.clone(),
            quiet: self.arguments.quiet,
            progress: Arc::clone(self.progress),
        });
        let copy = Copy {
            sources: sources.to_vec(),
            range: None,
            target: target.backend.clone(),
            options,
            observer,
            stop: Arc::clone(&self.stop),
        };
        oxblk::copy::run(copy, self.helpers).await.map_err(|failure| self.failed(&failure))?;
        if compress {
            let ended = target.backend.end_compressed().await;
            ended.map_err(|error| self.context.error(&error))?;
        }
        Ok(())
    }

    fn failed(&self, failure: &CopyError) -> Exit {
        if failure.stage == Stage::Stopped {
            return Exit::INTERRUPTED;
        }
        self.context.program.error(failure);
        Exit(1)
    }
}

/// Passes the progress of the copy to [`Progress`], and warns about ranges that could not be read (`--salvage`).
struct ProgressObserver {
    program: Program,
    quiet: bool,
    progress: Arc<Progress>,
}

impl Observer for ProgressObserver {
    fn progress(&self, done: u64, total: u64) {
        self.progress.set(done, total);
    }

    fn wants_total(&self) -> bool {
        self.progress.is_shown()
    }

    fn salvaged(&self, offset: u64, error: &Error) {
        if !self.quiet {
            self.program.warn(format_args!("error while reading offset {offset}: {error}"));
        }
    }
}
