//! Ciphers that work on sectors.
//!
//! A [`SectorCipher`] is a block cipher in a mode, with the rule that derives the initialisation vector (IV) of each
//! 512-byte sector from the sector number. If the mode allows it, several sectors are processed together, so that the
//! block cipher has enough blocks to fill the pipeline of the processor. For this reason the modes are implemented in
//! `modes`, with the block ciphers of RustCrypto. The mode crates of RustCrypto process one sector at a time.
//!
//! AES uses the AES instructions of the processor if they exist. This is detected at run time.

mod iv;
mod modes;
mod names;

pub use names::{BlockCipher, IvGenerator, Mode, Suite};

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use serpent::Serpent;
use twofish::Twofish;

use crate::{Error, Result, SECTOR};
use iv::{Generator, Ivs};
use modes::{Cbc, Ctr, Ecb, Xts};

/// A cipher with its key, which transforms sectors in place. Threads may share it.
pub struct SectorCipher(Box<dyn modes::Sectors>);

/// Whether data is encrypted or decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// For writes to the disk.
    Encrypt,
    /// For reads from the disk.
    Decrypt,
}

impl SectorCipher {
    /// The cipher of `suite` with `key`, which must have [`Suite::key_len`] bytes.
    ///
    /// # Errors
    /// If the parts of the suite cannot be combined, or if the key has another length.
    pub fn new(suite: Suite, key: &[u8]) -> Result<Self> {
        suite.check()?;
        if key.len() != suite.key_len() {
            return Err(Error::invalid(format!(
                "Cipher key length {} should be {}",
                key.len(),
                suite.key_len()
            )));
        }
        let sectors = match suite.cipher {
            BlockCipher::Aes128 => wide::<Aes128>(suite, key),
            BlockCipher::Aes192 => wide::<Aes192>(suite, key),
            BlockCipher::Aes256 => wide::<Aes256>(suite, key),
            BlockCipher::Serpent128 | BlockCipher::Serpent192 | BlockCipher::Serpent256 => {
                wide::<Serpent>(suite, key)
            }
            BlockCipher::Twofish128 | BlockCipher::Twofish192 | BlockCipher::Twofish256 => {
                wide::<Twofish>(suite, key)
            }
            BlockCipher::Cast5 => cast5(suite, key),
        }?;
        Ok(Self(sectors))
    }

    /// Transforms `data`, which begins with sector number `sector`.
    ///
    /// # Errors
    /// If the length of `data` is not a multiple of [`SECTOR`]. `data` is unchanged after an error: the rest of an
    /// incomplete sector must not remain unencrypted.
    pub fn apply(&self, direction: Direction, sector: u64, data: &mut [u8]) -> Result<()> {
        if !data.len().is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "Length {} should be a multiple of the sector size {SECTOR}",
                data.len()
            )));
        }
        match direction {
            Direction::Encrypt => self.0.encrypt(sector, data),
            Direction::Decrypt => self.0.decrypt(sector, data),
        }
        Ok(())
    }
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SectorCipher(…)")
    }
}

/// The operations that a block cipher must have.
trait Keyed: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync + Sized + 'static {
    fn keyed(key: &[u8]) -> Result<Self> {
        Self::new_from_slice(key)
            .map_err(|_| Error::invalid(format!("No cipher takes a key of {} bytes", key.len())))
    }
}

impl<C> Keyed for C where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync + Sized + 'static
{
}

/// Makes the cipher of a suite whose block cipher has 16-byte blocks.
fn wide<C: Keyed + modes::Wide>(suite: Suite, key: &[u8]) -> Result<Box<dyn modes::Sectors>> {
    let ivs: Generator<cipher::typenum::U16> = generator(suite, key)?;
    if suite.mode != Mode::Xts {
        return narrow::<C>(suite.mode, key, ivs);
    }
    let (data, tweak) = key.split_at(key.len() / 2);
    Ok(Box::new(Xts::new(C::keyed(data)?, C::keyed(tweak)?, ivs)))
}

/// Makes the cipher of a mode that works with every block size.
fn narrow<C: Keyed>(
    mode: Mode,
    key: &[u8],
    ivs: Generator<C::BlockSize>,
) -> Result<Box<dyn modes::Sectors>> {
    Ok(match mode {
        Mode::Ecb => Box::new(Ecb(C::keyed(key)?)),
        Mode::Cbc => Box::new(Cbc { cipher: C::keyed(key)?, ivs }),
        Mode::Ctr => Box::new(Ctr { cipher: C::keyed(key)?, ivs }),
        Mode::Xts => return Err(Error::unsupported("XTS needs blocks of 16 bytes")),
    })
}

fn cast5(suite: Suite, key: &[u8]) -> Result<Box<dyn modes::Sectors>> {
    let ivs = match suite.iv {
        IvGenerator::Plain => Generator::Plain,
        IvGenerator::Plain64 => Generator::Plain64,
        IvGenerator::Essiv(hash) => Generator::Essiv(Box::new(Cast5::keyed(&hash.digest(&[key]))?)),
    };
    narrow::<Cast5>(suite.mode, key, ivs)
}

/// The IVs of a cipher with 16-byte blocks. ESSIV encrypts the sector number with a cipher of the same family. The
/// key of this cipher is the hash of the key of the volume.
fn generator(suite: Suite, key: &[u8]) -> Result<Generator<cipher::typenum::U16>> {
    let hash = match suite.iv {
        IvGenerator::Plain => return Ok(Generator::Plain),
        IvGenerator::Plain64 => return Ok(Generator::Plain64),
        IvGenerator::Essiv(hash) => hash,
    };
    let salt = hash.digest(&[key]);
    let cipher: Box<dyn Ivs<cipher::typenum::U16>> = match suite.essiv_cipher(hash)? {
        BlockCipher::Aes128 => Box::new(Aes128::keyed(&salt)?),
        BlockCipher::Aes192 => Box::new(Aes192::keyed(&salt)?),
        BlockCipher::Aes256 => Box::new(Aes256::keyed(&salt)?),
        BlockCipher::Serpent128 | BlockCipher::Serpent192 | BlockCipher::Serpent256 => {
            Box::new(Serpent::keyed(&salt)?)
        }
        BlockCipher::Twofish128 | BlockCipher::Twofish192 | BlockCipher::Twofish256 => {
            Box::new(Twofish::keyed(&salt)?)
        }
        BlockCipher::Cast5 => return Err(Error::unsupported("ESSIV needs one block size")),
    };
    Ok(Generator::Essiv(cipher))
}

#[cfg(test)]
mod tests;
