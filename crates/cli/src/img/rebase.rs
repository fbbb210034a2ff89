//! `img rebase`: options and messages. [`oxblk::rebase`] does the work.

use std::sync::Arc;

use oxblk::Cache;
use oxblk::copy::Observer;
use oxblk::rebase::{Rebase, RebaseError, RebaseStage};
use oxblk_core::{
    Backend, ChildIdx, Errno, ErrorKind, Graph, Node, Perm, Permissions, names, relative_to,
    strerror,
};
use oxblk_ring::IoThread;

use super::{Context, Exit, Step, graph, threads};
use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::{Alias, Value, both};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading, writing};
use crate::signals::stop_flag;
use crate::text::progress::{Progress, step};

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::progress(|a| &mut a.progress),
    shared::object(),
    shared::image_opts(|a| &mut a.image_options),
    Flag::switch(
        both('U', "force-share"),
        "allow other programs to write to the new backing file",
        |a| &mut a.share,
    ),
    shared::format(|a| &mut a.format),
    Flag::text(
        both('t', "cache"),
        Value::CACHE.default("writeback"),
        "cache mode of the image",
        |a| &mut a.cache_name,
    ),
    Flag::switch(both('c', "compress"), "compress the copied data", |a| &mut a.compress),
    Flag::value(
        both('b', "backing"),
        Value::file("FILE"),
        "the new backing file; '' for none",
        |a, name| {
            a.backing_given = true;
            a.backing = Some(name).filter(|name| !name.is_empty());
            Ok(())
        },
    ),
    Flag::text(
        both('F', "backing-format").aliases(&[Alias::Letter('B')]),
        Value::FORMAT,
        "format of the new backing file",
        |a| &mut a.backing_format,
    ),
    Flag::text(
        both('T', "backing-cache"),
        Value::CACHE.default("writeback"),
        "cache mode of the new backing file",
        |a| &mut a.backing_cache_name,
    ),
    Flag::switch(
        both('u', "backing-unsafe"),
        "change only the name; FILE must have the contents of the old backing file",
        |a| &mut a.only_name,
    ),
    shared::threads(|a, text| threads::set(&mut a.threads, &text)),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img rebase",
    about: "change the backing file of an image",
    usage: "[OPTIONS] (-b FILE | -u) FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[Note::Text(
        "Without -u, the contents of the disk stay the same: data in which the new backing file differs from the old \
         one is copied into the image.",
    )],
    exit_codes: shared::STOPPABLE_EXIT_CODES,
    examples: &[
        Example {
            about: "change to another backing file",
            arguments: "-f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
        },
        Example {
            about: "make an image independent of its backing file",
            arguments: "-f qcow2 -b '' overlay.qcow2",
        },
    ],
};

/// The hint if `--untrusted` refuses a backing file.
const CHANGE_ONLY_THE_NAME: &str =
    "With -u, rebase opens no backing file: it changes only the name in the image.";

struct Arguments {
    quiet: bool,
    progress: bool,
    format: Option<String>,
    image_options: bool,
    cache_name: Option<String>,
    cache: Cache,
    /// The new backing file; `None`: the image gets no backing file.
    backing: Option<String>,
    /// `-b` was given, possibly with an empty name.
    backing_given: bool,
    backing_format: Option<String>,
    backing_cache_name: Option<String>,
    backing_cache: Cache,
    /// Change only the name of the backing file, and copy no data.
    only_name: bool,
    compress: bool,
    share: bool,
    threads: usize,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, words: Vec<String>) -> Step {
    let arguments = read(context, words)?;
    let threads = if arguments.only_name { 1 } else { arguments.threads };
    let helpers = threads::helpers(context, threads);
    let progress = Progress::start(arguments.progress && !arguments.quiet, step::WIDE);
    let outcome = context.block_on(rebase(context, &arguments, helpers.threads(), &progress));
    helpers.join();
    if outcome.is_ok() {
        progress.complete();
    }
    progress.end();
    outcome
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments {
        quiet: false,
        progress: false,
        format: None,
        image_options: false,
        cache_name: None,
        cache: Cache::Writeback,
        backing: None,
        backing_given: false,
        backing_format: None,
        backing_cache_name: None,
        backing_cache: Cache::Writeback,
        only_name: false,
        compress: false,
        share: false,
        threads: threads::default(),
        filename: String::new(),
    };
    let mut operands = context.parse(FLAGS, words, &mut read)?;
    match (operands.pop(), operands.is_empty()) {
        (Some(filename), true) => read.filename = filename,
        _ => return Err(context.misused("Expecting one image file name")),
    }
    if !read.only_name && !read.backing_given {
        return Err(context.misused("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    read.cache = context.cache("cache", read.cache_name.as_deref())?;
    read.backing_cache = context.cache("source cache", read.backing_cache_name.as_deref())?;
    Ok(read)
}

async fn rebase(
    context: &Context,
    arguments: &Arguments,
    helpers: &[IoThread],
    progress: &Arc<Progress>,
) -> Step {
    let graph = graph();
    let image = ImageName::file(&arguments.filename, arguments.format.as_deref())
        .options_if(arguments.image_options)
        .hint_without_backing(CHANGE_ONLY_THE_NAME);
    let options = writing().cache(arguments.cache).backing(!arguments.only_name);
    let disk = image.open_or_report(&context.program, &graph, options).await?;
    let job = Job { context, arguments, graph: &graph, helpers, progress, disk: &disk };
    let outcome = job.run().await;
    let closed = disk.close().await;
    outcome?;
    closed.map_err(|error| context.error(&error))
}

struct Job<'a> {
    context: &'a Context,
    arguments: &'a Arguments,
    graph: &'a Graph,
    helpers: &'a [IoThread],
    progress: &'a Arc<Progress>,
    disk: &'a Backend,
}

impl Job<'_> {
    async fn run(&self) -> Step {
        let node = self.disk.node().map_err(|error| self.context.error(&error))?;
        if self.arguments.compress && node.driver().compress().is_none() {
            return Err(self.context.failed("Compression not supported for this file format"));
        }
        if let Some(format) = &self.arguments.backing_format
            && self.graph.driver(format).is_err()
        {
            return Err(self.context.failed(format_args!("Invalid format name: '{format}'")));
        }
        if self.arguments.only_name {
            return self.change().await;
        }
        // Resolve the name relative to the overlay, as every open of the overlay does.
        let name = self.arguments.backing.as_ref();
        let path = name.map(|name| path_from(&node, name));
        let common = path.as_ref().and_then(|path| {
            let real = std::fs::canonicalize(names::to_path(path)).ok().map(names::from_os);
            node.find_backing(real.as_ref().unwrap_or(path))
        });
        let old = node.skip_filters().child(ChildIdx::BACKING);
        let old = old.map(|node| self.reader(node)).transpose()?;
        let new = match (&common, name.zip(path.as_ref())) {
            (Some(layer), _) => Some(self.reader(Arc::clone(layer))?),
            (None, Some((name, path))) => Some(self.open_new(name, path).await?),
            (None, None) => None,
        };
        let outcome = self.work(old.clone(), new.clone(), common).await;
        for reader in [old, new].into_iter().flatten() {
            // The backing files were opened read-only, so an error of the close is ignored.
            drop(reader.close().await);
        }
        outcome?;
        self.change().await
    }

    fn reader(&self, node: Arc<Node>) -> Step<Backend> {
        let permissions = Permissions::sharing_all(Perm::CONSISTENT_READ);
        Backend::new(self.graph, "", node, permissions).map_err(|error| self.context.error(&error))
    }

    async fn open_new(&self, name: &str, path: &str) -> Step<Backend> {
        let options =
            reading().cache(self.arguments.backing_cache).force_share(self.arguments.share);
        let format = self.arguments.backing_format.as_deref();
        let image = ImageName::file(path, format).hint_without_backing(CHANGE_ONLY_THE_NAME);
        let opened = image.open(self.graph, options).await;
        opened.map_err(|error| {
            let context = format_args!("Could not open new backing file '{name}': ");
            self.context.program.report_in(context, &error);
            Exit(1)
        })
    }

    /// Copies data from the old backing file into the image: all ranges that the image has not allocated and in which the old
    /// and the new backing file differ.
    async fn work(
        &self,
        old: Option<Backend>,
        new: Option<Backend>,
        common: Option<Arc<Node>>,
    ) -> Step {
        // Check first whether the backing file can be changed at the end.
        self.check_change()?;
        let rebase = Rebase {
            disk: self.disk.clone(),
            old,
            new,
            common,
            compress: self.arguments.compress,
            parallel: threads::requests(self.helpers),
            observer: Arc::new(ProgressObserver(Arc::clone(self.progress))),
            stop: stop_flag(),
        };
        oxblk::rebase::run(rebase, self.helpers).await.map_err(|failure| self.failed(&failure))
    }

    fn failed(&self, failure: &RebaseError) -> Exit {
        self.context.program.error(failure);
        if failure.stage == RebaseStage::Stopped { Exit::INTERRUPTED } else { Exit(1) }
    }

    fn check_change(&self) -> Step {
        let node = self.disk.node().map_err(|error| self.context.error(&error))?;
        if self.arguments.backing.is_some() && self.arguments.backing_format.is_none() {
            return Err(self.cannot_change("backing format must be specified"));
        }
        if node.skip_filters().driver().backing().is_none() {
            return Err(self.cannot_change(&strerror(Errno::OPNOTSUPP)));
        }
        Ok(())
    }

    async fn change(&self) -> Step {
        self.check_change()?;
        let (name, format) = (&self.arguments.backing, &self.arguments.backing_format);
        let changed = self.disk.change_backing_file(name.as_deref(), format.as_deref()).await;
        changed.map_err(|error| match error.kind() {
            ErrorKind::NoSpace => self.cannot_change("No space left in the file header"),
            _ => self.cannot_change(&strerror(error.raw_errno())),
        })
    }

    fn cannot_change(&self, why: &str) -> Exit {
        // The C library prints `(null)` for a missing name.
        let none = if self.arguments.backing_given { "" } else { "(null)" };
        let name = self.arguments.backing.as_deref().unwrap_or(none);
        self.context.failed(format_args!("Could not change the backing file to '{name}': {why}"))
    }
}

/// Resolves the backing file name `name` relative to the image of a node.
fn path_from(node: &Node, name: &str) -> String {
    node.filename().map_or_else(|| name.to_owned(), |base| relative_to(&base, name))
}

/// Passes the progress of the rebase to [`Progress`].
struct ProgressObserver(Arc<Progress>);

impl Observer for ProgressObserver {
    fn progress(&self, done: u64, total: u64) {
        self.0.set(done, total);
    }
}
