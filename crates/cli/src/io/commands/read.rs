//! The commands `read` and `readv`.

use oxblk_core::strerror;
use oxblk_ring::IoBufMut;

use super::{Call, done_if, letters};
use crate::flags::Flag;
use crate::flags::spec::{Value, short};
use crate::io::Outcome;
use crate::io::data::{dump, matches};
use crate::io::numbers::{MAX_REQUEST, bytes};
use crate::io::report::Timer;
use crate::io::session::Session;
use crate::program::out;

/// The options of `read`.
pub(in crate::io) const READ: &[Flag<Reading>] = &[
    Flag::switch(short('b'), "read from the VM state", |a| &mut a.vm_state),
    letters::numbers_only(|a| &mut a.shown.for_machines),
    Flag::value(
        short('l'),
        Value::size("LENGTH"),
        "with -P, check only so many bytes",
        |a, text| {
            a.sub_range = true;
            a.shown.check_len = Some(letters::bytes(&text)?);
            Ok(())
        },
    ),
    Flag::ignored(short('p'), None),
    letters::expected(|a, text| {
        a.shown.pattern = Some(letters::pattern(&text)?);
        Ok(())
    }),
    letters::quiet(|a| &mut a.shown.quiet),
    letters::registered(|a| &mut a.registered),
    Flag::value(
        short('s'),
        Value::size("OFFSET"),
        "with -P, offset in the data from which it is checked",
        |a, text| {
            a.sub_range = true;
            a.shown.check_from = letters::bytes(&text)?;
            Ok(())
        },
    ),
    letters::dump(|a| &mut a.shown.dump),
];

/// The options of `readv`.
pub(in crate::io) const READV: &[Flag<Shown>] = &[
    letters::numbers_only(|a| &mut a.for_machines),
    letters::expected(|a, text| {
        a.pattern = Some(letters::pattern(&text)?);
        Ok(())
    }),
    letters::quiet(|a| &mut a.quiet),
    Flag::ignored(short('r'), None),
    letters::dump(|a| &mut a.dump),
];

/// The options of one `read`.
#[derive(Debug, Default)]
pub(in crate::io) struct Reading {
    shown: Shown,
    vm_state: bool,
    /// `-r` was given.
    registered: bool,
    /// `-l` or `-s` was given.
    sub_range: bool,
}

/// The options that control how the data of a read is checked and printed.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::io) struct Shown {
    pub(super) for_machines: bool,
    pub(super) quiet: bool,
    pub(super) dump: bool,
    pub(super) pattern: Option<u8>,
    /// The start of the range in the buffer that is compared with the pattern.
    pub(super) check_from: u64,
    /// The length of this range. `None`: the range ends at the end of the buffer.
    pub(super) check_len: Option<u64>,
}

impl Shown {
    /// The part of a buffer that is compared with the pattern. `None`: this part is not inside the buffer.
    fn checked<'b>(&self, data: &'b [u8]) -> Option<&'b [u8]> {
        let from = usize::try_from(self.check_from).ok()?;
        let rest = data.get(from..)?;
        match self.check_len {
            None => Some(rest),
            Some(len) => rest.get(..usize::try_from(len).ok()?),
        }
    }

    /// Checks and prints the data that was read. Returns whether the data matches the pattern.
    pub(super) fn show(&self, data: &[u8], offset: u64, timer: Timer) -> bool {
        let mut well = true;
        if let (Some(pattern), Some(part)) = (self.pattern, self.checked(data))
            && !matches(part, pattern)
        {
            out(format_args!(
                "Pattern verification failed at offset {}, {} bytes\n",
                offset.saturating_add(self.check_from),
                part.len()
            ));
            well = false;
        }
        if self.quiet {
            return well;
        }
        if self.dump {
            dump(data, offset);
        }
        let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
        timer.report("read", offset, len, self.for_machines);
        well
    }
}

/// `read`.
pub(in crate::io) async fn read(session: &Session, call: Call<'_>) -> Outcome {
    let mut reading = Reading::default();
    let operands = call.parse(session, READ, &mut reading);
    let Reading { shown, vm_state, registered, sub_range } = reading;
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, count] = operands.as_slice() else { return call.misused() };
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    let Some(len) = length(count) else { return Outcome::Failed };
    if sub_range && shown.pattern.is_none() {
        return call.misused();
    }
    let end = shown.check_len.map_or(Some(shown.check_from), |n| n.checked_add(shown.check_from));
    if shown.pattern.is_some() && end.is_none_or(|end| end > len) {
        out(format_args!("pattern verification range exceeds end of read data\n"));
        return Outcome::Failed;
    }
    if vm_state {
        for (number, what) in [(offset, "offset"), (len, "count")] {
            if number % SECTOR != 0 {
                out(format_args!("{number} is not a sector-aligned value for '{what}'\n"));
                return Outcome::Failed;
            }
        }
        if registered {
            out(format_args!(
                "I/O buffer registration is not supported when reading from vmstate\n"
            ));
            return Outcome::Failed;
        }
        return read_vm_state(session, offset, len, shown).await;
    }
    request(session, "read", offset, len, shown).await
}

/// `readv`.
pub(in crate::io) async fn readv(session: &Session, call: Call<'_>) -> Outcome {
    let mut shown = Shown::default();
    let operands = call.parse(session, READV, &mut shown);
    let Some(operands) = operands else { return Outcome::Failed };
    let [offset, lengths @ ..] = operands.as_slice() else { return call.misused() };
    if lengths.is_empty() {
        return call.misused();
    }
    let Some(offset) = bytes(offset) else { return Outcome::Failed };
    let Some(len) = total(lengths) else { return Outcome::Failed };
    request(session, "readv", offset, len, shown).await
}

async fn request(session: &Session, verb: &str, offset: u64, len: u64, shown: Shown) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let timer = Timer::start();
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    match open.backend.read(offset, IoBufMut::filled(size, 0xab)).await {
        Ok(data) => done_if(shown.show(&data, offset, timer)),
        Err(error) => {
            out(format_args!("{verb} failed: {}\n", strerror(error.raw_errno())));
            Outcome::Failed
        }
    }
}

async fn read_vm_state(session: &Session, offset: u64, len: u64, shown: Shown) -> Outcome {
    let Some(open) = session.current() else { return Outcome::Failed };
    let timer = Timer::start();
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    match open.backend.load_vm_state(offset, IoBufMut::filled(size, 0xab)).await {
        Ok(data) => done_if(shown.show(&data, offset, timer)),
        Err(error) => {
            out(format_args!("read failed: {}\n", strerror(error.raw_errno())));
            Outcome::Failed
        }
    }
}

/// Parses the length of a request.
pub(super) fn length(text: &str) -> Option<u64> {
    let len = bytes(text)?;
    if len > MAX_REQUEST {
        out(format_args!("length cannot exceed {MAX_REQUEST}, given {text}\n"));
        return None;
    }
    Some(len)
}

/// Parses the lengths of a request with several parts, and returns the sum of the lengths.
pub(super) fn total(lengths: &[String]) -> Option<u64> {
    let mut total = 0_u64;
    for text in lengths {
        let len = bytes(text)?;
        if len > MAX_REQUEST {
            out(format_args!("Argument '{text}' exceeds maximum size {MAX_REQUEST}\n"));
            return None;
        }
        total = total.saturating_add(len);
        if total > MAX_REQUEST {
            out(format_args!("The total number of bytes exceed the maximum size {MAX_REQUEST}\n"));
            return None;
        }
    }
    Some(total)
}

/// Offsets and lengths of VM state are multiples of this many bytes.
pub(super) const SECTOR: u64 = 512;
