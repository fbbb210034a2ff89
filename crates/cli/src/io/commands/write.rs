//! `write`, `writev`, `discard`, `flush` and `truncate`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use oxblk_core::{Preallocation, WriteFlags, ZeroFlags, names, strerror};
use oxblk_ring::{IoBuf, IoBufMut};

use super::Call;
use super::read::{SECTOR, length, total};
use crate::getopt::{Opt, short};
use crate::io::Outcome;
use crate::io::data::repeating;
use crate::io::numbers::{MAX_REQUEST, bytes, bytes_named, pattern};
use crate::io::report::Timer;
use crate::io::session::Session;
use crate::program::{err, out};

const WRITE: &[Opt] = &[
    short('b', false),
    short('c', false),
    short('C', false),
    short('f', false),
    short('n', false),
    short('p', false),
    short('P', true),
    short('q', false),
    short('r', false),
    short('s', true),
    short('u', false),
    short('z', false),
];

const WRITEV: &[Opt] =
    &[short('C', false), short('f', false), short('q', false), short('r', false), short('P', true)];

const DISCARD: &[Opt] = &[short('C', false), short('q', false)];

/// The byte that is written if `-P` is not given.
pub(super) const DEFAULT_PATTERN: u8 = 0xcd;

/// The options of `write`.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each letter")]
struct Options {
    vm_state: bool,
    compressed: bool,
    for_machines: bool,
    fua: bool,
    no_fallback: bool,
    pattern: Option<u8>,
    quiet: bool,
    source: Option<String>,
    unmap: bool,
    zeroes: bool,
}

impl Options {
    /// The message about the first pair of options that exclude each other.
    fn clash(&self) -> Option<&'static str> {
        let contents = [self.zeroes, self.pattern.is_some(), self.source.is_some()];
        if self.vm_state && self.zeroes {
            Some("-b and -z cannot be specified at the same time")
        } else if self.fua && (self.vm_state || self.compressed) {
            Some("-f and -b or -c cannot be specified at the same time")
        } else if self.no_fallback && !self.zeroes {
            Some("-n requires -z to be specified")
        } else if self.unmap && !self.zeroes {
            Some("-u requires -z to be specified")
        } else if contents.iter().filter(|set| **set).count() > 1 {
            Some("Only one of -z, -P, and -s can be specified at the same time")
        } else {
            None
        }
    }
}

/// `write`.
pub(in crate::io) async fn write(session: &Session, call: Call<'_>) -> Outcome {
    let mut options = Options::default();
    let operands = call.parse(WRITE, |found| {
        match found.id {
            'b' => options.vm_state = true,
            'c' => options.compressed = true,
            'C' => options.for_machines = true,
            'f' => options.fua = true,
            'n' => options.no_fallback = true,
            'P' => options.pattern = Some(pattern(&found.value)?),
            'q' => options.quiet = true,
            's' => options.source = Some(found.value),
            'u' => options.unmap = true,
            'z' => options.zeroes = true,
            _ => {}
        }
        Some(())
    });
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, count] = operands.as_slice() else { return call.misused() };
    if let Some(clash) = options.clash() {
        out(format_args!("{clash}\n"));
        return Outcome::Failed;
    }
    // Only the first invalid number is reported.
    let Some((offset, len)) = bytes(offset).and_then(|offset| Some((offset, bytes(count)?))) else {
        return Outcome::Failed;
    };
    if len > MAX_REQUEST && !options.no_fallback {
        out(format_args!("length cannot exceed {MAX_REQUEST} without -n, given {count}\n"));
        return Outcome::Failed;
    }
    if options.vm_state || options.compressed {
        for (number, what) in [(offset, "offset"), (len, "count")] {
            if number % SECTOR != 0 {
                out(format_args!("{number} is not a sector-aligned value for '{what}'\n"));
                return Outcome::Failed;
            }
        }
    }
    carry_out(session, &options, offset, len).await
}

async fn carry_out(session: &Session, options: &Options, offset: u64, len: u64) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let data = if options.zeroes {
        IoBuf::from(Vec::new())
    } else {
        match contents(options, len) {
            Some(data) => data,
            None => return Outcome::Failed,
        }
    };
    let timer = Timer::start();
    let outcome = if options.vm_state {
        open.backend.save_vm_state(offset, data).await.map_err(|e| e.raw_errno())
    } else if options.zeroes {
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::FUA, options.fua);
        flags.set(ZeroFlags::MAY_UNMAP, options.unmap);
        flags.set(ZeroFlags::NO_FALLBACK, options.no_fallback);
        open.backend.write_zeroes(offset, len, flags).await.map_err(|e| e.raw_errno())
    } else {
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::FUA, options.fua);
        flags.set(WriteFlags::COMPRESSED, options.compressed);
        open.backend.write(offset, data, flags).await.map_err(|e| e.raw_errno())
    };
    if let Err(errno) = outcome {
        out(format_args!("write failed: {}\n", strerror(errno)));
        return Outcome::Failed;
    }
    if !options.quiet {
        timer.report("wrote", offset, len, options.for_machines);
    }
    Outcome::Done
}

/// The bytes to write: a pattern, or the contents of a file.
fn contents(options: &Options, len: u64) -> Option<IoBuf> {
    let len = usize::try_from(len).ok()?;
    let Some(path) = &options.source else {
        let byte = options.pattern.unwrap_or(DEFAULT_PATTERN);
        return Some(IoBufMut::filled(len, byte).freeze());
    };
    match read_start(&names::to_path(path), len) {
        Ok(bytes) if bytes.is_empty() => {
            err(format_args!("{path}: file is empty\n"));
            None
        }
        Ok(bytes) => Some(repeating(&bytes, len)),
        Err(error) => {
            let error = oxblk_core::Error::from(error);
            err(format_args!("{path}: {}\n", strerror(error.raw_errno())));
            None
        }
    }
}

/// Reads at most the first `len` bytes of a file, since a device or a pipe may have no end.
fn read_start(path: &Path, len: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let len = u64::try_from(len).unwrap_or(u64::MAX);
    File::open(path)?.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// `writev`.
pub(in crate::io) async fn writev(session: &Session, call: Call<'_>) -> Outcome {
    let (mut for_machines, mut quiet) = (false, false);
    let mut flags = WriteFlags::empty();
    let mut byte = DEFAULT_PATTERN;
    let operands = call.parse(WRITEV, |found| {
        match found.id {
            'C' => for_machines = true,
            'f' => flags |= WriteFlags::FUA,
            'P' => byte = pattern(&found.value)?,
            'q' => quiet = true,
            _ => {}
        }
        Some(())
    });
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, lengths @ ..] = operands.as_slice() else { return call.misused() };
    if lengths.is_empty() {
        return call.misused();
    }
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    let Some(len) = total(lengths) else { return Outcome::Failed };
    let Some(open) = session.current() else { return Outcome::Failed };
    let data = IoBufMut::filled(usize::try_from(len).unwrap_or(usize::MAX), byte).freeze();
    let timer = Timer::start();
    if let Err(error) = open.backend.write(offset, data, flags).await {
        out(format_args!("writev failed: {}\n", strerror(error.raw_errno())));
        return Outcome::Failed;
    }
    if !quiet {
        timer.report("wrote", offset, len, for_machines);
    }
    Outcome::Done
}

/// `discard`.
pub(in crate::io) async fn discard(session: &Session, call: Call<'_>) -> Outcome {
    let (mut for_machines, mut quiet) = (false, false);
    let operands = call.parse(DISCARD, |found| {
        match found.id {
            'C' => for_machines = true,
            _ => quiet = true,
        }
        Some(())
    });
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, count] = operands.as_slice() else { return call.misused() };
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    let Some(len) = length(count) else { return Outcome::Failed };
    let Some(open) = session.current() else { return Outcome::Failed };
    let timer = Timer::start();
    if let Err(error) = open.backend.discard(offset, len).await {
        out(format_args!("discard failed: {}\n", strerror(error.raw_errno())));
        return Outcome::Failed;
    }
    if !quiet {
        timer.report("discard", offset, len, for_machines);
    }
    Outcome::Done
}

/// `flush`.
pub(in crate::io) async fn flush(session: &Session, _call: Call<'_>) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    match open.backend.flush().await {
        Ok(()) => Outcome::Done,
        Err(_) => Outcome::Failed,
    }
}

/// `truncate`.
pub(in crate::io) async fn truncate(session: &Session, call: Call<'_>) -> Outcome {
    let mut preallocation = Preallocation::Off;
    let operands = call.parse(&[short('m', true)], |found| {
        match Preallocation::parse(&found.value) {
            Some(mode) => preallocation = mode,
            None => {
                let message = format_args!("Invalid preallocation mode '{}'", found.value);
                session.program.error(message);
                return None;
            }
        }
        Some(())
    });
    let Some(operands) = operands else { return Outcome::Failed };
    // Words after the size are ignored, as in QEMU.
    let [size, ..] = operands.as_slice() else { return call.misused() };
    // QEMU's message always names the first argument of the command.
    let named = call.arguments.first().copied().unwrap_or(size);
    let Some(size) = bytes_named(size, named) else { return Outcome::Failed };
    let Some(open) = session.current() else { return Outcome::Failed };
    match open.backend.resize(size, preallocation).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            session.program.report(&error);
            Outcome::Failed
        }
    }
}
