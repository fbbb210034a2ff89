//! Random damage. The harness overwrites some words of an image that contains data, then sends every kind of request to this
//! image.
//!
//! Each request must end, with success or an error. No request panics or waits forever (the simulated executor detects such a
//! wait). No request allocates an amount of memory that a corrupt field determines: such an allocation would exceed the address
//! space.

use oxblk_core::check::Fix;
use oxblk_core::{Backend, Preallocation};
use oxblk_ring::sim::{self, Disk};

use crate::formats::Variant;
use crate::model::chain::{self, Image};
use crate::model::ops::Shape;
use crate::model::{run, sim::disk_size};
use crate::random::Random;

/// Returns a word to write: a limit value, a random number, or an offset inside or outside the image.
pub(super) fn interesting(random: &mut Random, image_len: u64) -> u64 {
    match random.below(9) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << random.below(64),
        3 => (1 << 63) | (random.below(image_len.max(1)) & !511),
        4 => random.below(image_len.max(1)) & !511,
        5 => (1 << 62) | random.next_u64() >> 2,
        6 => image_len.wrapping_add(random.below(1 << 20)),
        7 => random.below(256),
        _ => random.next_u64(),
    }
}

/// Damages up to eight places of an image with big-endian words. Most places are in the first part of the file, which has the
/// headers, or at the start of a cluster, where tables begin.
pub fn words(random: &mut Random, bytes: &mut [u8], cluster: u64) {
    let len = bytes.len() as u64;
    for _ in 0..random.within(1, 8) {
        let at = match random.below(4) {
            0 => random.below(len.min(128)),
            1 => random.below(len.min(cluster * 6)) & !7,
            2 => random.below(len / cluster + 1) * cluster,
            _ => random.below(len) & !7,
        };
        let width = if random.one_in(3) { 4 } else { 8 };
        let word = interesting(random, len).to_be_bytes();
        let at = usize::try_from(at).expect("a small image");
        let end = (at + width).min(bytes.len());
        if at < end {
            bytes[at..end].copy_from_slice(&word[8 - width..][..end - at]);
        }
    }
}

/// Damages up to eight little-endian words of four bytes. One word of four is in the header; the other words are in the table.
/// One word of three gets a small number.
pub fn little_words(
    random: &mut Random,
    bytes: &mut [u8],
    header: std::ops::Range<usize>,
    table: std::ops::Range<usize>,
) {
    table_words(random, bytes, [header, table], u32::to_le_bytes);
}

/// Does the same as [`little_words`] with big-endian words.
pub fn big_words(
    random: &mut Random,
    bytes: &mut [u8],
    header: std::ops::Range<usize>,
    table: std::ops::Range<usize>,
) {
    table_words(random, bytes, [header, table], u32::to_be_bytes);
}

fn table_words(
    random: &mut Random,
    bytes: &mut [u8],
    [header, table]: [std::ops::Range<usize>; 2],
    encode: fn(u32) -> [u8; 4],
) {
    let len = bytes.len() as u64;
    for _ in 0..random.within(1, 8) {
        let range = if random.one_in(4) { &header } else { &table };
        let words = (range.end - range.start) as u64 / 4;
        let value = match random.below(3) {
            0 => random.below(64),
            _ => interesting(random, len),
        };
        let at = range.start + usize::try_from(random.below(words)).expect("a small image") * 4;
        if let Some(place) = bytes.get_mut(at..at + 4) {
            let low = u32::try_from(value & 0xffff_ffff).expect("32 bits");
            place.copy_from_slice(&encode(low));
        }
    }
}

/// Makes an image with data. Returns its disk, and the size of the guest's disk in bytes.
pub(super) async fn make(
    variant: &'static Variant,
    random: &mut Random,
) -> Result<(Disk, u64), String> {
    let size = disk_size(variant, random);
    let image = Image { variant, disk: Disk::new(random.next_u64(), 0) };
    chain::create(&image, size).await?;
    let disk = chain::open(std::slice::from_ref(&image)).await?;
    let shape = Shape::of(variant, size);
    for _ in 0..12 {
        for op in shape.random_batch(random, 4) {
            run::execute(&disk, &op).await.map_err(|e| e.to_string())?;
        }
    }
    chain::close(disk).await?;
    Ok((image.disk, size))
}

/// Sends requests of every kind to an open image. The requests may fail. The damage may have changed the disk to any size. The
/// requests are made for a disk of at least 64 KiB, so some of them reach past the end of a smaller disk.
pub(super) async fn use_it(disk: &Backend, variant: &Variant, random: &mut Random) {
    let shape = Shape::of(variant, disk.size().clamp(64 << 10, 64 << 20));
    for _ in 0..12 {
        let ops = shape.random_batch(random, 6);
        let tasks: Vec<_> = ops
            .into_iter()
            .map(|op| {
                let disk = disk.clone();
                oxblk_ring::spawn(async move { drop(run::execute(&disk, &op).await) })
            })
            .collect();
        for task in tasks {
            task.await;
        }
    }
    drop(disk.resize(disk.size().saturating_add(1 << 20), Preallocation::Off).await);
    drop(disk.flush().await);
    if let Ok(node) = disk.node()
        && let Some(check) = node.driver().check()
    {
        drop(check.check(Fix::Nothing, &|_| {}).await);
    }
}

/// Damages an image at places that the seed chooses, then uses the image.
///
/// # Panics
/// When the code under test panics, or a request waits forever. The message contains the seed.
pub fn run(variant: &'static Variant, seed: u64) {
    let attempt = std::panic::AssertUnwindSafe(|| {
        sim::run(seed, async {
            let mut random = Random::new(seed);
            let (disk, _) = make(variant, &mut random).await?;
            let mut bytes = disk.bytes();
            variant.format.damage(variant, &mut random, &mut bytes);
            let image = Image { variant, disk: Disk::from_bytes(seed, &bytes) };
            if let Ok(disk) = chain::open(std::slice::from_ref(&image)).await {
                use_it(&disk, variant, &mut random).await;
                drop(chain::close(disk).await);
            }
            if variant.check {
                drop(chain::check(&image, chain::Tolerance::Leaks).await);
            }
            Ok::<_, String>(())
        })
    });
    let outcome = std::panic::catch_unwind(attempt);
    if let Err(error) = outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        panic!("{} damage seed {seed}: {error}", variant.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::FORMATS;

    #[test]
    fn requests_past_the_end_of_a_damaged_smaller_disk_all_end() {
        let variants = FORMATS.iter().map(|format| &format.variants()[0]);
        let sizes = [0, 512, 1000, 1024, 5000];
        for (variant, size) in variants.flat_map(|v| sizes.map(|size| (v, size))) {
            sim::run(size, async {
                let mut random = Random::new(size);
                let (disk, _) = make(variant, &mut random).await.expect("a good image");
                let mut bytes = disk.bytes();
                if !variant.format.set_size(&mut bytes, size) {
                    return;
                }
                let image = Image { variant, disk: Disk::from_bytes(size, &bytes) };
                let disk = chain::open(&[image]).await.expect("it opens");
                // The size is a whole number of sectors.
                assert_eq!(disk.size(), size.next_multiple_of(512));
                use_it(&disk, variant, &mut random).await;
                chain::close(disk).await.expect("it closes");
            });
        }
    }
}
