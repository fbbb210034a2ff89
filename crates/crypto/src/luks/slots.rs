//! Opens and fills key slots.

use super::header::{Header, Slot, material_len};
use super::splitter;
use crate::cipher::{Direction, SectorCipher};
use crate::hash::Hash;
use crate::secret::Secret;
use crate::{Error, ErrorKind, Result};

/// Minimum number of PBKDF2 iterations in a new slot or digest.
const MIN_ITERATIONS: u64 = 1000;
/// Computing the digest of the master key takes the time of opening a slot divided by this number.
const DIGEST_SHARE: u64 = 8;

impl Header {
    /// Returns the master key if slot `index` is active and `password` is its password; otherwise `None`. `material` is
    /// the key material of the slot. The time depends on the number of iterations of the slot; [`Header::check_work`]
    /// refuses headers with too many iterations.
    ///
    /// # Errors
    /// If the slot is active and the key material does not have the expected length.
    pub fn unlock(
        &self,
        index: usize,
        password: &[u8],
        mut material: Secret,
    ) -> Result<Option<Secret>> {
        let Some(slot) = self.slots.get(index).filter(|slot| slot.active) else {
            return Ok(None);
        };
        let len = self.suite.key_len();
        if u64::try_from(material.len()).ok() != Some(material_len(len)) {
            return Err(Error::invalid(format!("Keyslot {index} has truncated key material")));
        }
        self.apply(Direction::Decrypt, slot, password, &mut material)?;
        let key = splitter::merge(self.hash, len, &material);
        Ok(self.is_master_key(&key)?.then_some(key))
    }

    /// Whether the header's digest is the digest of `key`.
    fn is_master_key(&self, key: &Secret) -> Result<bool> {
        let mut digest = Secret::zeroed(self.digest.len());
        self.hash.pbkdf2(key, &self.digest_salt, self.digest_iterations, &mut digest)?;
        Ok(digest.matches(&self.digest))
    }

    /// Returns a copy of slot `index` that contains the master key `key`, encrypted with `password`, and the key
    /// material of the slot. Opening the slot takes about `iter_time` milliseconds of processor time on this machine.
    ///
    /// # Errors
    /// If there is no such slot, the number of iterations is out of range, or the system provides no random bytes.
    pub fn seal(
        &self,
        index: usize,
        password: &[u8],
        key: &Secret,
        iter_time: u64,
    ) -> Result<(Slot, Vec<u8>)> {
        let len = self.suite.key_len();
        let missing = || Error::new(ErrorKind::Invalid, format!("There is no keyslot {index}"));
        let mut slot = self.slots.get(index).ok_or_else(missing)?.clone();
        slot.active = true;
        slot.iterations = slot_iterations(self.hash, len, iter_time)?;
        crate::random::fill(&mut slot.salt)?;
        let size = usize::try_from(material_len(len)).unwrap_or(0);
        let mut material = Secret::zeroed(size);
        splitter::split(self.hash, key, &mut material)?;
        self.apply(Direction::Encrypt, &slot, password, &mut material)?;
        Ok((slot, material.to_vec()))
    }

    /// Encrypts or decrypts key material with a password.
    fn apply(
        &self,
        direction: Direction,
        slot: &Slot,
        password: &[u8],
        material: &mut [u8],
    ) -> Result<()> {
        let mut derived = Secret::zeroed(self.suite.key_len());
        self.hash.pbkdf2(password, &slot.salt, slot.iterations, &mut derived)?;
        SectorCipher::new(self.suite, &derived)?.apply(direction, 0, material)
    }

    /// Sets the digest to the digest of `key`.
    pub(super) fn set_digest(&mut self, key: &Secret, iter_time: u64) -> Result<()> {
        let len = self.digest.len();
        let rate = self.hash.iterations_per_second(len)?;
        self.digest_iterations = iterations(rate, iter_time, DIGEST_SHARE)?;
        crate::random::fill(&mut self.digest_salt)?;
        let hash = self.hash;
        hash.pbkdf2(key, &self.digest_salt, self.digest_iterations, &mut self.digest)
    }
}

fn slot_iterations(hash: Hash, len: usize, iter_time: u64) -> Result<u32> {
    iterations(hash.iterations_per_second(len)?, iter_time, 1)
}

/// The number of iterations that take `iter_time` / `share` milliseconds at `rate` iterations per second; at least
/// [`MIN_ITERATIONS`].
fn iterations(rate: u64, iter_time: u64, share: u64) -> Result<u32> {
    const RANGE: &str = "Numerical result out of range";
    let Some(scaled) = rate.checked_mul(iter_time) else {
        let text = format!("PBKDF iterations {rate} too large to scale: {RANGE}");
        return Err(Error::invalid(text));
    };
    let count = (scaled / 1000 / share.max(1)).max(MIN_ITERATIONS);
    u32::try_from(count).map_err(|_| {
        Error::invalid(format!("PBKDF iterations {count} larger than {}: {RANGE}", u32::MAX))
    })
}

#[cfg(test)]
mod tests {
    use super::iterations;

    #[test]
    fn iterations_follow_the_requested_time_and_are_limited() {
        assert_eq!(iterations(1_000_000, 2000, 1), Ok(2_000_000));
        assert_eq!(iterations(1_000_000, 2000, 8), Ok(250_000));
        assert_eq!(iterations(5, 0, 1), Ok(1000));
        let wrong = |rate, time| iterations(rate, time, 1).unwrap_err().to_string();
        assert_eq!(
            wrong(6_182_641, u64::MAX),
            "PBKDF iterations 6182641 too large to scale: Numerical result out of range"
        );
        assert_eq!(
            wrong(666_016, 10_000_000),
            "PBKDF iterations 6660160000 larger than 4294967295: Numerical result out of range"
        );
    }
}
