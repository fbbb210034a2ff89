//! A bit of what the header says of the encryption is wrong, and a repair runs: it frees nothing that is in use, so that everything is there again when
//! the bit is right, even if the image was written to in between.

use oxblk_core::check::Fix;
use oxblk_core::{Backend, Result, WriteFlags};
use oxblk_ring::IoBuf;
use oxblk_ring::sim::{self, Disk};

use super::changes_fail::set::{Held, Kind, Set};

/// The guest range that is written after a repair; nothing of it is allocated.
const WRITTEN: std::ops::Range<usize> = 210 << 10..242 << 10;

/// Where the extensions lie that point somewhere, with their heads.
fn extensions(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut at, mut found) = (usize::try_from(word(100)).unwrap(), Vec::new());
    while word(at) != 0 {
        let end = at + 8 + usize::try_from(word(at + 4)).unwrap().next_multiple_of(8);
        // Bitmaps and the LUKS header.
        if [0x2385_2875, 0x0537_be77].contains(&word(at)) {
            found.push(at..end);
        }
        at = end;
    }
    found
}

async fn repair(image: &Set, fix: Fix) -> Result<()> {
    let backend = image.open_for_check().await?;
    let node = backend.node()?;
    let outcome = node.driver().check().unwrap().check(fix, &|_| ()).await;
    drop(node);
    backend.close().await?;
    outcome.map(drop)
}

async fn write_somewhere(image: &Set) -> Result<()> {
    let backend: Backend = image.open().await?;
    let data = IoBuf::from(vec![0xee; WRITTEN.len()]);
    let written = backend.write(WRITTEN.start as u64, data, WriteFlags::empty()).await;
    written.and(backend.close().await)
}

/// All is there once the header says what it said.
async fn assert_recoverable(damaged: &Set, original: &Set, old: &Held, written: bool, what: &str) {
    let mut bytes = damaged.disk.bytes();
    let head = &original.disk.bytes()[..4096];
    bytes[..4096].copy_from_slice(head);
    let restored = damaged.map(|_| Disk::from_bytes(9, &bytes));
    repair(&restored, Fix::All).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    restored.assert_sound(false, what).await;
    let mut now = Held::by(&restored, what).await;
    if written {
        now.active[WRITTEN].copy_from_slice(&old.active[WRITTEN]);
        // They were in use.
        now.bitmaps.clone_from(&old.bitmaps);
    }
    assert!(now.active == old.active, "{what}: data is lost");
    assert!(now.snapshots == old.snapshots, "{what}: a snapshot is lost");
    assert!(now.bitmaps == old.bitmaps, "{what}: a bitmap is lost");
}

fn flip_each_bit(kind: &Kind) {
    let original = kind.make();
    let bytes = original.disk.bytes();
    let old = sim::run(1, Held::by(&original, kind.name));
    let fields = [("encryption", 32..36)].into_iter();
    let extensions = extensions(&bytes).into_iter().map(|range| ("extension", range));
    for (name, range) in fields.chain(extensions) {
        for bit in range.start * 8..range.end * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 0x80 >> (bit % 8);
            for fix in [Fix::Leaks, Fix::All] {
                let what = format!("{}: {name}, bit {bit}, {fix:?}", kind.name);
                let damaged = original.map(|_| Disk::from_bytes(8, &flipped));
                sim::run(1, async {
                    // Either may be refused. Then nothing has changed.
                    drop(repair(&damaged, fix).await);
                    if damaged.disk.bytes() != flipped {
                        assert_recoverable(&damaged, &original, &old, false, &what).await;
                    }
                    let repaired = damaged.disk.bytes();
                    drop(write_somewhere(&damaged).await);
                    if damaged.disk.bytes() != repaired {
                        assert_recoverable(&damaged, &original, &old, true, &what).await;
                    }
                });
            }
        }
    }
}

#[test]
fn a_repair_without_a_key_does_not_free_the_luks_header() {
    let create = "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1";
    flip_each_bit(&Kind::new("LUKS", create));
}
