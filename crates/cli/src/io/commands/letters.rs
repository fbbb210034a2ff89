//! Options that several commands have.

use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, short};
use crate::flags::{Flag, Stored};
use crate::io::numbers;

/// `-C`: prints a machine-readable report.
pub(super) const fn numbers_only<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('C'), "print numbers only", field)
}

/// `-q`: prints no report.
pub(super) const fn quiet<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('q'), "print no report", field)
}

/// `-v`: prints the data.
pub(super) const fn dump<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('v'), "print the data", field)
}

/// `-f`: FUA.
pub(super) const fn fua<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('f'), "the data is durable when the write completes (FUA)", field)
}

/// `-u`: with `-z`, the range may be unmapped.
pub(super) const fn unmap<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('u'), "with -z, the zeroes may be discarded", field)
}

/// `-z`: writes zeroes.
pub(super) const fn zeroes<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('z'), "write zeroes", field)
}

/// `-r`: the buffer of the request is registered with the I/O engine. Accepted without effect, because every buffer is used in the
/// same way; the flag matters only for options with which it cannot be combined.
pub(super) const fn registered<A>(field: fn(&mut A) -> &mut bool) -> Flag<A> {
    Flag::switch(short('r'), "accepted without effect", field)
}

/// `-P` of a read: the expected value of every byte of the data.
pub(super) const fn expected<A>(store: fn(&mut A, String) -> Stored) -> Flag<A> {
    Flag::value(
        short('P'),
        Value::text("PATTERN"),
        "all bytes of the data must have this value",
        store,
    )
}

/// `-P` of a write: the byte to write.
pub(super) const fn written<A>(store: fn(&mut A, String) -> Stored) -> Flag<A> {
    Flag::value(short('P'), Value::text("PATTERN"), "the value of the written bytes (0xcd)", store)
}

/// Parses a size or offset.
pub(super) fn bytes(text: &str) -> Result<u64, Refusal> {
    numbers::bytes(text).ok_or_else(Refusal::printed)
}

/// Parses the value of a pattern byte.
pub(super) fn pattern(text: &str) -> Result<u8, Refusal> {
    numbers::pattern(text).ok_or_else(Refusal::printed)
}
