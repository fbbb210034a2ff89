//! Opening an encrypted image: parsing the options, reading the LUKS header, and deriving the key from a password.

use std::sync::{Arc, Mutex};

use oxblk_core::{Edge, Error, ErrorKind, OpenContext, Options, Result};
use oxblk_crypto::cipher::{BlockCipher, IvGenerator, Mode, SectorCipher, Suite};
use oxblk_crypto::luks;
use oxblk_crypto::secret::Secret;
use oxblk_ring::IoBufMut;

use super::super::layout::{CryptMethod, CryptoHeader, Header};
use super::{Encryption, key_needed};

/// Key length of the obsolete AES format in bytes.
const AES_KEY: usize = 16;

/// The encryption options for opening an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in super::super) struct EncryptOptions {
    format: Option<String>,
    key_secret: Option<String>,
}

impl EncryptOptions {
    /// Takes `encrypt.*` out of the options.
    ///
    /// # Errors
    /// When an option is unknown or has the wrong type. The message is the same as in QEMU's tools.
    pub(in super::super) fn take(options: &mut Options) -> Result<Self> {
        let Some(mut encrypt) = options.take_options("encrypt") else { return Ok(Self::default()) };
        let options = Self {
            format: encrypt.take_str("format")?,
            key_secret: encrypt.take_str("key-secret")?,
        };
        match encrypt.keys().next() {
            Some(key) => Err(Error::invalid(format!("Parameter '{key}' is unexpected"))),
            None => Ok(options),
        }
    }

    /// Refuses a key secret that differs from the key secret with which the image was opened.
    ///
    /// # Errors
    /// When the image is encrypted and the options contain the ID of another secret.
    pub(in super::super) fn require_same(&self, encryption: Option<&Encryption>) -> Result<()> {
        let known = encryption.and_then(Encryption::key_secret);
        match (encryption, self.key_secret.as_deref()) {
            (Some(_), options @ Some(_)) if options != known => {
                Err(Error::invalid("Cannot change the option 'encrypt.key-secret'"))
            }
            _ => Ok(()),
        }
    }

    fn require_format(&self, method: CryptMethod) -> Result<()> {
        let Some(format) = &self.format else { return Ok(()) };
        let reported = match method {
            CryptMethod::None => {
                return Err(Error::invalid(format!(
                    "No encryption in image header, but options specified format '{format}'"
                )));
            }
            CryptMethod::Aes => "aes",
            CryptMethod::Luks => "luks",
        };
        if format == reported {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "Header reported '{reported}' encryption format but options specify '{format}'"
        )))
    }
}

/// Opens the encryption of the image in `file`: reads the LUKS header, if there is one, and derives the key, if the key is
/// needed. Returns `None` if the image is not encrypted.
///
/// # Errors
/// When the options do not match the image, the secret is missing, the LUKS header is broken, or the password unlocks no slot.
/// The messages are the same as in QEMU's tools. Other errors are those of requests to the image file.
pub(in super::super) async fn open(
    context: &OpenContext,
    file: &Edge,
    header: &Header,
    options: EncryptOptions,
) -> Result<Option<Encryption>> {
    options.require_format(header.crypt_method)?;
    if header.crypt_method == CryptMethod::None {
        return Ok(None);
    }
    // `info` and `check` need no key. `check` without a key also works on an image with a broken LUKS header.
    let needs_no_key = context.flags.no_io || (context.flags.check && options.key_secret.is_none());
    let place = header.extensions.crypto;
    let luks = match place {
        None => None,
        Some(place) => match read_luks_header(file, place).await {
            Err(_) if context.flags.check && needs_no_key => None,
            outcome => Some(outcome?),
        },
    };
    let cipher = if needs_no_key {
        None
    } else {
        let id = options.key_secret.as_deref().ok_or_else(key_needed)?;
        let password = context.graph.secrets().password(id)?;
        let cipher = match (&luks, place) {
            (Some(luks), Some(place)) => luks_cipher(file, place, luks, &password).await?,
            _ => aes_cipher(&password)?,
        };
        Some(Arc::new(cipher))
    };
    Ok(Some(Encryption {
        method: header.crypt_method,
        luks: Mutex::new(luks),
        cipher,
        key_secret: options.key_secret,
        secrets: context.graph.secrets().clone(),
    }))
}

/// Reads a part of the area of the LUKS header.
async fn read_part(
    file: &Edge,
    place: CryptoHeader,
    part: std::ops::Range<u64>,
) -> Result<IoBufMut> {
    let outside = || Error::invalid("Request for data outside of extension header");
    if part.end > place.length {
        return Err(outside());
    }
    let offset = place.offset.checked_add(part.start).ok_or_else(outside)?;
    let len = usize::try_from(part.end.saturating_sub(part.start)).map_err(|_| outside())?;
    let part = file.read(offset, IoBufMut::new(len)).await;
    part.map_err(|error| error.prefix("Could not read encryption header"))
}

pub(super) async fn read_luks_header(file: &Edge, place: CryptoHeader) -> Result<luks::Header> {
    let len = u64::try_from(luks::Header::LEN).unwrap_or(u64::MAX);
    let bytes = read_part(file, place, 0..len).await?;
    Ok(luks::Header::parse(&bytes)?)
}

/// Finds the first slot that `password` unlocks, and the master key. The active slots are tried one after the other, on a
/// worker thread.
pub(super) async fn unlock(
    file: &Edge,
    place: CryptoHeader,
    header: &luks::Header,
    password: &Secret,
) -> Result<Option<(usize, Secret)>> {
    header.check_work()?;
    for (index, _) in header.active_slots() {
        if let Some(key) = unlock_slot(file, place, header, index, password).await? {
            return Ok(Some((index, key)));
        }
    }
    Ok(None)
}

/// The master key, if `password` unlocks the slot.
pub(super) async fn unlock_slot(
    file: &Edge,
    place: CryptoHeader,
    header: &luks::Header,
    index: usize,
    password: &Secret,
) -> Result<Option<Secret>> {
    let Some(slot) = header.slots.get(index) else { return Ok(None) };
    let material = read_part(file, place, slot.material(header.suite)).await?;
    let material = Secret::from_slice(&material);
    let (header, password) = (header.clone(), password.clone());
    let unlocked = oxblk_ring::offload(move || header.unlock(index, &password, material));
    Ok(unlocked.await?)
}

async fn luks_cipher(
    file: &Edge,
    place: CryptoHeader,
    header: &luks::Header,
    password: &Secret,
) -> Result<SectorCipher> {
    match unlock(file, place, header, password).await? {
        Some((_, key)) => Ok(SectorCipher::new(header.suite, &key)?),
        None => Err(wrong_password()),
    }
}

pub(super) fn wrong_password() -> Error {
    Error::new(ErrorKind::Denied, "Invalid password, cannot unlock any keyslot")
}

/// The cipher of the obsolete AES format. The key is the first 16 bytes of the password. A shorter password is padded with zero
/// bytes.
fn aes_cipher(password: &Secret) -> Result<SectorCipher> {
    let suite = Suite { cipher: BlockCipher::Aes128, mode: Mode::Cbc, iv: IvGenerator::Plain64 };
    let mut key = Secret::zeroed(AES_KEY);
    for (to, from) in key.iter_mut().zip(password.iter()) {
        *to = *from;
    }
    Ok(SectorCipher::new(suite, &key)?)
}
