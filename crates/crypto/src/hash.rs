//! Hashes by name, and PBKDF2 with these hashes.

use std::time::Duration;

use digest::{Digest, Output};
use hmac::{EagerHash, Hmac, KeyInit};
use rustix::time::{ClockId, clock_gettime};

use crate::secret::Secret;
use crate::{Error, Result};

/// A hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// MD5.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
    /// SM3.
    Sm3,
}

/// An operation that is generic over the hash.
trait Work {
    type Outcome;
    fn with<D: EagerHash + Digest>(self) -> Self::Outcome
    where
        Hmac<D>: KeyInit + digest::Update + digest::FixedOutput + Clone;
}

impl Hash {
    /// All hashes.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// The name in options and in LUKS headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// The hash with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name() == name)
    }

    /// Length of a digest in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Sm3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    fn apply<W: Work>(self, work: W) -> W::Outcome {
        match self {
            Self::Md5 => work.with::<md5::Md5>(),
            Self::Sha1 => work.with::<sha1::Sha1>(),
            Self::Sha224 => work.with::<sha2::Sha224>(),
            Self::Sha256 => work.with::<sha2::Sha256>(),
            Self::Sha384 => work.with::<sha2::Sha384>(),
            Self::Sha512 => work.with::<sha2::Sha512>(),
            Self::Ripemd160 => work.with::<ripemd::Ripemd160>(),
            Self::Sm3 => work.with::<sm3::Sm3>(),
        }
    }

    /// The digest of the concatenation of `parts`.
    pub fn digest(self, parts: &[&[u8]]) -> Secret {
        self.apply(Digesting(parts))
    }

    /// Fills `out` by PBKDF2 with HMAC (RFC 8018, 5.2). The time is proportional to [`Self::work`].
    ///
    /// # Errors
    /// If the password is too long for HMAC, which cannot happen with the supported hashes.
    pub fn pbkdf2(
        self,
        password: &[u8],
        salt: &[u8],
        iterations: u32,
        out: &mut [u8],
    ) -> Result<()> {
        self.apply(Deriving { password, salt, iterations, out })
    }

    /// The number of HMACs that [`Self::pbkdf2`] computes for `len` bytes.
    pub fn work(self, iterations: u32, len: usize) -> u64 {
        let blocks = u64::try_from(len.div_ceil(self.size())).unwrap_or(u64::MAX);
        u64::from(iterations).saturating_mul(blocks)
    }

    /// Measures how many PBKDF2 iterations for `len` bytes this machine computes per second of processor time. The
    /// measurement takes some tens of milliseconds of processor time. Time in which the thread does not run is not
    /// measured.
    ///
    /// # Errors
    /// The errors of [`Self::pbkdf2`].
    pub fn iterations_per_second(self, len: usize) -> Result<u64> {
        const LONG_ENOUGH: Duration = Duration::from_millis(20);
        let mut out = Secret::zeroed(len);
        let mut iterations: u32 = 1 << 10;
        loop {
            let start = thread_time();
            self.pbkdf2(b"password", b"salt", iterations, &mut out)?;
            let taken = thread_time().saturating_sub(start);
            if taken >= LONG_ENOUGH || iterations >= 1 << 30 {
                let nanos = taken.as_nanos().max(1);
                let rate = u128::from(iterations).saturating_mul(1_000_000_000) / nanos;
                return Ok(u64::try_from(rate).unwrap_or(u64::MAX).max(1));
            }
            iterations = iterations.saturating_mul(2);
        }
    }
}

/// The processor time that the current thread has used.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanoseconds)
}

struct Digesting<'a>(&'a [&'a [u8]]);

impl Work for Digesting<'_> {
    type Outcome = Secret;

    fn with<D: EagerHash + Digest>(self) -> Secret {
        let mut hasher = D::new();
        for part in self.0 {
            hasher.update(part);
        }
        let digest: Output<D> = hasher.finalize();
        Secret::from_slice(&digest)
    }
}

struct Deriving<'a> {
    password: &'a [u8],
    salt: &'a [u8],
    iterations: u32,
    out: &'a mut [u8],
}

impl Work for Deriving<'_> {
    type Outcome = Result<()>;

    fn with<D: EagerHash + Digest>(self) -> Result<()>
    where
        Hmac<D>: KeyInit + digest::Update + digest::FixedOutput + Clone,
    {
        pbkdf2::pbkdf2::<Hmac<D>>(self.password, self.salt, self.iterations, self.out)
            .map_err(|_| Error::invalid("The password is too long"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hash_has_a_name_and_a_digest_of_its_declared_size() {
        for hash in Hash::ALL {
            assert_eq!(Hash::from_name(hash.name()), Some(hash));
            assert_eq!(hash.digest(&[b"a", b"bc"]).len(), hash.size());
        }
        assert_eq!(Hash::from_name("SHA256"), None);
    }

    #[test]
    fn pbkdf2_produces_the_published_test_vector() {
        // RFC 6070, second vector.
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 2, &mut out).unwrap();
        let expected = 0xea6c014dc72d6f8c_cd1ed92ace1d41f0_u128;
        assert_eq!(u128::from_be_bytes(*out.first_chunk().unwrap()), expected);
    }

    #[test]
    fn time_in_which_the_thread_does_not_run_is_not_measured() {
        let (start, pause) = (thread_time(), Duration::from_millis(100));
        std::thread::sleep(pause);
        assert!(thread_time() - start < pause);
        assert!(Hash::Sha256.iterations_per_second(32).unwrap() > 1);
        assert!(thread_time() > start);
    }

    #[test]
    fn the_work_of_a_derivation_counts_its_blocks() {
        assert_eq!(Hash::Sha256.work(1000, 64), 2000);
        assert_eq!(Hash::Sha1.work(1000, 20), 1000);
    }
}
