//! Encryption of guest data.
//!
//! An image is encrypted as a LUKS header inside it says ("Full disk encryption header pointer"), or in the obsolete way
//! with AES and the password for a key. Guest data is encrypted by sectors of 512 bytes; the number that a sector's
//! initialisation vector is made of is that of its place in the file with LUKS, and that on the guest disk with the
//! obsolete way. Metadata is not encrypted, and compressed clusters, which only other programs make, are not either.
//!
//! | | |
//! |---|---|
//! | `open` | options, and the way from a password to the key |
//! | `transform` | encrypting and decrypting requests, large ones on several cores |
//! | `keys` | passwords, added and erased |
//! | `create` | options of new images, and their LUKS header |
//!
//! Invariant: what lies at a host offset that a data entry refers to is ciphertext, always: a new cluster is written
//! whole, because what a file reads as zeroes decrypts to noise.
//!
//! An image that is only looked at (`info`, `check`) opens without its key; guest data cannot be read then.

pub mod create;
pub mod keys;
mod open;
mod transform;

use std::sync::{Arc, Mutex, PoisonError};

use oxblk_core::{Edge, Error, ErrorKind, Options, Result, Secrets};
use oxblk_crypto::cipher::{IvGenerator, SectorCipher};
use oxblk_crypto::luks;
use serde_json::{Value, json};

use super::layout::CryptMethod;

pub(super) use open::{Given, open};

/// What tools say when an image's password is not given.
const KEY_NEEDED: &str = "Parameter 'encrypt.key-secret' is required for cipher";
const SECTOR: u64 = oxblk_crypto::SECTOR as u64;

/// How an open image is encrypted.
pub(super) struct Encryption {
    method: CryptMethod,
    /// The LUKS header; absent where a check tolerates that it is broken.
    luks: Mutex<Option<luks::Header>>,
    /// Absent where the image was opened without its key.
    cipher: Option<Arc<SectorCipher>>,
    /// The secret that the image was opened with.
    key_secret: Option<String>,
    /// Those that options may name.
    secrets: Secrets,
}

impl Encryption {
    /// The number of the sector at a place.
    fn sector(&self, guest: u64, host: u64) -> u64 {
        match self.method {
            CryptMethod::Luks => host / SECTOR,
            CryptMethod::Aes | CryptMethod::None => guest / SECTOR,
        }
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        self.cipher.as_ref().ok_or_else(key_needed)
    }

    /// The secret that the image was opened with.
    pub(super) fn key_secret(&self) -> Option<&str> {
        self.key_secret.as_deref()
    }

    /// Changes the passwords as `encrypt.*` of an amendment says.
    ///
    /// # Errors
    /// As [`keys::change`].
    pub(super) async fn change_keys(
        &self,
        file: &Edge,
        mut options: Options,
        force: bool,
    ) -> Result<()> {
        let change = keys::Change::take(&mut options)?;
        let header = keys::change(file, self.key_secret(), change, force, &self.secrets).await?;
        *self.luks.lock().unwrap_or_else(PoisonError::into_inner) = Some(header);
        Ok(())
    }

    /// The LUKS header, where there is one that can be read.
    fn luks_header(&self) -> Option<luks::Header> {
        self.luks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// QAPI's `ImageInfoSpecificQCow2Encryption`.
    pub(super) fn describe(&self) -> Value {
        match (self.method, self.luks_header()) {
            (CryptMethod::Luks, Some(header)) => describe_luks(&header),
            (CryptMethod::Luks, None) => json!({ "format": "luks" }),
            _ => json!({ "format": "aes" }),
        }
    }
}

fn key_needed() -> Error {
    Error::new(ErrorKind::Invalid, KEY_NEEDED)
}

/// QAPI's `QCryptoBlockInfoLUKS`.
fn describe_luks(header: &luks::Header) -> Value {
    let suite = header.suite;
    let mut info = json!({
        "format": "luks",
        "cipher-alg": suite.cipher.name(),
        "cipher-mode": suite.mode.name(),
        "ivgen-alg": suite.iv.name(),
        "hash-alg": header.hash.name(),
        "detached-header": false,
        "payload-offset": header.payload_offset(),
        "master-key-iters": header.digest_iterations,
        "uuid": header.uuid(),
    });
    if let IvGenerator::Essiv(hash) = suite.iv {
        info["ivgen-hash-alg"] = hash.name().into();
    }
    let slot = |slot: &luks::Slot| {
        let mut info = json!({
            "active": slot.active,
            "key-offset": slot.material(suite).start,
        });
        if slot.active {
            info["iters"] = slot.iterations.into();
            info["stripes"] = luks::STRIPES.into();
        }
        info
    };
    info["slots"] = header.slots.iter().map(slot).collect();
    info
}
