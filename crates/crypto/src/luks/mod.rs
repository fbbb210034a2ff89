//! LUKS version 1: a header with eight key slots. Each active slot holds the same master key, protected by its own
//! password.
//!
//! Spec: "LUKS On-Disk Format Specification", version 1.2. Offsets here count from the start of the LUKS header,
//! wherever the header lies in the file. The modules:
//!
//! * [`Header`]: parsed with every check that needs no I/O, and encoded;
//! * `slots`: opens and fills key slots, given their key material;
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

/// Maximum number of HMACs for opening all key slots of a header; a header that requires more is refused. This number
/// takes one core some hundred seconds, and is many times the number that headers need by default.
pub const MAX_WORK: u64 = 1 << 29;
