//! Images on a disk that damages data: latent errors, silent corruption and misdirected requests.
//!
//! [`latent_error`] makes one sector of an image unreadable. The sector may contain metadata. These properties must hold:
//!
//! - each request that needs the sector fails with `EIO`; every other request succeeds, and reads return the right data;
//! - a check or a repair of the image reports the error, or does not need the sector, and loses no data;
//! - when the sector can be read again, the image has the data of all completed requests and no corruption.
//!
//! [`wrong_data`] lets the disk return or store wrong data. No result is right then, but each request must end, and no request
//! panics.

use oxblk_core::Errno;
use oxblk_core::check::Fix;
use oxblk_ring::sim::{self, Damage, DamageRule, Disk, Faults};

use super::mutate::{make, use_it};
use crate::crash::oracle::CrashOracle;
use crate::formats::Variant;
use crate::model::chain::{self, Image, Tolerance};
use crate::model::ops::{Op, Shape};
use crate::model::run::{self, Seen};
use crate::random::Random;

const SECTOR: u64 = 512;

/// The number of sectors that become unreadable in one run, one after another. Large clusters are slow to simulate.
fn sectors(variant: &Variant) -> usize {
    if variant.cluster >= 256 << 10 { 1 } else { 4 }
}

/// What a run has seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Images that could not be opened.
    pub refused: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that succeeded.
    pub completed: u64,
}

async fn read_all(image: &Image) -> Result<Vec<u8>, String> {
    let disk = chain::open(std::slice::from_ref(image)).await?;
    let all = Op::Read { offset: 0, len: disk.size() };
    let seen = run::execute(&disk, &all).await.map_err(|e| e.to_string());
    chain::close(disk).await?;
    match seen? {
        Seen::Bytes(bytes) => Ok(bytes.to_vec()),
        other => Err(format!("a read gave {other:?}")),
    }
}

/// A sector of the file that has data. Half of the sectors are in the first part of the file, where the metadata is.
fn random_sector(random: &mut Random, bytes: &[u8], cluster: u64) -> u64 {
    let len = bytes.len() as u64;
    for _ in 0..1000 {
        let bound = if random.one_in(2) { len.min(cluster * 6) } else { len };
        let sector = random.below(bound) / SECTOR;
        let start = usize::try_from(sector * SECTOR).expect("a small file");
        let end = bytes.len().min(start + 512);
        if bytes[start..end].iter().any(|byte| *byte != 0) {
            return sector;
        }
    }
    0
}

/// Sends a request. A failure must be `EIO`.
async fn attempt(
    disk: &oxblk_core::Backend,
    op: &Op,
    oracle: &mut CrashOracle,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let ticket = oracle.issue(op);
    match run::execute(disk, op).await {
        Ok(Seen::Bytes(bytes)) => oracle.observe(op.range().start, &bytes)?,
        Ok(_) => oracle.complete_for_good(op, ticket),
        Err(error) if error.raw_errno() == Errno::IO => {
            outcome.failed += 1;
            return Ok(());
        }
        Err(error) => return Err(format!("{op:?}: {error}")),
    }
    outcome.completed += 1;
    Ok(())
}

/// Uses an image of which one sector is unreadable: reads each part of the disk, then sends random requests.
async fn use_image(
    image: &Image,
    random: &mut Random,
    oracle: &mut CrashOracle,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let variant = image.variant;
    let Ok(disk) = chain::open(std::slice::from_ref(image)).await else {
        outcome.refused += 1;
        return Ok(());
    };
    let size = disk.size();
    let step = variant.cluster.min(64 << 10);
    for offset in (0..size).step_by(usize::try_from(step).expect("a small number")) {
        let op = Op::Read { offset, len: step.min(size - offset) };
        attempt(&disk, &op, oracle, outcome).await?;
    }
    let shape = Shape { alignment: 512, ..Shape::of(variant, size) };
    for _ in 0..30 {
        let op = shape.random_op(random);
        attempt(&disk, &op, oracle, outcome).await?;
    }
    // A failed flush of metadata makes the close fail.
    drop(chain::close(disk).await);
    Ok(())
}

async fn one_sector(
    variant: &'static Variant,
    good: &[u8],
    content: &[u8],
    random: &mut Random,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let sector = random_sector(random, good, variant.cluster);
    let image = Image { variant, disk: Disk::from_bytes(sector, good) };
    image.disk.make_unreadable(sector * SECTOR..(sector + 1) * SECTOR);
    let fail = |error: String| format!("sector {sector}: {error}");
    let mut oracle = CrashOracle::new(content.into());
    if random.one_in(2) {
        // A check that fails because of the sector is a report too.
        for fix in [Fix::Nothing, Fix::Leaks, Fix::All] {
            drop(chain::examine(&image, fix).await);
        }
    }
    use_image(&image, random, &mut oracle, outcome).await.map_err(fail)?;
    let image = Image { disk: Disk::from_bytes(sector, &image.disk.bytes()), ..image };
    let now = read_all(&image).await.map_err(|e| fail(format!("readable again: {e}")))?;
    oracle.check(&now).map_err(|e| fail(format!("readable again: {e}")))?;
    if variant.check {
        let checked = chain::check(&image, Tolerance::Leaks).await;
        checked.map_err(|e| fail(format!("readable again: {e}")))?;
    }
    Ok(())
}

/// Makes an image of a seed, and uses copies of it of which one sector is unreadable.
///
/// # Panics
/// When a request fails with another error than `EIO`, when data is wrong, or when damage spreads. The message contains the
/// seed.
pub fn latent_error(variant: &'static Variant, seed: u64) -> Outcome {
    let attempt = std::panic::AssertUnwindSafe(|| {
        sim::run(seed, async {
            let mut random = Random::new(seed);
            let (disk, _) = make(variant, &mut random).await?;
            let image = Image { variant, disk };
            let content = read_all(&image).await?;
            let good = image.disk.bytes();
            let mut outcome = Outcome::default();
            for _ in 0..sectors(variant) {
                one_sector(variant, &good, &content, &mut random, &mut outcome).await?;
            }
            Ok::<_, String>(outcome)
        })
    });
    match std::panic::catch_unwind(attempt).unwrap_or_else(|p| Err(crate::panic_text(&*p))) {
        Ok(outcome) => outcome,
        Err(error) => panic!("{} latent error, seed {seed}: {error}", variant.name),
    }
}

/// Uses an image of a seed on a disk that corrupts and misdirects requests at random.
///
/// # Panics
/// When the code under test panics, or a request waits forever. The message contains the seed.
pub fn wrong_data(variant: &'static Variant, seed: u64) {
    let attempt = std::panic::AssertUnwindSafe(|| {
        sim::run(seed, async {
            let mut random = Random::new(seed);
            let (disk, _) = make(variant, &mut random).await?;
            let kinds = [
                Damage::Corruption,
                Damage::LatentError,
                Damage::MisdirectedWrite { to: None },
                Damage::MisdirectedRead { from: None },
            ];
            let rule = |damage| DamageRule { chance: 0.02, ..DamageRule::always(damage) };
            disk.set_faults(Faults { damage: kinds.map(rule).to_vec(), ..Faults::default() });
            let image = Image { variant, disk };
            for fix in [Fix::Nothing, Fix::All] {
                if let Ok(disk) = chain::open(std::slice::from_ref(&image)).await {
                    use_it(&disk, variant, &mut random).await;
                    drop(chain::close(disk).await);
                }
                drop(chain::examine(&image, fix).await);
            }
            Ok::<_, String>(())
        })
    });
    let outcome = std::panic::catch_unwind(attempt);
    if let Err(error) = outcome.unwrap_or_else(|panic| Err(crate::panic_text(&*panic))) {
        panic!("{} wrong data, seed {seed}: {error}", variant.name);
    }
}
