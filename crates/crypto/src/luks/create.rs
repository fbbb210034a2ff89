//! Creates LUKS headers.

use super::header::{Header, SLOTS, Slot, material_len};
use crate::cipher::Suite;
use crate::hash::Hash;
use crate::secret::Secret;
use crate::{Result, SECTOR};

/// Key material begins at multiples of this many bytes.
const ALIGNMENT: u64 = 4096;

/// The parameters of a new header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// The cipher of the data.
    pub suite: Suite,
    /// The hash of PBKDF2 and of the anti-forensic splitter.
    pub hash: Hash,
    /// Intended time for opening a key slot on this machine, in milliseconds of processor time.
    pub iter_time: u64,
}

/// A new header, the key material of its first key slot, and the master key.
#[derive(Debug)]
pub struct Created {
    /// The header; its slot 0 is active.
    pub header: Header,
    /// Key material of slot 0.
    pub material: Vec<u8>,
    /// The master key.
    pub key: Secret,
}

/// Bytes from the start of a new header to the end of its key material. In a LUKS volume the data begins there.
pub fn header_len(suite: Suite) -> u64 {
    material_offset(suite, SLOTS)
}

/// Offset of a slot's key material.
fn material_offset(suite: Suite, index: usize) -> u64 {
    let each = material_len(suite.key_len()).next_multiple_of(ALIGNMENT);
    let before = u64::try_from(index).unwrap_or(u64::MAX).saturating_mul(each);
    ALIGNMENT.saturating_add(before)
}

fn sector(offset: u64) -> u32 {
    u32::try_from(offset / SECTOR as u64).unwrap_or(u32::MAX)
}

impl Recipe {
    /// Creates a header with a new master key. The password of slot 0 is `password`. The call takes about `iter_time`
    /// milliseconds of processor time for the slot, an eighth of this time for the digest of the master key, and some tens
    /// of milliseconds for measurements.
    ///
    /// # Errors
    /// If the parts of the suite cannot be combined, if the number of iterations is out of range or exceeds the limit
    /// [`MAX_WORK`](super::MAX_WORK), or if the system provides no random bytes.
    pub fn create(&self, password: &[u8]) -> Result<Created> {
        self.suite.check()?;
        let key = Secret::random(self.suite.key_len())?;
        let mut uuid = [0; 40];
        for (to, from) in uuid.iter_mut().zip(crate::random::uuid()?.bytes()) {
            *to = from;
        }
        let slot = |index| Slot {
            active: false,
            iterations: 0,
            salt: [0; 32],
            material: sector(material_offset(self.suite, index)),
        };
        let mut header = Header {
            suite: self.suite,
            hash: self.hash,
            payload: sector(header_len(self.suite)),
            digest: [0; 20],
            digest_salt: [0; 32],
            digest_iterations: 1,
            uuid,
            slots: std::array::from_fn(slot),
        };
        let (slot, material) = header.seal(0, password, &key, self.iter_time)?;
        if let Some(first) = header.slots.first_mut() {
            *first = slot;
        }
        header.set_digest(&key, self.iter_time)?;
        header.check_work()?;
        Ok(Created { header, material, key })
    }
}
