//! Encryption options of new images, and writing the LUKS header of a new image.

use oxblk_core::{Edge, Error, Options, Result, Secrets, WriteFlags, ZeroFlags};
use oxblk_crypto::cipher::{BlockCipher, IvGenerator, Mode, Suite};
use oxblk_crypto::hash::Hash;
use oxblk_crypto::luks::{self, Recipe};
use oxblk_crypto::secret::Secret;
use oxblk_ring::IoBuf;

use super::super::create_options::rejected;
use super::super::layout::CryptMethod;
use super::key_needed;

/// Default for the time in milliseconds that unlocking a key slot should take.
pub(super) const ITER_TIME: u64 = 2000;

/// The requested encryption of a new image.
#[derive(Debug, Clone, Default)]
pub enum Wanted {
    /// No encryption.
    #[default]
    No,
    /// The obsolete AES format.
    Aes {
        /// ID of the secret object that contains the password.
        secret: Option<String>,
    },
    /// The LUKS format.
    Luks {
        /// Parameters of the LUKS header.
        recipe: Recipe,
        /// ID of the secret object that contains the password.
        secret: Option<String>,
    },
}

impl Wanted {
    /// Takes `encryption` and `encrypt.*` out of the options.
    ///
    /// # Errors
    /// When an option is invalid or conflicts with another option. The messages are the same as in QEMU's tools.
    pub fn take(options: &mut Options) -> Result<Self> {
        let mut encrypt = take_encrypt(options)?;
        let mut format = encrypt.take_str("format")?;
        if options.take_bool("encryption")? == Some(true) {
            if format.is_some() {
                return Err(Error::invalid(
                    "'encrypt.format' and its alias 'encryption' can't be used at the same time",
                ));
            }
            format = Some("aes".to_owned());
        }
        let wanted = match format.as_deref() {
            None if encrypt.is_empty() => Self::No,
            None => return Err(Error::invalid("Parameter 'encrypt.format' is missing")),
            Some("aes") => Self::Aes { secret: encrypt.take_str("key-secret")? },
            Some("luks") => Self::Luks {
                secret: encrypt.take_str("key-secret")?,
                recipe: take_recipe(&mut encrypt)?,
            },
            Some(other) => return Err(rejected("format", other)),
        };
        match encrypt.keys().next() {
            Some(key) => Err(Error::invalid(format!("Parameter 'encrypt.{key}' is unexpected"))),
            None => Ok(wanted),
        }
    }

    /// The encryption method for the image header.
    pub(in super::super) fn method(&self) -> CryptMethod {
        match self {
            Self::No => CryptMethod::None,
            Self::Aes { .. } => CryptMethod::Aes,
            Self::Luks { .. } => CryptMethod::Luks,
        }
    }

    /// Length in bytes of the LUKS header and its key material; 0 without a LUKS header.
    pub(in super::super) fn header_len(&self) -> u64 {
        match self {
            Self::No | Self::Aes { .. } => 0,
            Self::Luks { recipe, .. } => luks::header_len(recipe.suite),
        }
    }

    /// The password that the secret contains; `None` without encryption.
    ///
    /// # Errors
    /// When the options contain no ID of a secret, or the secret does not exist or is not valid text. The messages are the same
    /// as in QEMU's tools.
    pub(in super::super) fn password(&self, secrets: &Secrets) -> Result<Option<Secret>> {
        match self {
            Self::No => Ok(None),
            Self::Aes { secret } | Self::Luks { secret, .. } => {
                let id = secret.as_deref().ok_or_else(key_needed)?;
                secrets.password(id).map(Some)
            }
        }
    }

    /// If the format is LUKS, writes the LUKS header and the key material of its first slot to an area of `area` bytes at
    /// `offset` of the file. The rest of the area becomes zero.
    ///
    /// # Errors
    /// The errors of [`Self::password`], of [`Recipe::create`] and of requests to the image file.
    pub(in super::super) async fn write_header(
        &self,
        file: &Edge,
        offset: u64,
        area: u64,
        secrets: &Secrets,
    ) -> Result<()> {
        let Self::Luks { recipe, .. } = self else { return Ok(()) };
        let recipe = *recipe;
        let password = self.password(secrets)?.ok_or_else(key_needed)?;
        // Key derivation is slow on purpose, so it runs on a worker thread.
        let created = oxblk_ring::offload(move || recipe.create(&password)).await?;
        file.write_zeroes(offset, area, ZeroFlags::empty()).await?;
        let header = created.header.encode();
        file.write(offset, IoBuf::from(header), WriteFlags::empty()).await?;
        let Some(slot) = created.header.slots.first() else { return Ok(()) };
        let place = offset.saturating_add(slot.material(recipe.suite).start);
        file.write(place, IoBuf::from(created.material), WriteFlags::empty()).await
    }
}

/// Takes the encryption options out of `options`. The options are nested in `encrypt` or have the prefix `encrypt.` in
/// their names. The names in the result have no prefix.
fn take_encrypt(options: &mut Options) -> Result<Options> {
    let mut encrypt = options.take_options("encrypt").unwrap_or_default();
    let flat: Vec<String> =
        options.keys().filter(|key| key.starts_with("encrypt.")).map(str::to_owned).collect();
    for key in flat {
        if let (Some(value), Some(name)) = (options.take(&key), key.strip_prefix("encrypt.")) {
            encrypt.set(name, value)?;
        }
    }
    Ok(encrypt)
}

fn take_recipe(encrypt: &mut Options) -> Result<Recipe> {
    let cipher = match encrypt.take_str("cipher-alg")? {
        None => BlockCipher::Aes256,
        Some(name) => BlockCipher::from_name(&name)?,
    };
    let mode = match encrypt.take_str("cipher-mode")? {
        None => Mode::Xts,
        Some(name) => Mode::from_name(&name).ok_or_else(|| rejected("cipher-mode", &name))?,
    };
    let find_hash = |parameter: &str, name: &str| {
        Hash::from_name(name).ok_or_else(|| rejected(parameter, name))
    };
    let iv_hash = match encrypt.take_str("ivgen-hash-alg")? {
        None => None,
        Some(name) => Some(find_hash("ivgen-hash-alg", &name)?),
    };
    let iv = match encrypt.take_str("ivgen-alg")?.as_deref() {
        None | Some("plain64") => IvGenerator::Plain64,
        Some("plain") => IvGenerator::Plain,
        Some("essiv") => IvGenerator::Essiv(iv_hash.unwrap_or(Hash::Sha256)),
        Some(other) => return Err(rejected("ivgen-alg", other)),
    };
    let hash = match encrypt.take_str("hash-alg")? {
        None => Hash::Sha256,
        Some(name) => find_hash("hash-alg", &name)?,
    };
    let iter_time = take_iter_time(encrypt)?.unwrap_or(ITER_TIME);
    let suite = Suite { cipher, mode, iv };
    suite.check()?;
    Ok(Recipe { suite, hash, iter_time })
}

/// Takes the time for key derivation. A negative time counts as a very long time. Key derivation refuses such a
/// time.
pub(super) fn take_iter_time(encrypt: &mut Options) -> Result<Option<u64>> {
    let time = encrypt.take_signed("iter-time", "encrypt.iter-time")?;
    Ok(time.map(i64::cast_unsigned))
}
