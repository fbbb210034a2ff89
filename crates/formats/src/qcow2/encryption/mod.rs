//! Encryption of guest data.
//!
//! A LUKS header inside the image describes the encryption (section "Full disk encryption header pointer" of the qcow2
//! specification). The obsolete AES format has no such header and uses the password as the key. Guest data is encrypted in
//! sectors of 512 bytes. With LUKS, the initialisation vector is derived from the sector number in the file. With the
//! obsolete format, it is derived from the sector number on the guest disk. Metadata and compressed clusters are not
//! encrypted. This driver writes no compressed clusters to an encrypted image, but other programs do.
//!
//! | | |
//! |---|---|
//! | `open` | options, and unlocking the key with a password |
//! | `transform` | encrypting and decrypting requests, large ones on several cores |
//! | `keys` | adding and erasing passwords |
//! | `create` | encryption options of new images, and their LUKS header |
//!
//! Invariant: this driver writes ciphertext to every uncompressed cluster before an L2 entry without the zero flag refers
//! to the cluster. So a new cluster is always written completely, because zeroes in the file do not decrypt to zeroes. The
//! preallocated clusters of a new image are an exception: with LUKS, they contain no ciphertext, as in images of QEMU.
//!
//! `info`, and `check` without a key secret, open an image without its key. The guest data can then be neither read nor
//! written.

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

pub(super) use open::{EncryptOptions, open};

/// Error message if the options do not contain the ID of the secret with the password.
const KEY_NEEDED: &str = "Parameter 'encrypt.key-secret' is required for cipher";
const SECTOR: u64 = oxblk_crypto::SECTOR as u64;

/// The encryption of an open image.
pub(super) struct Encryption {
    method: CryptMethod,
    /// The LUKS header. Absent for AES, and if the header is broken and the image was opened for a check without its key.
    luks: Mutex<Option<luks::Header>>,
    /// Absent if the image was opened without its key.
    cipher: Option<Arc<SectorCipher>>,
    /// The ID of the secret object with which the image was opened (`encrypt.key-secret`).
    key_secret: Option<String>,
    /// The secret objects to which options can refer.
    secrets: Secrets,
}

impl Encryption {
    /// The sector number for the initialisation vector.
    fn sector(&self, guest: u64, host: u64) -> u64 {
        match self.method {
            CryptMethod::Luks => host / SECTOR,
            CryptMethod::Aes | CryptMethod::None => guest / SECTOR,
        }
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        self.cipher.as_ref().ok_or_else(key_needed)
    }

    /// The ID of the secret object with which the image was opened.
    pub(super) fn key_secret(&self) -> Option<&str> {
        self.key_secret.as_deref()
    }

    /// Changes the passwords as the `encrypt.*` options of an amend request describe.
    ///
    /// # Errors
    /// The errors of [`keys::Change::take`] and of [`keys::change`].
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

    /// The LUKS header, if the image has one and the driver could read the header.
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
