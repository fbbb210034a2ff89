//! Encryption of disk images, without I/O: the functions take bytes, and return validated types or transformed bytes.
//!
//! * [`cipher`]: ciphers that work on sectors: a block cipher, a mode, and the rule that derives the initialisation
//!   vector of each sector;
//! * [`hash`]: hashes, and PBKDF2 with these hashes;
//! * [`luks`]: the LUKS version 1 header, its key slots, and the anti-forensic splitter;
//! * [`secret`]: passwords and keys in memory, and the formats in which users provide them;
//! * [`random`]: random bytes from the system.
//!
//! The primitives come from RustCrypto. This crate combines them as LUKS and the images of QEMU require. All data read
//! from an image is validated before it is used. No length in an image makes this crate allocate without a limit.
//! Before a caller tries passwords, [`luks::Header::check_work`] refuses headers that require too much computation
//! ([`luks::MAX_WORK`]).
//!
//! Key material is kept in [`secret::Secret`], which is wiped when it is dropped and never printed; the ciphers wipe
//! their key schedules.
#![forbid(unsafe_code)]

pub mod cipher;
mod error;
pub mod hash;

pub mod luks;
pub mod random;
pub mod secret;

pub use error::{Error, ErrorKind, Result};

/// The unit of encryption in bytes: each sector has its own initialisation vector.
pub const SECTOR: usize = 512;
