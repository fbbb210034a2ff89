//! `img bench`: a simple sequential benchmark.
//!
//! The command runs as many tasks ("workers") as requests may be in flight (`--depth`), distributed over the I/O threads.
//! A worker sends one request at a time, and takes the next offset when this request has completed. Without `--threads`,
//! one thread sends all writes of 32 KiB or more.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use oxblk::Cache;
use oxblk::workers::Workers;
use oxblk_core::{Backend, Error, ErrorKind, WriteFlags, strerror};
use oxblk_ring::{Aio, IoBufMut, IoThread, TaskGone};

use super::{Context, Step, graph, threads};
use crate::flags::page::{Example, Note, Page};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, both, long};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, writing};
use crate::program::{flush_out, out};
use crate::text::number;

/// Maximum value of the request count, the queue depth, the buffer size, the step size and the flush interval.
const MAX: u64 = i32::MAX as u64;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::format(|a| &mut a.format),
    shared::image_opts(|a| &mut a.image_options),
    Flag::value(both('t', "cache"), Value::CACHE.default("writeback"), "cache mode", |a, name| {
        a.cache = Cache::parse(&name).ok_or_else(|| Refusal::failed("Invalid cache mode"))?;
        Ok(())
    }),
    Flag::value(
        both('c', "count"),
        Value::text("N").default("75000"),
        "number of requests",
        |a, text| {
            a.count = number::count("request count", &text, 1, MAX)?;
            Ok(())
        },
    ),
    Flag::value(
        both('d', "depth"),
        Value::text("N").default("64"),
        "number of requests in flight",
        |a, text| {
            a.depth = number::count("queue depth", &text, 1, MAX)?;
            Ok(())
        },
    ),
    Flag::value(
        both('o', "offset"),
        Value::size("N").default("0"),
        "offset of the first request",
        |a, text| {
            a.offset = number::bytes("offset", &text)?;
            Ok(())
        },
    ),
    Flag::value(
        both('s', "buffer-size"),
        Value::size("SIZE").default("4k"),
        "length of a request",
        |a, text| {
            a.size = number::sized("buffer size", &text, 1, MAX)?;
            Ok(())
        },
    ),
    Flag::value(
        both('S', "step-size"),
        Value::size("SIZE").default("the buffer size"),
        "distance between the offsets of two requests",
        |a, text| {
            // 0 means the buffer size, as if `-S` was not given.
            let step = number::sized("step size", &text, 0, MAX)?;
            a.step = Some(step).filter(|step| *step > 0);
            Ok(())
        },
    ),
    Flag::value(
        both('i', "aio"),
        Value::AIO.default("io_uring"),
        "how the host executes requests",
        |a, name| {
            let unknown = || Refusal::failed(format!("Invalid aio option: {name}"));
            a.aio = Some(Aio::parse(&name).ok_or_else(unknown)?);
            Ok(())
        },
    ),
    Flag::switch_with(both('n', "native"), "the same as -i native", |a| {
        a.aio = Some(Aio::Native);
        Ok(())
    }),
    Flag::switch(both('w', "write"), "write; without it, the requests are reads", |a| &mut a.write),
    Flag::value(long("pattern"), Value::text("BYTE").default("0"), "byte to write", |a, text| {
        let pattern = number::count("pattern byte", &text, 0, 255)?;
        a.pattern = u8::try_from(pattern).unwrap_or_default();
        Ok(())
    }),
    Flag::value(
        long("flush-interval"),
        Value::text("N"),
        "flush after every N requests",
        |a, text| {
            a.flush_interval = number::count("flush interval", &text, 0, MAX)?;
            Ok(())
        },
    ),
    Flag::switch_with(
        long("no-drain"),
        "do not wait for the requests in flight before a flush",
        |a| {
            a.drain = false;
            Ok(())
        },
    ),
    shared::force_share(|a| &mut a.share),
    Flag::ignored(both('q', "quiet").in_full().common(), None),
    shared::threads(|a, text| threads::set(a.threads.get_or_insert_default(), &text)),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img bench",
    about: "measure the speed of reads or writes of an image",
    usage: "[OPTIONS] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[Note::Text("With -w and requests of 32k or more, the default is one I/O thread.")],
    exit_codes: shared::EXIT_CODES,
    examples: &[Example {
        about: "read 4 KiB 100000 times, 32 requests at a time",
        arguments: "-f qcow2 -c 100000 -d 32 disk.qcow2",
    }],
};

#[derive(Debug, Clone)]
struct Arguments {
    format: Option<String>,
    image_options: bool,
    cache: Cache,
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: Option<u64>,
    aio: Option<Aio>,
    write: bool,
    pattern: u8,
    flush_interval: u64,
    drain: bool,
    share: bool,
    threads: Option<usize>,
    filename: String,
}

/// By default, one thread sends all writes of at least this size. The kernel executes buffered writes to one file one at a
/// time (inode lock), so several threads would mostly wait.
const LONG_WRITE: u64 = 32 << 10;

impl Arguments {
    fn threads(&self) -> usize {
        let usual = if self.write && self.size >= LONG_WRITE { 1 } else { threads::default() };
        self.threads.unwrap_or(usual)
    }
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    let helpers = threads::helpers(context, arguments.threads());
    let outcome = context.block_on(async {
        let image = ImageName::file(&arguments.filename, arguments.format.as_deref())
            .options_if(arguments.image_options);
        let mut options = writing()
            .read_only(!arguments.write)
            .cache(arguments.cache)
            .force_share(arguments.share);
        if let Some(aio) = arguments.aio {
            options = options.aio(aio);
        }
        let backend = image.open_or_report(&context.program, &graph(), options).await?;
        let outcome = bench(context, &arguments, &backend, helpers.threads()).await;
        let closed = backend.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    });
    helpers.join();
    outcome
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments {
        format: None,
        image_options: false,
        cache: Cache::Writeback,
        count: 75000,
        depth: 64,
        offset: 0,
        size: 4096,
        step: None,
        aio: None,
        write: false,
        pattern: 0,
        flush_interval: 0,
        drain: true,
        share: false,
        threads: None,
        filename: String::new(),
    };
    let operands = context.parse(FLAGS, words, &mut read)?;
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    read.filename.clone_from(filename);
    if !read.write && read.flush_interval != 0 {
        return Err(context.failed("--flush-interval is only available in write tests"));
    }
    if read.flush_interval != 0 && read.flush_interval < read.depth {
        return Err(context.failed("Flush interval can't be smaller than depth"));
    }
    Ok(read)
}

/// The requests of a run, shared by all workers.
struct Run {
    backend: Backend,
    image: u64,
    offset: u64,
    size: usize,
    step: u64,
    write: bool,
    pattern: u8,
    /// With `--no-drain`, a worker flushes before each request whose index is a multiple of this number, except the first
    /// request. The flush does not wait for earlier requests.
    flush_every: Option<u64>,
    /// The index of the next request, and the end of the current batch.
    next: AtomicU64,
    end: AtomicU64,
    failure: Mutex<Option<Error>>,
}

impl Run {
    fn take(&self) -> Option<u64> {
        let end = self.end.load(Relaxed);
        self.next.fetch_update(Relaxed, Relaxed, |next| (next < end).then_some(next + 1)).ok()
    }

    /// The offset of a request. Each offset is one step after the previous offset, and wraps around at the end of the
    /// image.
    fn place(&self, index: u64) -> u64 {
        if index == 0 {
            return self.offset;
        }
        let far = u128::from(self.offset) + u128::from(index) * u128::from(self.step);
        let wrapped = far.checked_rem(u128::from(self.image)).unwrap_or_default();
        u64::try_from(wrapped).unwrap_or_default()
    }

    /// Sends requests until the batch is complete. The first failure is stored and ends the batch.
    async fn work_until_failure(&self) {
        if let Err(error) = self.work().await {
            self.end.store(0, Relaxed);
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    async fn work(&self) -> Result<(), Error> {
        let mut buf = Some(IoBufMut::filled(self.size, self.pattern));
        let data = if self.write { buf.take().map(IoBufMut::freeze) } else { None };
        while let Some(index) = self.take() {
            if self.flush_every.is_some_and(|n| index > 0 && index.is_multiple_of(n)) {
                self.backend.flush().await?;
            }
            let place = self.place(index);
            match (&data, buf.take()) {
                (Some(data), _) => {
                    self.backend.write(place, data.clone(), WriteFlags::empty()).await?;
                }
                (None, Some(room)) => buf = Some(self.backend.read(place, room).await?),
                (None, None) => return Ok(()),
            }
        }
        Ok(())
    }
}

async fn bench(
    context: &Context,
    arguments: &Arguments,
    backend: &Backend,
    helpers: &[IoThread],
) -> Step {
    let step = arguments.step.unwrap_or(arguments.size);
    let kind = if arguments.write { "write" } else { "read" };
    out(format_args!(
        "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step size {step})\n",
        arguments.count, arguments.size, arguments.depth, arguments.offset
    ));
    if arguments.flush_interval != 0 {
        out(format_args!("Sending flush every {} requests\n", arguments.flush_interval));
    }
    flush_out();
    let interval = Some(arguments.flush_interval).filter(|interval| *interval != 0);
    let run = Arc::new(Run {
        backend: backend.clone(),
        image: backend.size(),
        offset: arguments.offset,
        size: usize::try_from(arguments.size).unwrap_or(usize::MAX),
        step,
        write: arguments.write,
        pattern: arguments.pattern,
        flush_every: interval.filter(|_| !arguments.drain),
        next: AtomicU64::new(0),
        end: AtomicU64::new(0),
        failure: Mutex::new(None),
    });
    let begin = Instant::now();
    let batch = interval.filter(|_| arguments.drain).unwrap_or(arguments.count);
    let mut outcome = Ok(());
    let mut end = 0;
    while end < arguments.count && outcome.is_ok() {
        if end > 0 {
            outcome = backend.flush().await;
        }
        end = end.saturating_add(batch).min(arguments.count);
        run.end.store(end, Relaxed);
        outcome = outcome.and(run_batch(&run, arguments.depth, helpers).await);
    }
    outcome.map_err(|error| {
        context.failed(format_args!("Failed request: {}", strerror(error.raw_errno())))
    })?;
    let took = begin.elapsed().as_secs_f64();
    out(format_args!("Run completed in {took:.3} seconds.\n"));
    Ok(())
}

/// Sends the requests of one batch from all threads. The first failure ends the batch.
async fn run_batch(run: &Arc<Run>, depth: u64, helpers: &[IoThread]) -> Result<(), Error> {
    let left = run.end.load(Relaxed).saturating_sub(run.next.load(Relaxed));
    let depth = usize::try_from(depth.min(left)).unwrap_or(usize::MAX);
    let work = |run: Arc<Run>| async move { run.work_until_failure().await };
    let cancel = |run: &Run| run.end.store(0, Relaxed);
    let workers = Workers { count: depth, in_place: None, helpers, stop: None };
    if let Err(TaskGone) = workers.run(run, work, cancel).await {
        return Err(Error::new(ErrorKind::Cancelled, "An I/O thread ended early"));
    }
    run.failure.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
}
