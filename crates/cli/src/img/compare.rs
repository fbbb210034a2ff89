//! `img compare`: compares the contents of two images. [`oxblk::compare`] does the work.
//!
//! If one image is larger, the rest of that image is compared with zeroes. In strict mode (`-s`), images of different sizes
//! differ.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk::compare::{Compare, CompareError, CompareStage, Difference, compare};
use oxblk::{Cache, in_sectors, qemu_json};
use oxblk_core::{Backend, strerror};
use oxblk_ring::IoThread;
use serde_json::json;

use super::{Context, Exit, Step, graph, threads};
use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::{Alias, Value, both, long};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading};
use crate::program::out;
use crate::signals::stop_flag;
use crate::text::progress::{Progress, step};

// Exit codes, the same as those of `qemu-img compare`.
const DIFFERENT: u8 = 1;
const CANNOT_OPEN: u8 = 2;
const NO_STATUS: u8 = 3;
const NO_READ: u8 = 4;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::object().refused_with(CANNOT_OPEN),
    shared::cache('T', |a| &mut a.cache_name),
    Flag::switch(
        long("image-opts"),
        "both names are lists of options, for example driver=qcow2,file.filename=disk.qcow2",
        |a| &mut a.image_options,
    ),
    Flag::text(
        both('f', "a-format").aliases(&[Alias::Word("left-format")]),
        Value::FORMAT,
        "format of the first image; without it, the format is probed",
        |a| &mut a.formats[0],
    ),
    Flag::text(
        both('F', "b-format").aliases(&[Alias::Word("right-format")]),
        Value::FORMAT,
        "format of the second image; without it, the format is probed",
        |a| &mut a.formats[1],
    ),
    Flag::switch(both('U', "force-share"), "allow other programs to write to the images", |a| {
        &mut a.share
    }),
    Flag::switch(both('s', "strict"), "also compare the sizes and the allocation", |a| {
        &mut a.strict
    }),
    shared::progress(|a| &mut a.progress),
    shared::output_in_full(|a, text| shared::set_json(&mut a.json, &text)),
    shared::threads(|a, text| threads::set(&mut a.threads, &text)),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img compare",
    about: "compare the contents of two images",
    usage: "[OPTIONS] FILENAME1 FILENAME2",
    operands: &[Value::file("FILENAME1"), Value::file("FILENAME2")],
    flags: &FLAGS,
    notes: &[Note::Text(
        "If one image is larger, the rest of that image is compared with zeroes. With --image-opts, both names are \
         lists of options. With --output json, the result is an object with the keys identical, and, if the images \
         differ, reason (content, block-status or size) and offset.",
    )],
    exit_codes: &[
        (0, "the contents are the same"),
        (DIFFERENT, "the contents are different"),
        (CANNOT_OPEN, "an image cannot be opened"),
        (NO_STATUS, "the allocation of an image cannot be determined"),
        (NO_READ, "an image cannot be read"),
        (130, "stopped by a signal"),
    ],
    examples: &[Example {
        about: "compare a copy with its source",
        arguments: "-f raw -F qcow2 disk.raw disk.qcow2",
    }],
};

struct Arguments {
    quiet: bool,
    progress: bool,
    json: bool,
    formats: [Option<String>; 2],
    image_options: bool,
    strict: bool,
    cache_name: Option<String>,
    cache: Cache,
    share: bool,
    threads: usize,
    filenames: [String; 2],
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    let helpers = threads::helpers(context, arguments.threads);
    let progress =
        Progress::start(arguments.progress && !arguments.quiet && !arguments.json, step::WIDE);
    let outcome = context
        .run_to_end(compare_images(context, &arguments, helpers.threads(), &progress))
        .unwrap_or(Err(Exit(2)));
    helpers.join();
    progress.end();
    outcome
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments {
        quiet: false,
        progress: false,
        json: false,
        formats: [None, None],
        image_options: false,
        strict: false,
        cache_name: None,
        cache: Cache::Writeback,
        share: false,
        threads: threads::default(),
        filenames: [String::new(), String::new()],
    };
    let operands = context.parse(FLAGS, words, &mut read)?;
    read.filenames =
        operands.try_into().map_err(|_| context.misused("Expecting two image file names"))?;
    let cache = context.cache("source cache", read.cache_name.as_deref());
    read.cache = cache.map_err(|_| Exit(CANNOT_OPEN))?;
    Ok(read)
}

async fn compare_images(
    context: &Context,
    arguments: &Arguments,
    helpers: &[IoThread],
    progress: &Arc<Progress>,
) -> Step {
    let graph = graph();
    let mut disks = Vec::new();
    let mut outcome = Ok(());
    for (name, format) in arguments.filenames.iter().zip(&arguments.formats) {
        let image = ImageName::file(name, format.as_deref()).options_if(arguments.image_options);
        let options = reading().cache(arguments.cache).force_share(arguments.share);
        match image.open_or_report(&context.program, &graph, options).await {
            Ok(disk) => disks.push(disk),
            Err(_) => {
                outcome = Err(Exit(CANNOT_OPEN));
                break;
            }
        }
    }
    if let [first, second] = disks.as_slice() {
        let run =
            Run { context, arguments, helpers, progress: Arc::clone(progress), stop: stop_flag() };
        outcome = run.compare(first, second).await;
    }
    for disk in disks {
        // The images were opened read-only, so an error of the close is ignored.
        drop(disk.close().await);
    }
    outcome
}

struct Run<'a> {
    context: &'a Context,
    arguments: &'a Arguments,
    helpers: &'a [IoThread],
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
}

impl Run<'_> {
    async fn compare(&self, first: &Backend, second: &Backend) -> Step {
        let sizes = [first.size(), second.size()];
        let [common, total] = [sizes[0].min(sizes[1]), sizes[0].max(sizes[1])];
        // Disks consist of whole sectors. If a file ends inside its last sector, the rest of that sector reads as
        // zeroes.
        let common_sectors = in_sectors(common).min(total);
        let differ = in_sectors(common) != in_sectors(total);
        if self.arguments.strict && differ {
            let text = format_args!("Strict mode: Image size mismatch!");
            return Err(self.differ(text, "size", None));
        }
        let disks = (first.clone(), Some(second.clone()));
        self.part(disks, 0..common, total, 0).await?;
        let index = usize::from(sizes[0] < sizes[1]);
        let longer = if index == 0 { first } else { second };
        let alone = || (longer.clone(), None);
        self.part(alone(), common..common_sectors, total, index).await?;
        if differ {
            self.print(format_args!("Warning: Image size mismatch!"));
            self.part(alone(), common_sectors..total, total, index).await?;
        }
        self.print(format_args!("Images are identical."));
        self.print_json(&json!({ "identical": true }));
        Ok(())
    }

    fn print(&self, message: std::fmt::Arguments<'_>) {
        if !self.arguments.quiet && !self.arguments.json {
            out(format_args!("{message}\n"));
        }
    }

    fn print_json(&self, result: &serde_json::Value) {
        if self.arguments.json {
            out(format_args!("{}\n", qemu_json::pretty(result)));
        }
    }

    /// Prints that the images differ, with the reason and the offset of the difference.
    fn differ(&self, message: std::fmt::Arguments<'_>, reason: &str, offset: Option<u64>) -> Exit {
        self.print(message);
        let mut result = json!({ "identical": false, "reason": reason });
        if let Some(offset) = offset {
            result["offset"] = offset.into();
        }
        self.print_json(&result);
        Exit(DIFFERENT)
    }

    /// A callback that shows the progress within a part of the disk that begins at `start`.
    fn counter(&self, start: u64, total: u64) -> Arc<dyn Fn(u64) + Send + Sync> {
        let progress = Arc::clone(&self.progress);
        Arc::new(move |done| progress.set(start.saturating_add(done), total))
    }

    /// Compares a range of two disks, or of one disk with zeroes. `index` is the index of the first disk.
    async fn part(
        &self,
        disks: (Backend, Option<Backend>),
        range: std::ops::Range<u64>,
        total: u64,
        index: usize,
    ) -> Step {
        let job = Compare {
            disks,
            from: range.start,
            to: range.end,
            strict: self.arguments.strict,
            parallel: 8,
            progress: self.counter(range.start, total),
            stop: Arc::clone(&self.stop),
        };
        match compare(job, self.helpers).await {
            Ok(None) => Ok(()),
            Ok(Some(Difference::Content(offset))) => {
                let text = format_args!("Content mismatch at offset {offset}!");
                Err(self.differ(text, "content", Some(offset)))
            }
            Ok(Some(Difference::Status(offset))) => {
                let text = format_args!("Strict mode: Offset {offset} block status mismatch!");
                Err(self.differ(text, "block-status", Some(offset)))
            }
            Err(failure) => Err(self.failure(&failure, index)),
        }
    }

    fn failure(&self, failure: &CompareError, index: usize) -> Exit {
        let CompareError { stage, disk, offset, error } = failure;
        let name = self.arguments.filenames.get(disk + index).map_or("", String::as_str);
        let report = |message: std::fmt::Arguments<'_>| self.context.program.error(message);
        match stage {
            CompareStage::Status => {
                report(format_args!("Sector allocation test failed for {name}"));
                Exit(NO_STATUS)
            }
            CompareStage::Reading => {
                report(format_args!(
                    "Error while reading offset {offset} of {name}: {}",
                    strerror(error.raw_errno())
                ));
                Exit(NO_READ)
            }
            CompareStage::Stopped => {
                report(format_args!("Interrupted"));
                Exit::INTERRUPTED
            }
        }
    }
}
