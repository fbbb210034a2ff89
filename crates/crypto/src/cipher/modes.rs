//! The modes of operation of block ciphers: ECB, CBC, CTR and XTS. Several blocks are passed to the cipher in one call where
//! the mode allows it.

use cipher::array::Array;
use cipher::typenum::U16;
use cipher::{Block, BlockSizeUser};

use super::Keyed;
use super::iv::Generator;
use crate::SECTOR;

/// Largest number of sectors in a group. The IVs of a group are generated together.
const TOGETHER: usize = 8;
/// Number of 16-byte blocks in a sector.
const WIDE_BLOCKS: usize = SECTOR / 16;

/// A mode with its cipher and key.
pub(super) trait Sectors: Send + Sync {
    fn encrypt(&self, sector: u64, data: &mut [u8]);
    fn decrypt(&self, sector: u64, data: &mut [u8]);
}

/// Ciphers with 16-byte blocks.
pub(super) trait Wide: BlockSizeUser<BlockSize = U16> {}

impl<C: BlockSizeUser<BlockSize = U16>> Wide for C {}

fn blocks_of<C: BlockSizeUser>(data: &mut [u8]) -> &mut [Block<C>] {
    Array::slice_as_chunks_mut(data).0
}

fn xor(to: &mut [u8], from: &[u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to ^= from;
    }
}

/// Calls `each` for groups of up to [`TOGETHER`] sectors with their IVs.
fn by_groups<C: Keyed>(
    ivs: &Generator<C::BlockSize>,
    sector: u64,
    data: &mut [u8],
    mut each: impl FnMut(&mut [Block<C>], &mut [u8]),
) {
    let mut vectors: [Block<C>; TOGETHER] = std::array::from_fn(|_| Block::<C>::default());
    let mut number = sector;
    for group in data.chunks_mut(TOGETHER * SECTOR) {
        let count = TOGETHER.min(group.len() / SECTOR);
        let Some(vectors) = vectors.get_mut(..count) else { return };
        ivs.fill(number, vectors);
        each(vectors, group);
        number = number.wrapping_add(count as u64);
    }
}

/// Electronic codebook: each block is transformed independently.
pub(super) struct Ecb<C>(pub(super) C);

impl<C: Keyed> Sectors for Ecb<C> {
    fn encrypt(&self, _sector: u64, data: &mut [u8]) {
        self.0.encrypt_blocks(blocks_of::<C>(data));
    }

    fn decrypt(&self, _sector: u64, data: &mut [u8]) {
        self.0.decrypt_blocks(blocks_of::<C>(data));
    }
}

/// Cipher block chaining. The blocks of one sector must be encrypted one after the other, but blocks of several sectors
/// are encrypted together.
pub(super) struct Cbc<C: BlockSizeUser> {
    pub(super) cipher: C,
    pub(super) ivs: Generator<C::BlockSize>,
}

impl<C: Keyed> Sectors for Cbc<C> {
    fn encrypt(&self, sector: u64, data: &mut [u8]) {
        let per_sector = SECTOR / C::block_size();
        by_groups::<C>(&self.ivs, sector, data, |chain, group| {
            let blocks = blocks_of::<C>(group);
            for index in 0..per_sector {
                for (last, sector) in chain.iter_mut().zip(blocks.chunks_exact(per_sector)) {
                    if let Some(block) = sector.get(index) {
                        xor(last, block);
                    }
                }
                self.cipher.encrypt_blocks(chain);
                for (last, sector) in chain.iter().zip(blocks.chunks_exact_mut(per_sector)) {
                    if let Some(block) = sector.get_mut(index) {
                        block.clone_from(last);
                    }
                }
            }
        });
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) {
        let per_sector = SECTOR / C::block_size();
        by_groups::<C>(&self.ivs, sector, data, |vectors, group| {
            let mut encrypted = [0; TOGETHER * SECTOR];
            let Some(encrypted) = encrypted.get_mut(..group.len()) else { return };
            encrypted.copy_from_slice(group);
            self.cipher.decrypt_blocks(blocks_of::<C>(group));
            let before = blocks_of::<C>(encrypted).chunks_exact(per_sector);
            let sectors = blocks_of::<C>(group).chunks_exact_mut(per_sector);
            for ((sector, before), iv) in sectors.zip(before).zip(vectors) {
                let chain = std::iter::once(&*iv).chain(before);
                for (block, last) in sector.iter_mut().zip(chain) {
                    xor(block, last);
                }
            }
        });
    }
}

/// Counter mode: the IV of a sector is its first counter block. The counter is a big-endian number.
pub(super) struct Ctr<C: BlockSizeUser> {
    pub(super) cipher: C,
    pub(super) ivs: Generator<C::BlockSize>,
}

/// Adds one to a big-endian number.
fn count(counter: &mut [u8]) {
    for byte in counter.iter_mut().rev() {
        let (next, carry) = byte.overflowing_add(1);
        *byte = next;
        if !carry {
            return;
        }
    }
}

impl<C: Keyed> Sectors for Ctr<C> {
    fn encrypt(&self, sector: u64, data: &mut [u8]) {
        by_groups::<C>(&self.ivs, sector, data, |counters, group| {
            for (counter, sector) in counters.iter_mut().zip(group.chunks_exact_mut(SECTOR)) {
                let mut stream = [0; SECTOR];
                for block in blocks_of::<C>(&mut stream) {
                    block.clone_from(counter);
                    count(counter);
                }
                self.cipher.encrypt_blocks(blocks_of::<C>(&mut stream));
                xor(sector, &stream);
            }
        });
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) {
        self.encrypt(sector, data);
    }
}

/// XTS (IEEE 1619): the first tweak of a sector is its IV, encrypted with the second half of the key.
pub(super) struct Xts<C> {
    data: C,
    tweak: C,
    ivs: Generator<U16>,
}

impl<C: Keyed + Wide> Xts<C> {
    pub(super) fn new(data: C, tweak: C, ivs: Generator<U16>) -> Self {
        Self { data, tweak, ivs }
    }

    fn apply(&self, sector: u64, data: &mut [u8], transform: impl Fn(&mut [Block<C>])) {
        by_groups::<C>(&self.ivs, sector, data, |tweaks, group| {
            self.tweak.encrypt_blocks(tweaks);
            for (first, sector) in tweaks.iter().zip(group.chunks_exact_mut(SECTOR)) {
                let mask = tweak_mask(first.as_ref());
                xor(sector, &mask);
                transform(blocks_of::<C>(sector));
                xor(sector, &mask);
            }
        });
    }
}

/// The tweaks of the blocks of a sector. Each tweak is the previous tweak multiplied by two in GF(2^128).
fn tweak_mask(first: &[u8]) -> [u8; SECTOR] {
    let mut mask = [0; SECTOR];
    let mut tweak = first.first_chunk().map_or(0, |bytes| u128::from_le_bytes(*bytes));
    let (blocks, _) = mask.as_chunks_mut::<{ SECTOR / WIDE_BLOCKS }>();
    for block in blocks {
        *block = tweak.to_le_bytes();
        let reduce = if tweak >> 127 == 1 { 0x87 } else { 0 };
        tweak = (tweak << 1) ^ reduce;
    }
    mask
}

impl<C: Keyed + Wide> Sectors for Xts<C> {
    fn encrypt(&self, sector: u64, data: &mut [u8]) {
        self.apply(sector, data, |blocks| self.data.encrypt_blocks(blocks));
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) {
        self.apply(sector, data, |blocks| self.data.decrypt_blocks(blocks));
    }
}
