//! Initialisation vectors from sector numbers.

use cipher::array::{Array, ArraySize};
use cipher::{BlockCipherEncrypt, BlockSizeUser};

/// Encrypts IVs in place (ESSIV).
pub(super) trait Ivs<N: ArraySize>: Send + Sync {
    fn encrypt_ivs(&self, ivs: &mut [Array<u8, N>]);
}

impl<C> Ivs<C::BlockSize> for C
where
    C: BlockCipherEncrypt + BlockSizeUser + Send + Sync,
{
    fn encrypt_ivs(&self, ivs: &mut [Array<u8, C::BlockSize>]) {
        self.encrypt_blocks(ivs);
    }
}

/// The rule that generates the IVs, of `N` bytes each.
pub(super) enum Generator<N: ArraySize> {
    /// The low 32 bits of the sector number, little-endian.
    Plain,
    /// The sector number, little-endian.
    Plain64,
    /// The sector number, little-endian and encrypted.
    Essiv(Box<dyn Ivs<N>>),
}

impl<N: ArraySize> Generator<N> {
    /// Fills in the IVs of consecutive sectors, starting with sector `first`.
    pub(super) fn fill(&self, first: u64, ivs: &mut [Array<u8, N>]) {
        let mut number = first;
        for iv in ivs.iter_mut() {
            let shown = match self {
                Self::Plain => number & u64::from(u32::MAX),
                Self::Plain64 | Self::Essiv(_) => number,
            };
            iv.fill(0);
            for (to, from) in iv.iter_mut().zip(shown.to_le_bytes()) {
                *to = from;
            }
            number = number.wrapping_add(1);
        }
        if let Self::Essiv(cipher) = self {
            cipher.encrypt_ivs(ivs);
        }
    }
}
