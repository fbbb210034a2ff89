//! The commands `write`, `writev`, `discard`, `flush` and `truncate`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use oxblk_core::{
    Backend, Error, Perm, Permissions, Preallocation, WriteFlags, ZeroFlags, names, strerror,
};
use oxblk_ring::{IoBuf, IoBufMut};

use super::read::{SECTOR, length, total};
use super::{Call, letters};
use crate::flags::Flag;
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, short};
use crate::io::Outcome;
use crate::io::data::repeating;
use crate::io::numbers::{MAX_REQUEST, bytes, bytes_named};
use crate::io::report::Timer;
use crate::io::session::Session;
use crate::program::{err, out};

/// The options of `write`.
pub(in crate::io) const WRITE: &[Flag<Options>] = &[
    Flag::switch(short('b'), "write to the VM state", |a| &mut a.vm_state),
    Flag::switch(short('c'), "write compressed clusters", |a| &mut a.compressed),
    letters::numbers_only(|a| &mut a.for_machines),
    letters::fua(|a| &mut a.fua),
    Flag::switch(short('n'), "with -z, fail if the zeroes would have to be written as data", |a| {
        &mut a.no_fallback
    }),
    Flag::ignored(short('p'), None),
    letters::written(|a, text| {
        a.pattern = Some(letters::pattern(&text)?);
        Ok(())
    }),
    letters::quiet(|a| &mut a.quiet),
    letters::registered(|a| &mut a.registered),
    Flag::text(short('s'), Value::file("FILE"), "file whose bytes are written repeatedly", |a| {
        &mut a.source
    }),
    letters::unmap(|a| &mut a.unmap),
    letters::zeroes(|a| &mut a.zeroes),
];

/// The options of `writev`.
pub(in crate::io) const WRITEV: &[Flag<Options>] = &[
    letters::numbers_only(|a| &mut a.for_machines),
    letters::fua(|a| &mut a.fua),
    letters::quiet(|a| &mut a.quiet),
    Flag::ignored(short('r'), None),
    letters::written(|a, text| {
        a.pattern = Some(letters::pattern(&text)?);
        Ok(())
    }),
];

/// The options of `discard`.
pub(in crate::io) const DISCARD: &[Flag<Options>] =
    &[letters::numbers_only(|a| &mut a.for_machines), letters::quiet(|a| &mut a.quiet)];

/// The options of `truncate`.
pub(in crate::io) const TRUNCATE: &[Flag<Preallocation>] = &[Flag::value(
    short('m'),
    Value::PREALLOCATION,
    "how to allocate the added space",
    |mode, text| {
        let unknown = || Refusal::failed(format!("Invalid preallocation mode '{text}'"));
        *mode = Preallocation::parse(&text).ok_or_else(unknown)?;
        Ok(())
    },
)];

/// The byte that is written if `-P` is not given.
pub(super) const DEFAULT_PATTERN: u8 = 0xcd;

/// The message if `-z` and `-r` are combined.
pub(super) const REGISTERED_ZEROES: &str = "cannot combine zero write with registered I/O buffer";

/// The options of one `write`, `writev` or `discard`.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each letter")]
pub(in crate::io) struct Options {
    vm_state: bool,
    compressed: bool,
    for_machines: bool,
    fua: bool,
    no_fallback: bool,
    pattern: Option<u8>,
    quiet: bool,
    registered: bool,
    source: Option<String>,
    unmap: bool,
    zeroes: bool,
}

impl Options {
    /// The message about the first pair of options that cannot be combined, in QEMU's order.
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
    let operands = call.parse(session, WRITE, &mut options);
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
    if options.zeroes && options.registered {
        out(format_args!("{REGISTERED_ZEROES}\n"));
        return Outcome::Failed;
    }
    execute_write(session, &options, offset, len).await
}

async fn execute_write(session: &Session, options: &Options, offset: u64, len: u64) -> Outcome {
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

/// The `len` bytes to write: one byte value or the start of a file, repeated. `None` after a message if the file cannot be
/// read or is empty.
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
    let mut options = Options::default();
    let operands = call.parse(session, WRITEV, &mut options);
    let Options { for_machines, quiet, .. } = options;
    let mut flags = WriteFlags::empty();
    flags.set(WriteFlags::FUA, options.fua);
    let byte = options.pattern.unwrap_or(DEFAULT_PATTERN);
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
    let mut options = Options::default();
    let operands = call.parse(session, DISCARD, &mut options);
    let Options { for_machines, quiet, .. } = options;
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

/// Resizes the disk. From the first resize on, the backend has the permission to do so, as in QEMU.
async fn resize(backend: &Backend, size: u64, preallocation: Preallocation) -> Result<(), Error> {
    let now = backend.root()?.permissions();
    if now.taken.contains(Perm::WRITE) {
        backend.set_permissions(Permissions { taken: now.taken | Perm::RESIZE, ..now }).await?;
    }
    backend.resize(size, preallocation).await
}

/// `truncate`.
pub(in crate::io) async fn truncate(session: &Session, call: Call<'_>) -> Outcome {
    let mut preallocation = Preallocation::Off;
    let operands = call.parse(session, TRUNCATE, &mut preallocation);
    let Some(operands) = operands else { return Outcome::Failed };
    // Words after the size are ignored, as in QEMU.
    let size = operands.first().map_or("", String::as_str);
    // QEMU's message contains the first argument after getopt(3) has moved the options in front of the operands.
    let is_option = |word: &&&str| word.starts_with('-') && word.len() > 1;
    let named = call.arguments.iter().find(is_option).copied().unwrap_or(size);
    let Some(size) = bytes_named(size, named) else { return Outcome::Failed };
    let Some(open) = session.current() else { return Outcome::Failed };
    match resize(&open.backend, size, preallocation).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            session.program.report(&error);
            Outcome::Failed
        }
    }
}
