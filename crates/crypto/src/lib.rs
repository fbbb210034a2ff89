//! Encryption of disk images, without I/O: bytes in, validated types and transformed bytes out.
//!
//! * [`cipher`]: ciphers by the sector: a block cipher, a mode, and how each sector's initialisation vector is made;
//! * [`hash`]: hashes, and PBKDF2 over them;
//! * [`luks`]: the LUKS version 1 header, its key slots, and the anti-forensic splitter;
//! * [`secret`]: passwords and keys in memory, and the forms in which they are given;
//! * [`random`]: random bytes from the system.
//!
//! The primitives are RustCrypto's; what is here is how LUKS and QEMU's images put them together. Everything that is
//! read from an image is validated before it is used, and no length or count that an image chooses makes this crate
//! allocate or compute without a bound ([`luks::MAX_WORK`]).
//!
//! Key material lives in [`secret::Secret`], which is wiped when it is dropped and never printed; the ciphers wipe
//! their key schedules.
#![forbid(unsafe_code)]

pub mod cipher;
mod error;
pub mod hash;

pub mod luks;
pub mod random;
pub mod secret;

pub use error::{Error, ErrorKind, Result};

/// Bytes that are encrypted as a unit: each sector has an initialisation vector of its own.
pub const SECTOR: usize = 512;
