//! LUKS version 1: a header with eight key slots, each of which holds the one master key under a password.
//!
//! Spec: "LUKS On-Disk Format Specification", version 1.2. Offsets here count from the start of the LUKS header,
//! wherever that lies. The rooms:
//!
//! * [`Header`]: parsed with every check that needs no I/O, and encoded;
//! * `slots`: opening and filling key slots, given their key material;
//! * `create`: new headers;
//! * `splitter`: the anti-forensic splitter.
//!
//! The caller does the I/O: it reads [`Header::LEN`] bytes, then, for each slot to be tried, the slot's key material
//! ([`Slot::material`]). What it costs to try all slots is bounded by [`MAX_WORK`].

mod create;
mod header;
mod raw;
mod slots;
mod splitter;

pub use create::{Created, Recipe, header_len};
pub use header::{Header, SLOTS, STRIPES, Slot};

/// The most HMACs that opening all key slots of a header may take together; a header that asks for more is refused.
/// It is some hundred seconds of one core, and many times what is made by default.
pub const MAX_WORK: u64 = 1 << 29;
