//! The disks on which the tools work.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Writes the disk: a pseudorandom pattern of holes, random bytes and text, the same on every call.
pub(super) fn write(path: &Path, gib: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.set_len(gib << 30)?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let half = usize::try_from(MIB / 2).unwrap_or_default();
    let mut block = vec![0_u8; half * 2];
    for index in 0..gib << 10 {
        if next() % 5 < 2 {
            continue;
        }
        for (at, byte) in block.iter_mut().enumerate() {
            let random = next();
            let text = b"the quick brown fox jumps over the lazy dog\n";
            *byte = if at < half {
                random.to_le_bytes()[3]
            } else {
                let letter = usize::from(random.to_le_bytes()[5] % 3);
                text[(at / 4 + letter) % text.len()]
            };
        }
        file.seek(SeekFrom::Start(index * MIB))?;
        file.write_all(&block)?;
    }
    Ok(())
}

/// Changes one sector in every eighth MiB, if this MiB contains data.
pub(super) fn change(path: &Path, gib: u64) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    for index in (0..gib << 10).step_by(8) {
        let mut sector = [0_u8; 512];
        file.seek(SeekFrom::Start(index * MIB))?;
        file.read_exact(&mut sector)?;
        if sector.iter().any(|byte| *byte != 0) {
            file.seek(SeekFrom::Start(index * MIB))?;
            file.write_all(&[0x5a; 512])?;
        }
    }
    Ok(())
}

/// Swaps adjacent clusters in the L2 tables of an image with 64 KiB clusters whose metadata is allocated. After that, no guest
/// cluster is directly followed in the file by the next guest cluster.
pub(super) fn break_up(path: &Path) -> std::io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut header = [0_u8; 48];
    file.read_exact(&mut header)?;
    let word = |at: usize| {
        u64::from_be_bytes(std::array::from_fn(|i| header.get(at + i).copied().unwrap_or(0)))
    };
    let (entries, table) = (word(32) & 0xffff_ffff, word(40));
    let mut l1 = vec![0_u8; usize::try_from(entries).unwrap_or(0) * 8];
    file.seek(SeekFrom::Start(table))?;
    file.read_exact(&mut l1)?;
    for entry in l1.as_chunks::<8>().0 {
        let offset = u64::from_be_bytes(*entry) & 0x00ff_ffff_ffff_fe00;
        if offset == 0 {
            continue;
        }
        let mut l2 = vec![0_u8; 64 << 10];
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(&mut l2)?;
        for pair in l2.as_chunks_mut::<16>().0 {
            pair.rotate_left(8);
        }
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(&l2)?;
    }
    Ok(())
}
