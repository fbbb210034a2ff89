//! The supported ciphers, and their names in options and in LUKS headers.

use crate::hash::Hash;
use crate::{Error, Result};

/// A block cipher with its key length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockCipher {
    /// AES with 16-byte keys.
    Aes128,
    /// AES with 24-byte keys.
    Aes192,
    /// AES with 32-byte keys.
    Aes256,
    /// CAST-128 with 16-byte keys.
    Cast5,
    /// Serpent with 16-byte keys.
    Serpent128,
    /// Serpent with 24-byte keys.
    Serpent192,
    /// Serpent with 32-byte keys.
    Serpent256,
    /// Twofish with 16-byte keys.
    Twofish128,
    /// Twofish with 24-byte keys.
    Twofish192,
    /// Twofish with 32-byte keys.
    Twofish256,
}

/// Names of ciphers that QEMU accepts, although its usual builds do not support these ciphers in LUKS.
const KNOWN_ONLY: [&str; 3] = ["des", "3des", "sm4"];

impl BlockCipher {
    /// All block ciphers.
    pub const ALL: [Self; 10] = [
        Self::Aes128,
        Self::Aes192,
        Self::Aes256,
        Self::Cast5,
        Self::Serpent128,
        Self::Serpent192,
        Self::Serpent256,
        Self::Twofish128,
        Self::Twofish192,
        Self::Twofish256,
    ];

    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
            Self::Cast5 => "cast5-128",
            Self::Serpent128 => "serpent-128",
            Self::Serpent192 => "serpent-192",
            Self::Serpent256 => "serpent-256",
            Self::Twofish128 => "twofish-128",
            Self::Twofish192 => "twofish-192",
            Self::Twofish256 => "twofish-256",
        }
    }

    /// The cipher with this name in options.
    ///
    /// # Errors
    /// If there is no such cipher, or if QEMU knows the name but does not support the cipher.
    pub fn from_name(name: &str) -> Result<Self> {
        if KNOWN_ONLY.contains(&name) {
            return Err(Error::unsupported(format!("Algorithm '{name}' not supported")));
        }
        let found = Self::ALL.into_iter().find(|cipher| cipher.name() == name);
        found.ok_or_else(|| rejected("cipher-alg", name))
    }

    /// The name in a LUKS header. It does not include the key length.
    pub fn luks_name(self) -> &'static str {
        self.name().split('-').next().unwrap_or_default()
    }

    /// The cipher with this name in a LUKS header.
    ///
    /// # Errors
    /// If there is no cipher with this name and key length (in bytes).
    pub fn from_luks(name: &str, key_len: usize) -> Result<Self> {
        let matches = |cipher: &Self| cipher.luks_name() == name && cipher.key_len() == key_len;
        Self::ALL.into_iter().find(matches).ok_or_else(|| {
            Error::unsupported(format!(
                "Algorithm '{name}' with key size {key_len} bytes not supported"
            ))
        })
    }

    /// Length of the key in bytes.
    pub fn key_len(self) -> usize {
        match self {
            Self::Aes128 | Self::Cast5 | Self::Serpent128 | Self::Twofish128 => 16,
            Self::Aes192 | Self::Serpent192 | Self::Twofish192 => 24,
            Self::Aes256 | Self::Serpent256 | Self::Twofish256 => 32,
        }
    }

    /// The name of the family, for messages.
    fn family(self) -> &'static str {
        match self.luks_name() {
            "aes" => "AES",
            "serpent" => "Serpent",
            "twofish" => "Twofish",
            other => other,
        }
    }
}

/// A mode of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Electronic codebook: each block is transformed independently.
    Ecb,
    /// Cipher block chaining.
    Cbc,
    /// XEX with tweaks (IEEE 1619). The key is twice as long as the key of the block cipher.
    Xts,
    /// Counter.
    Ctr,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// The name in options and in LUKS headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }

    /// The mode with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// The rule that derives the initialisation vector of a sector from the sector number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvGenerator {
    /// The low 32 bits of the number.
    Plain,
    /// The number.
    Plain64,
    /// The number, encrypted. The encryption key is the hash of the key of the volume.
    Essiv(Hash),
}

impl IvGenerator {
    /// The name in options and in LUKS headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

/// A cipher, its mode, and its initialisation vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Suite {
    /// The block cipher.
    pub cipher: BlockCipher,
    /// The mode.
    pub mode: Mode,
    /// The initialisation vectors.
    pub iv: IvGenerator,
}

impl Suite {
    /// Length of the key in bytes.
    pub fn key_len(&self) -> usize {
        let len = self.cipher.key_len();
        if self.mode == Mode::Xts { len.saturating_mul(2) } else { len }
    }

    /// Checks that the parts of the suite can be combined.
    ///
    /// # Errors
    /// If the parts cannot be combined, with the messages of QEMU's tools.
    pub fn check(&self) -> Result<()> {
        if self.mode == Mode::Xts && self.cipher == BlockCipher::Cast5 {
            return Err(Error::unsupported("Unsupported cipher mode xts"));
        }
        match self.iv {
            IvGenerator::Essiv(hash) => self.essiv_cipher(hash).map(drop),
            IvGenerator::Plain | IvGenerator::Plain64 => Ok(()),
        }
    }

    /// The cipher of the same family whose key is as long as the hash's digest.
    pub(super) fn essiv_cipher(&self, hash: Hash) -> Result<BlockCipher> {
        let name = self.cipher.luks_name();
        if let Ok(cipher) = BlockCipher::from_luks(name, hash.size()) {
            return Ok(cipher);
        }
        Err(Error::unsupported(match self.cipher {
            BlockCipher::Cast5 => format!("Cipher {} not supported with essiv", self.cipher.name()),
            cipher => {
                format!("No {} cipher with key size {} available", cipher.family(), hash.size())
            }
        }))
    }
}

/// The error for an option with an invalid value.
pub(crate) fn rejected(parameter: &str, value: &str) -> Error {
    Error::invalid(format!("Parameter '{parameter}' does not accept value '{value}'"))
}
