//! `aio_read`, `aio_write` and `aio_flush`: requests that run while further commands run.

use oxblk_core::{Backend, Error, WriteFlags, ZeroFlags, strerror};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Call;
use super::read::{Shown, total};
use super::write::DEFAULT_PATTERN;
use crate::getopt::{Opt, short};
use crate::io::Outcome;
use crate::io::numbers::{bytes, pattern};
use crate::io::report::Timer;
use crate::io::session::Session;
use crate::program::out;

const READ: &[Opt] = &[
    short('C', false),
    short('P', true),
    short('i', false),
    short('q', false),
    short('r', false),
    short('v', false),
];

const WRITE: &[Opt] = &[
    short('C', false),
    short('f', false),
    short('i', false),
    short('P', true),
    short('q', false),
    short('r', false),
    short('u', false),
    short('z', false),
];

/// `aio_read`.
pub(in crate::io) async fn read(session: &Session, call: Call<'_>) -> Outcome {
    let mut shown = Shown::default();
    let mut invalid = false;
    let operands = call.parse(READ, |found| {
        match found.id {
            // Do not parse the arguments after it.
            'i' => {
                invalid = true;
                return None;
            }
            'C' => shown.for_machines = true,
            'P' => shown.pattern = Some(pattern(&found.value)?),
            'q' => shown.quiet = true,
            'v' => shown.dump = true,
            _ => {}
        }
        Some(())
    });
    if invalid {
        out(format_args!("injecting invalid read request\n"));
        return Outcome::Done;
    }
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, lengths @ ..] = operands.as_slice() else { return call.misused() };
    if lengths.is_empty() {
        return call.misused();
    }
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    let Some(len) = total(lengths) else { return Outcome::Failed };
    let Some(open) = session.current() else { return Outcome::Failed };
    let buf = IoBufMut::filled(usize::try_from(len).unwrap_or(usize::MAX), 0xab);
    let timer = Timer::start();
    session
        .start(async move {
            match open.backend.read(offset, buf).await {
                Ok(data) => {
                    shown.show(&data, offset, timer);
                }
                Err(error) => failed("readv", &error),
            }
        })
        .await;
    Outcome::Done
}

/// The options of `aio_write`.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each letter")]
struct Options {
    for_machines: bool,
    fua: bool,
    pattern: Option<u8>,
    quiet: bool,
    unmap: bool,
    zeroes: bool,
}

/// `aio_write`.
pub(in crate::io) async fn write(session: &Session, call: Call<'_>) -> Outcome {
    let mut options = Options::default();
    let mut invalid = false;
    let operands = call.parse(WRITE, |found| {
        match found.id {
            'C' => options.for_machines = true,
            'f' => options.fua = true,
            'i' => {
                invalid = true;
                return None;
            }
            'P' => options.pattern = Some(pattern(&found.value)?),
            'q' => options.quiet = true,
            'u' => options.unmap = true,
            'z' => options.zeroes = true,
            _ => {}
        }
        Some(())
    });
    if invalid {
        out(format_args!("injecting invalid write request\n"));
        return Outcome::Done;
    }
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, lengths @ ..] = operands.as_slice() else { return call.misused() };
    if lengths.is_empty() {
        return call.misused();
    }
    if options.zeroes && lengths.len() > 1 {
        out(format_args!("-z supports only a single length parameter\n"));
        return Outcome::Failed;
    }
    if options.unmap && !options.zeroes {
        out(format_args!("-u requires -z to be specified\n"));
        return Outcome::Failed;
    }
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    // Zeroes need no buffer, so their length is not limited by `MAX_REQUEST`.
    let len = match lengths {
        [length] if options.zeroes => bytes(length),
        lengths => total(lengths),
    };
    let Some(len) = len else { return Outcome::Failed };
    let Some(open) = session.current() else { return Outcome::Failed };
    let timer = Timer::start();
    let request = prepare(options, len);
    session
        .start(async move {
            match send(&open.backend, offset, len, request, options).await {
                Ok(()) if options.quiet => {}
                Ok(()) => timer.report("wrote", offset, len, options.for_machines),
                Err(error) => failed("aio_write", &error),
            }
        })
        .await;
    Outcome::Done
}

/// The data to write; `None` for zeroes.
fn prepare(options: Options, len: u64) -> Option<IoBuf> {
    if options.zeroes {
        return None;
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    Some(IoBufMut::filled(len, options.pattern.unwrap_or(DEFAULT_PATTERN)).freeze())
}

async fn send(
    backend: &Backend,
    offset: u64,
    len: u64,
    data: Option<IoBuf>,
    options: Options,
) -> Result<(), Error> {
    match data {
        Some(data) => {
            let mut flags = WriteFlags::empty();
            flags.set(WriteFlags::FUA, options.fua);
            backend.write(offset, data, flags).await
        }
        None => {
            let mut flags = ZeroFlags::empty();
            flags.set(ZeroFlags::FUA, options.fua);
            flags.set(ZeroFlags::MAY_UNMAP, options.unmap);
            backend.write_zeroes(offset, len, flags).await
        }
    }
}

fn failed(verb: &str, error: &Error) {
    out(format_args!("{verb} failed: {}\n", strerror(error.raw_errno())));
}

/// `aio_flush`.
pub(in crate::io) async fn flush(session: &Session, _call: Call<'_>) -> Outcome {
    session.settle().await;
    Outcome::Done
}
