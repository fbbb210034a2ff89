//! The command line of `img convert`.

use super::super::create_options::append;
use super::super::source_snapshot::Wanted;
use super::super::{Context, Step, objects, threads};
use crate::cache::CacheMode;
use crate::getopt::{Found, Opt, both, long};
use crate::text::number::MAX_OFFSET;

/// Maximum value of `-m`.
const MAX_PARALLEL: u64 = 16;
/// Maximum value of `-S`, in bytes.
const MAX_SPARSE: u64 = 16 << 20;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('q', "quiet", false),
    long('7', "object", true),
    long('1', "image-opts", false),
    long('1', "source-image-opts", false),
    both('f', "source-format", true),
    both('T', "source-cache", true),
    both('l', "snapshot", true),
    both('S', "sparse-size", true),
    both('O', "output-format", true),
    both('o', "options", true),
    both('t', "output-cache", true),
    both('B', "backing", true),
    both('F', "backing-format", true),
    both('U', "force-share", false),
    long('2', "target-image-opts", false),
    long('6', "salvage", false),
    long('3', "target-is-zero", false),
    long('4', "bitmaps", false),
    long('5', "skip-broken-bitmaps", false),
    both('r', "rate", true),
    both('m', "parallel", true),
    both('W', "oob-writes", false),
    both('C', "copy-range-offloading", false),
    both('p', "progress", false).in_full(),
    both('c', "compress", false).in_full(),
    both('n', "no-create", false).in_full(),
    long('8', "threads", true).in_full(),
    both('l', "snapshot", true).alias("source-snapshot"),
    both('O', "output-format", true).alias("target-format"),
    both('o', "options", true).alias("target-options"),
    both('o', "options", true).alias("target-format-options"),
    both('t', "output-cache", true).alias("target-cache"),
    both('B', "backing", true).letter('b'),
    both('r', "rate", true).alias("rate-limit"),
];

/// The parsed and checked command line.
#[derive(Debug)]
pub(super) struct Arguments {
    pub(super) quiet: bool,
    pub(super) progress: bool,
    pub(super) sources: Vec<String>,
    pub(super) source_format: Option<String>,
    pub(super) source_options: bool,
    pub(super) source_cache: CacheMode,
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
    /// Shortest run of zero bytes that becomes a hole; 0: the target gets no holes.
    pub(super) sparse: u64,
    pub(super) share: bool,
    pub(super) rate: Option<u64>,
    pub(super) parallel: usize,
    /// Writes need not be in the order of the disk.
    pub(super) out_of_order: bool,
    pub(super) offload: bool,
    pub(super) salvage: bool,
    pub(super) threads: usize,
    /// Whether bitmaps are copied; with `Some(true)`, broken bitmaps are skipped.
    pub(super) bitmaps: Option<bool>,
    /// The snapshot of the source to copy.
    pub(super) snapshot: Option<Wanted>,
}

impl Arguments {
    /// The cache mode of the target; `None` if its name is unknown, which is an error once the target is opened.
    pub(super) fn target_mode(&self) -> Option<CacheMode> {
        self.target_cache.as_deref().map_or(Some(CacheMode::UNSAFE), CacheMode::parse)
    }

    /// The format of a new image.
    pub(super) fn new_format(&self) -> &str {
        self.target_format.as_deref().unwrap_or("raw")
    }
}

/// Values that are needed only while the command line is read.
#[derive(Default)]
struct Raw {
    source_cache: Option<String>,
    target_format: Option<String>,
    sparse_set: bool,
    bitmaps: bool,
    skip_broken: bool,
}

/// Parses and checks the command line.
pub(super) fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut parser = context.parser(words, OPTIONS);
    let mut raw = Raw::default();
    let mut read = Arguments {
        quiet: false,
        progress: false,
        sources: Vec::new(),
        source_format: None,
        source_options: false,
        source_cache: CacheMode::WRITEBACK,
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
    };
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        set(context, &mut read, &mut raw, id, value)?;
    }
    read.sources = parser.operands();
    check(context, &mut read, raw)?;
    Ok(read)
}

fn set(context: &Context, read: &mut Arguments, raw: &mut Raw, id: char, value: String) -> Step {
    match id {
        'q' => read.quiet = true,
        'p' => read.progress = true,
        'f' => read.source_format = Some(value),
        '1' => read.source_options = true,
        'l' => read.snapshot = Some(Wanted::parse(context, &value)?),
        'T' => raw.source_cache = Some(value),
        'O' => raw.target_format = Some(value),
        '2' => read.target_options = true,
        'o' => append(&mut read.options, &value).map_err(|text| context.failed(text))?,
        'c' => read.compress = true,
        't' => read.target_cache = Some(value),
        'B' => read.backing = Some(value),
        'F' => read.backing_format = Some(value),
        'n' => read.create = false,
        '3' => read.target_is_zero = true,
        'S' => {
            read.sparse = sparse(context, &value)?;
            raw.sparse_set = true;
        }
        '4' => raw.bitmaps = true,
        '5' => raw.skip_broken = true,
        'U' => read.share = true,
        // A rate of 0 means no limit.
        'r' => {
            read.rate =
                Some(context.sized("rate limit", &value, 0, MAX_OFFSET)?).filter(|rate| *rate > 0);
        }
        'm' => {
            let parallel = context.count("number of coroutines", &value, 1, MAX_PARALLEL)?;
            read.parallel = usize::try_from(parallel).unwrap_or(1);
        }
        'C' => read.offload = true,
        '6' => read.salvage = true,
        '7' => objects::define(&value).map_err(|text| context.failed(text))?,
        '8' => read.threads = threads::parse(context, &value)?,
        // -W
        _ => read.out_of_order = true,
    }
    Ok(())
}

fn sparse(context: &Context, text: &str) -> Step<u64> {
    let bytes = context.bytes("buffer size for sparse output", text)?;
    if bytes % 512 != 0 || bytes > MAX_SPARSE {
        return Err(context.failed(format_args!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok(bytes)
}

/// Refuses options that exclude one another, in the order in which QEMU reports them.
fn check(context: &Context, read: &mut Arguments, raw: Raw) -> Step {
    let clash = |message: &str| Err(context.failed(message));
    if raw.skip_broken && !raw.bitmaps {
        return clash("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if read.offload && read.compress {
        return clash("Cannot enable copy offloading when -c is used");
    }
    if read.offload && raw.sparse_set {
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
    take_modes(context, read, &raw)?;
    let asks_for_help =
        read.options.as_deref().is_some_and(super::super::create_options::asks_for_help);
    match read.sources.pop() {
        Some(target) if asks_for_help || !read.sources.is_empty() => read.target = target,
        _ if asks_for_help => {}
        _ => return clash("Must specify image file name"),
    }
    read.target_format = raw.target_format;
    if raw.bitmaps {
        read.bitmaps = Some(raw.skip_broken);
    }
    Ok(())
}

fn take_modes(context: &Context, read: &mut Arguments, raw: &Raw) -> Step {
    if let Some(name) = &raw.source_cache {
        let unknown = || context.failed(format_args!("Invalid source cache option: {name}"));
        read.source_cache = CacheMode::parse(name).ok_or_else(unknown)?;
    }
    Ok(())
}
