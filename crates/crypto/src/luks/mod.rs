//! LUKS version 1: a header with eight key slots. Each active slot contains the same master key, encrypted with the
//! password of the slot.
//!
//! Specification: "LUKS On-Disk Format Specification", version 1.2. Offsets count from the start of the LUKS header,
//! which may lie anywhere in the file. The modules:
//!
//! * [`Header`]: parsing, all checks that need no I/O, and encoding;
//! * `slots`: opening and filling key slots; the caller reads and writes the key material;
//! * `create`: new headers;
//! * `splitter`: the anti-forensic splitter.
//!
//! The caller does the I/O: it reads [`Header::LEN`] bytes, then the key material of each slot to be tried
//! ([`Slot::material`]). [`MAX_WORK`] limits the cost of trying all slots.

mod create;
mod header;
mod raw;
mod slots;
mod splitter;

pub use create::{Created, Recipe, header_len};
pub use header::{Header, SLOTS, STRIPES, Slot};

/// Maximum number of HMACs for opening all key slots of a header. A header that requires more is refused. One core
/// needs some hundred seconds for this number. Headers with default parameters need only a small fraction of it.
pub const MAX_WORK: u64 = 1 << 29;
