//! The LUKS header: parsing, all checks that need no I/O, and encoding.

use std::ops::Range;

use zerocopy::{FromBytes, IntoBytes};

use super::MAX_WORK;
use super::raw::{ACTIVE, INACTIVE, MAGIC, RawHeader, RawSlot};
use crate::cipher::{BlockCipher, IvGenerator, Mode, Suite};
use crate::hash::Hash;
use crate::{Error, Result, SECTOR};

/// Number of key slots in a header.
pub const SLOTS: usize = 8;
/// Number of stripes into which every slot splits the key.
pub const STRIPES: u32 = 4000;

const SECTOR_BYTES: u64 = SECTOR as u64;
/// Length of the header in whole sectors.
const HEADER_SECTORS: u64 = (Header::LEN as u64).div_ceil(SECTOR_BYTES);

/// A key slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Whether the slot contains the master key.
    pub active: bool,
    /// PBKDF2 iterations of the password; 0 only if the slot is not active.
    pub iterations: u32,
    /// PBKDF2 salt of the password.
    pub salt: [u8; 32],
    /// Sector at which the key material begins.
    pub(super) material: u32,
}

impl Slot {
    /// Length of a slot in the header in bytes.
    pub const LEN: usize = 48;

    /// The range of the key material, in bytes from the start of the header.
    pub fn material(&self, suite: Suite) -> Range<u64> {
        let start = u64::from(self.material).saturating_mul(SECTOR_BYTES);
        start..start.saturating_add(material_len(suite.key_len()))
    }

    /// The same slot without a key.
    #[must_use]
    pub fn erased(&self) -> Self {
        Self { active: false, iterations: 0, salt: [0; 32], material: self.material }
    }

    /// The slot in its on-disk format.
    pub fn encode(&self) -> [u8; Self::LEN] {
        zerocopy::transmute!(self.raw())
    }

    fn raw(&self) -> RawSlot {
        RawSlot {
            state: if self.active { ACTIVE } else { INACTIVE }.into(),
            iterations: self.iterations.into(),
            salt: self.salt,
            material: self.material.into(),
            stripes: STRIPES.into(),
        }
    }
}

/// Length of a slot's key material in bytes, in whole sectors.
pub(super) fn material_len(key_len: usize) -> u64 {
    let bytes = u64::from(STRIPES).saturating_mul(u64::try_from(key_len).unwrap_or(u64::MAX));
    bytes.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX)
}

/// A header whose algorithms are supported and whose areas do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The cipher of the data and of the key material.
    pub suite: Suite,
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: Hash,
    /// Sector at which the data of a LUKS volume begins. It lies after all key material.
    pub(super) payload: u32,
    /// Digest (PBKDF2) of the master key.
    pub(super) digest: [u8; 20],
    pub(super) digest_salt: [u8; 32],
    /// PBKDF2 iterations of the master key's digest.
    pub digest_iterations: u32,
    pub(super) uuid: [u8; 40],
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

impl Header {
    /// Length of the header in bytes, without key material.
    pub const LEN: usize = size_of::<RawHeader>();

    /// Parses a header from its first [`Self::LEN`] bytes.
    ///
    /// # Errors
    /// If the bytes are not a LUKS header, if the header is inconsistent, or if it uses an unsupported algorithm. The
    /// messages are the messages of QEMU's tools.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let raw = RawHeader::read_from_prefix(bytes)
            .map_err(|_| Error::invalid("Volume is not in LUKS format"))?
            .0;
        if raw.magic != MAGIC {
            return Err(Error::invalid("Volume is not in LUKS format"));
        }
        if raw.version.get() != 1 {
            let text = format!("LUKS version {} is not supported", raw.version.get());
            return Err(Error::unsupported(text));
        }
        let cipher_name = text(&raw.cipher_name, "cipher name")?;
        let cipher_mode = text(&raw.cipher_mode, "cipher mode")?;
        let hash_spec = text(&raw.hash_spec, "hash spec")?;
        check_layout(&raw)?;
        let (suite, hash) =
            parse_suite(&cipher_name, &cipher_mode, &hash_spec, raw.key_bytes.get())?;
        let slot = |raw: RawSlot| Slot {
            active: raw.state.get() == ACTIVE,
            iterations: raw.iterations.get(),
            salt: raw.salt,
            material: raw.material.get(),
        };
        Ok(Self {
            suite,
            hash,
            payload: raw.payload.get(),
            digest: raw.digest,
            digest_salt: raw.digest_salt,
            digest_iterations: raw.digest_iterations.get(),
            uuid: raw.uuid,
            slots: raw.slots.map(slot),
        })
    }

    /// The header in its on-disk format.
    pub fn encode(&self) -> Vec<u8> {
        let iv = match self.suite.iv {
            IvGenerator::Essiv(hash) => format!("essiv:{}", hash.name()),
            plain => plain.name().to_owned(),
        };
        let raw = RawHeader {
            magic: MAGIC,
            version: 1.into(),
            cipher_name: field(self.suite.cipher.luks_name()),
            cipher_mode: field(&format!("{}-{iv}", self.suite.mode.name())),
            hash_spec: field(self.hash.name()),
            payload: self.payload.into(),
            key_bytes: u32::try_from(self.suite.key_len()).unwrap_or(0).into(),
            digest: self.digest,
            digest_salt: self.digest_salt,
            digest_iterations: self.digest_iterations.into(),
            uuid: self.uuid,
            slots: self.slots.each_ref().map(Slot::raw),
        };
        raw.as_bytes().to_vec()
    }

    /// Offset of a slot in the header, in bytes.
    pub fn slot_offset(index: usize) -> u64 {
        let slots = std::mem::offset_of!(RawHeader, slots);
        u64::try_from(slots.saturating_add(index.saturating_mul(Slot::LEN))).unwrap_or(u64::MAX)
    }

    /// Offset of the data in a LUKS volume, in bytes.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload).saturating_mul(SECTOR_BYTES)
    }

    /// The UUID as text.
    pub fn uuid(&self) -> String {
        let end = self.uuid.iter().position(|byte| *byte == 0).unwrap_or(self.uuid.len());
        String::from_utf8_lossy(self.uuid.get(..end).unwrap_or_default()).into_owned()
    }

    /// The active slots, with their numbers.
    pub fn active_slots(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.active)
    }

    /// Refuses a header if trying a password with all key slots would take too long.
    ///
    /// # Errors
    /// If trying all slots takes more than [`MAX_WORK`].
    pub fn check_work(&self) -> Result<()> {
        let key = self.suite.key_len();
        let one = |iterations| {
            let digest = self.hash.work(self.digest_iterations, self.digest.len());
            self.hash.work(iterations, key).saturating_add(digest)
        };
        let all = self
            .active_slots()
            .fold(0, |all: u64, (_, slot)| all.saturating_add(one(slot.iterations)));
        if all > MAX_WORK {
            let text = format!(
                "LUKS key slots require {all} rounds of {}, more than the {MAX_WORK} allowed",
                self.hash.name()
            );
            return Err(Error::unsupported(text));
        }
        Ok(())
    }
}

/// Reads a name that ends with a zero byte. A name without a zero byte is an error.
fn text(bytes: &[u8; 32], what: &str) -> Result<String> {
    let Some(end) = bytes.iter().position(|byte| *byte == 0) else {
        return Err(Error::invalid(format!("LUKS header {what} is not NUL terminated")));
    };
    Ok(String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned())
}

fn field<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    // The last byte stays zero.
    let room = bytes.len().saturating_sub(1);
    for (to, from) in bytes.iter_mut().take(room).zip(text.bytes()) {
        *to = from;
    }
    bytes
}

/// The sectors of a slot's key material.
fn sectors(raw: &RawHeader, slot: &RawSlot) -> Range<u64> {
    let key_len = usize::try_from(raw.key_bytes.get()).unwrap_or(usize::MAX);
    let start = u64::from(slot.material.get());
    start..start.saturating_add(material_len(key_len) / SECTOR_BYTES)
}

/// Checks that header, key material and payload do not overlap, and that counts and slot states are valid.
fn check_layout(raw: &RawHeader) -> Result<()> {
    let fault = |text: String| Err(Error::invalid(text));
    let payload = u64::from(raw.payload.get());
    if payload < HEADER_SECTORS {
        return fault("LUKS payload is overlapping with the header".to_owned());
    }
    if raw.digest_iterations.get() == 0 {
        return fault("LUKS key iteration count is zero".to_owned());
    }
    for (index, slot) in raw.slots.iter().enumerate() {
        let area = sectors(raw, slot);
        if slot.stripes.get() != STRIPES {
            let stripes = slot.stripes.get().cast_signed();
            return fault(format!("Keyslot {index} is corrupted (stripes {stripes} != {STRIPES})"));
        }
        if area.start < HEADER_SECTORS {
            return fault(format!("Keyslot {index} is overlapping with the LUKS header"));
        }
        match slot.state.get() {
            ACTIVE if slot.iterations.get() == 0 => {
                return fault(format!("Keyslot {index} iteration count is zero"));
            }
            ACTIVE | INACTIVE => {}
            _ => return fault(format!("Keyslot {index} state (active/disable) is corrupted")),
        }
        if area.end > payload {
            return fault(format!("Keyslot {index} is overlapping with the encrypted payload"));
        }
        let others = raw.slots.iter().enumerate().skip(index.saturating_add(1));
        for (other, slot) in others {
            let other_area = sectors(raw, slot);
            if area.start < other_area.end && other_area.start < area.end {
                let text = format!("Keyslots {index} and {other} are overlapping in the header");
                return fault(text);
            }
        }
    }
    Ok(())
}

/// Parses the names in a header.
fn parse_suite(cipher: &str, mode: &str, hash: &str, key_bytes: u32) -> Result<(Suite, Hash)> {
    let unsupported = |text: String| Err(Error::unsupported(text));
    let Some((mode_name, iv_name)) = mode.split_once('-') else {
        return Err(Error::invalid(format!("Unexpected cipher mode string format '{mode}'")));
    };
    let (iv_name, iv_hash) = match iv_name.split_once(':') {
        Some((name, hash)) => (name, Some(hash)),
        None => (iv_name, None),
    };
    let find_hash = |name: &str| {
        let unknown = || Error::unsupported(format!("Hash algorithm '{name}' not supported"));
        Hash::from_name(name).ok_or_else(unknown)
    };
    let iv_hash = iv_hash.map(find_hash).transpose()?;
    let Some(mode) = Mode::from_name(mode_name) else {
        return unsupported(format!("Cipher mode '{mode_name}' not supported"));
    };
    let key_len = usize::try_from(key_bytes).unwrap_or(usize::MAX);
    if mode == Mode::Xts && !key_len.is_multiple_of(2) {
        return Err(Error::invalid("XTS cipher key length should be a multiple of 2"));
    }
    let cipher_key = if mode == Mode::Xts { key_len / 2 } else { key_len };
    let cipher = BlockCipher::from_luks(cipher, cipher_key)?;
    let hash = find_hash(hash)?;
    let iv = match (iv_name, iv_hash) {
        ("plain", _) => IvGenerator::Plain,
        ("plain64", _) => IvGenerator::Plain64,
        ("essiv", Some(hash)) => IvGenerator::Essiv(hash),
        ("essiv", None) => {
            return Err(Error::invalid("Missing IV generator hash specification"));
        }
        (other, _) => return unsupported(format!("IV generator '{other}' not supported")),
    };
    let suite = Suite { cipher, mode, iv };
    suite.check()?;
    Ok((suite, hash))
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
