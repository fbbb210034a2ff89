//! The command line of `img convert`.

use super::super::create_options::append;
use super::super::source_snapshot::Wanted;
use super::super::{Context, Step, threads};
use crate::flags::page::{Example, Note, Page};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Alias, Value, both, long};
use crate::flags::{Flag, shared};
use crate::text::number;
use oxblk::Cache;

/// Maximum value of `-m`.
const MAX_PARALLEL: u64 = 16;
/// Maximum value of `-S`, in bytes.
const MAX_SPARSE: u64 = 16 << 20;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::object(),
    Flag::switch(
        long("image-opts").aliases(&[Alias::Word("source-image-opts")]),
        "the sources are lists of options, for example driver=qcow2,file.filename=disk.qcow2",
        |a| &mut a.source_options,
    ),
    Flag::text(
        both('f', "source-format"),
        Value::FORMAT,
        "format of the sources; without it, the format is probed",
        |a| &mut a.source_format,
    ),
    Flag::text(
        both('T', "source-cache"),
        Value::CACHE.default("writeback"),
        "cache mode of the sources",
        |a| &mut a.given.source_cache,
    ),
    Flag::value(
        both('l', "snapshot").aliases(&[Alias::FullWord("source-snapshot")]),
        Wanted::VALUE,
        Wanted::ABOUT,
        |a, text| {
            a.snapshot = Some(Wanted::parse(&text)?);
            Ok(())
        },
    ),
    Flag::value(
        both('S', "sparse-size"),
        Value::size("SIZE").default("4k"),
        "minimum length of a run of zeroes that becomes a hole; 0: no holes",
        |a, text| {
            a.sparse = sparse(&text)?;
            a.given.sparse = true;
            Ok(())
        },
    ),
    Flag::text(
        both('O', "output-format").aliases(&[Alias::FullWord("target-format")]),
        Value::FORMAT.default("raw"),
        "format of the target",
        |a| &mut a.target_format,
    ),
    Flag::value(
        both('o', "options").aliases(&[
            Alias::FullWord("target-options"),
            Alias::FullWord("target-format-options"),
        ]),
        shared::OPTIONS,
        "options of the target (key=value,...); '-o help' lists them",
        |a, list| Ok(append(&mut a.options, &list)?),
    ),
    Flag::text(
        both('t', "output-cache").aliases(&[Alias::FullWord("target-cache")]),
        Value::CACHE.default("unsafe"),
        "cache mode of the target",
        |a| &mut a.target_cache,
    ),
    Flag::text(
        both('B', "backing").aliases(&[Alias::Letter('b')]),
        Value::file("FILE"),
        "backing file of the target, with the contents of the source's backing file",
        |a| &mut a.backing,
    ),
    Flag::text(both('F', "backing-format"), Value::FORMAT, "format of the backing file", |a| {
        &mut a.backing_format
    }),
    Flag::switch(both('U', "force-share"), "allow other programs to write to the sources", |a| {
        &mut a.share
    }),
    Flag::switch(long("target-image-opts"), "the target is a list of options; needs -n", |a| {
        &mut a.target_options
    }),
    Flag::switch(long("salvage"), "treat data that cannot be read as zeroes", |a| &mut a.salvage),
    Flag::switch(long("target-is-zero"), "the existing target reads as zeroes; needs -n", |a| {
        &mut a.target_is_zero
    }),
    Flag::switch(long("bitmaps"), "copy persistent bitmaps", |a| &mut a.given.bitmaps),
    Flag::switch(
        long("skip-broken-bitmaps"),
        "skip broken bitmaps; without it, they are an error",
        |a| &mut a.given.skip_broken,
    ),
    shared::rate(|a, text| shared::set_rate(&mut a.rate, &text)),
    Flag::value(
        both('m', "parallel"),
        Value::text("N").default("8"),
        "number of requests in flight, from 1 to 16",
        |a, text| {
            let parallel = number::count("number of coroutines", &text, 1, MAX_PARALLEL)?;
            a.parallel = usize::try_from(parallel).unwrap_or(1);
            Ok(())
        },
    ),
    Flag::switch(both('W', "oob-writes"), "write in any order", |a| &mut a.out_of_order),
    Flag::switch(
        both('C', "copy-range-offloading"),
        "let the host copy the data where it can",
        |a| &mut a.offload,
    ),
    Flag::switch(both('p', "progress").in_full().common(), "show the progress", |a| {
        &mut a.progress
    }),
    Flag::switch(both('c', "compress").in_full(), "write compressed clusters", |a| &mut a.compress),
    Flag::switch_with(
        both('n', "no-create").in_full(),
        "write to an existing target instead of creating one",
        |a| {
            a.create = false;
            Ok(())
        },
    ),
    shared::threads(|a, text| threads::set(&mut a.threads, &text)),
    shared::untrusted(),
];

/// The description of the command.
pub(in crate::img) static PAGE: Page = Page {
    path: "img convert",
    about: "copy images, also to another format",
    usage: "[OPTIONS] SOURCE [SOURCE...] TARGET",
    operands: &[Value::file("SOURCE"), Value::file("TARGET")],
    flags: &FLAGS,
    notes: &[Note::Text("The contents of several sources follow one another in the target.")],
    exit_codes: shared::STOPPABLE_EXIT_CODES,
    examples: &[
        Example {
            about: "copy a raw disk into a qcow2 image and show the progress",
            arguments: "-p -f raw -O qcow2 disk.raw disk.qcow2",
        },
        Example {
            about: "make a compressed copy",
            arguments: "-c -O qcow2 disk.qcow2 small.qcow2",
        },
    ],
};

/// The parsed and checked command line.
#[derive(Debug)]
pub(super) struct Arguments {
    pub(super) quiet: bool,
    pub(super) progress: bool,
    pub(super) sources: Vec<String>,
    pub(super) source_format: Option<String>,
    pub(super) source_options: bool,
    pub(super) source_cache: Cache,
    pub(super) target: String,
    pub(super) target_format: Option<String>,
    pub(super) target_options: bool,
    pub(super) target_cache: Option<String>,
    pub(super) options: Option<String>,
    pub(super) compress: bool,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    pub(super) create: bool,
    pub(super) target_is_zero: bool,
    /// Length of the shortest run of zero bytes that becomes a hole. 0: the target gets no holes.
    pub(super) sparse: u64,
    pub(super) share: bool,
    pub(super) rate: Option<u64>,
    pub(super) parallel: usize,
    /// Writes may be in any order.
    pub(super) out_of_order: bool,
    pub(super) offload: bool,
    pub(super) salvage: bool,
    pub(super) threads: usize,
    /// `None`: bitmaps are not copied. `Some(true)`: broken bitmaps are skipped.
    pub(super) bitmaps: Option<bool>,
    /// The snapshot of the source to copy.
    pub(super) snapshot: Option<Wanted>,
    given: Given,
}

impl Arguments {
    /// The cache mode of the target. `None` if the name of the mode is unknown: opening the target then fails.
    pub(super) fn target_mode(&self) -> Option<Cache> {
        self.target_cache.as_deref().map_or(Some(Cache::Unsafe), Cache::parse)
    }

    /// The format of a new image.
    pub(super) fn new_format(&self) -> &str {
        self.target_format.as_deref().unwrap_or("raw")
    }
}

/// Values that are needed only while the command line is read.
#[derive(Debug, Default)]
struct Given {
    source_cache: Option<String>,
    /// `-S` was given.
    sparse: bool,
    bitmaps: bool,
    skip_broken: bool,
}

/// Parses and checks the command line.
pub(super) fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments {
        quiet: false,
        progress: false,
        sources: Vec::new(),
        source_format: None,
        source_options: false,
        source_cache: Cache::Writeback,
        target: String::new(),
        target_format: None,
        target_options: false,
        target_cache: None,
        options: None,
        compress: false,
        backing: None,
        backing_format: None,
        create: true,
        target_is_zero: false,
        sparse: 4096,
        share: false,
        rate: None,
        parallel: 8,
        out_of_order: false,
        offload: false,
        salvage: false,
        threads: threads::default(),
        bitmaps: None,
        snapshot: None,
        given: Given::default(),
    };
    read.sources = context.parse(FLAGS, words, &mut read)?;
    check(context, &mut read)?;
    Ok(read)
}

fn sparse(text: &str) -> Result<u64, Refusal> {
    let bytes = number::bytes("buffer size for sparse output", text)?;
    if bytes % 512 != 0 || bytes > MAX_SPARSE {
        return Err(Refusal::failed(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok(bytes)
}

/// Refuses options that cannot be combined. The order of the tests is QEMU's.
fn check(context: &Context, read: &mut Arguments) -> Step {
    let clash = |message: &str| Err(context.failed(message));
    if read.given.skip_broken && !read.given.bitmaps {
        return clash("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if read.offload && read.compress {
        return clash("Cannot enable copy offloading when -c is used");
    }
    if read.offload && read.given.sparse {
        return clash("Cannot enable copy offloading when -S is used");
    }
    if read.salvage && read.offload {
        return clash("Cannot use copy offloading in salvaging mode");
    }
    if read.target_options && read.create {
        return clash("--target-image-opts requires use of -n flag");
    }
    if read.options.is_some() && !read.create {
        return clash("-o has no effect when skipping image creation");
    }
    if read.target_is_zero && read.create {
        return clash("--target-is-zero requires use of -n flag");
    }
    let asks_for_help =
        read.options.as_deref().is_some_and(super::super::create_options::asks_for_help);
    match read.sources.pop() {
        Some(target) if asks_for_help || !read.sources.is_empty() => read.target = target,
        _ if asks_for_help => {}
        _ => return clash("Must specify image file name"),
    }
    read.source_cache = context.cache("source cache", read.given.source_cache.as_deref())?;
    if read.given.bitmaps {
        read.bitmaps = Some(read.given.skip_broken);
    }
    Ok(())
}
