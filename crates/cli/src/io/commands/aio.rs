//! `aio_read`, `aio_write` and `aio_flush`: requests that are in flight while the next commands run.

use oxblk_core::{Backend, Error, WriteFlags, ZeroFlags, strerror};
use oxblk_ring::{IoBuf, IoBufMut};

use super::read::{Shown, total};
use super::write::{DEFAULT_PATTERN, REGISTERED_ZEROES};
use super::{Call, letters};
use crate::flags::refusal::Refusal;
use crate::flags::spec::short;
use crate::flags::{Flag, Stored};
use crate::io::Outcome;
use crate::io::numbers::bytes;
use crate::io::report::Timer;
use crate::io::session::Session;
use crate::program::out;

/// The options of `aio_read`.
pub(in crate::io) const READ: &[Flag<Reading>] = &[
    letters::numbers_only(|a| &mut a.shown.for_machines),
    letters::expected(|a, text| {
        a.shown.pattern = Some(letters::pattern(&text)?);
        Ok(())
    }),
    invalid(|a| {
        a.invalid = true;
        Err(Refusal::printed())
    }),
    letters::quiet(|a| &mut a.shown.quiet),
    Flag::ignored(short('r'), None),
    letters::dump(|a| &mut a.shown.dump),
];

/// The options of `aio_write`.
pub(in crate::io) const WRITE: &[Flag<Writing>] = &[
    letters::numbers_only(|a| &mut a.for_machines),
    letters::fua(|a| &mut a.fua),
    invalid(|a| {
        a.invalid = true;
        Err(Refusal::printed())
    }),
    letters::written(|a, text| {
        a.pattern = Some(letters::pattern(&text)?);
        Ok(())
    }),
    letters::quiet(|a| &mut a.quiet),
    letters::registered(|a| &mut a.registered),
    letters::unmap(|a| &mut a.unmap),
    letters::zeroes(|a| &mut a.zeroes),
];

/// `-i`. The arguments after `-i` are not parsed: `store` sets a flag and ends the parsing.
const fn invalid<A>(store: fn(&mut A) -> Stored) -> Flag<A> {
    Flag::switch_with(short('i'), "count an invalid request, and execute nothing", store)
}

/// The options of one `aio_read`.
#[derive(Debug, Default)]
pub(in crate::io) struct Reading {
    shown: Shown,
    /// `-i` was given.
    invalid: bool,
}

/// `aio_read`.
pub(in crate::io) async fn read(session: &Session, call: Call<'_>) -> Outcome {
    let mut reading = Reading::default();
    let operands = call.parse(session, READ, &mut reading);
    let Reading { shown, invalid } = reading;
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

/// The options of one `aio_write`.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each letter")]
pub(in crate::io) struct Writing {
    for_machines: bool,
    fua: bool,
    pattern: Option<u8>,
    quiet: bool,
    registered: bool,
    unmap: bool,
    zeroes: bool,
    /// `-i` was given.
    invalid: bool,
}

/// `aio_write`.
pub(in crate::io) async fn write(session: &Session, call: Call<'_>) -> Outcome {
    let mut options = Writing::default();
    let operands = call.parse(session, WRITE, &mut options);
    if options.invalid {
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
    if options.zeroes && options.registered {
        out(format_args!("{REGISTERED_ZEROES}\n"));
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
fn prepare(options: Writing, len: u64) -> Option<IoBuf> {
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
    options: Writing,
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
    session.wait_for_requests().await;
    Outcome::Done
}
