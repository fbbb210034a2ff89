//! Tests of the writes that change the bitmaps extension. Every possible torn write is tested.

use super::super::{Compression, Extensions, Geometry, Header, Incompatible};
use super::*;

const OLD: BitmapsExtension =
    BitmapsExtension { count: 3, directory_size: 96, directory_offset: 0x7_0000 };
const NEW: BitmapsExtension =
    BitmapsExtension { count: 0x0102, directory_size: 0x0304_0506, directory_offset: 0x1234_0000 };

/// The first cluster of an image.
fn head(cluster_bits: u32, edit: impl FnOnce(&mut Header)) -> Vec<u8> {
    let geometry =
        Geometry { cluster_bits, refcount_order: 4, extended_l2: false, data_file: false };
    let mut header = Header {
        version: 3,
        geometry,
        size: 0,
        l1_offset: 0,
        l1_entries: 0,
        refcount_table_offset: geometry.cluster_size(),
        refcount_table_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: Incompatible::empty(),
        compatible: super::super::Compatible::empty(),
        autoclear: Autoclear::empty(),
        header_length: 0,
        compression: Compression::Zlib,
        crypt_method: super::super::CryptMethod::None,
        backing_file: None,
        extensions: Extensions::default(),
        unknown_fields: Vec::new(),
    };
    edit(&mut header);
    let mut bytes = header.encode().expect("it fits");
    bytes.resize(1 << cluster_bits, 0);
    bytes
}

fn parse(head: &[u8]) -> Header {
    Header::parse(head, 1 << 30).unwrap_or_else(|error| panic!("{error}"))
}

/// Applies the writes. For each write, checks the header for every subset of sectors that a power cut can leave written.
fn apply_planned(start: &[u8], new: Option<&BitmapsExtension>) -> Vec<u8> {
    let before = parse(start);
    let writes = change_bitmaps_extension(start, new).expect("the extension fits");
    let mut now = start.to_vec();
    for (number, write) in writes.iter().enumerate() {
        let at = usize::try_from(write.offset).unwrap();
        let mut whole = now.clone();
        whole[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        let sectors: Vec<usize> =
            (at / SECTOR..(at + write.bytes.len()).div_ceil(SECTOR)).collect();
        assert!(sectors.len() <= 6);
        for subset in 0..1_u32 << sectors.len() {
            let mut left = now.clone();
            for (bit, sector) in sectors.iter().enumerate() {
                if subset >> bit & 1 == 1 {
                    let range = sector * SECTOR..(sector + 1) * SECTOR;
                    left[range.clone()].copy_from_slice(&whole[range]);
                }
            }
            let header = parse(&left);
            let bitmaps = header.extensions.bitmaps;
            let known = bitmaps == before.extensions.bitmaps || bitmaps == new.copied();
            assert!(known || bitmaps.is_none(), "write {number}: {bitmaps:?}");
            assert_eq!(header.backing_file, before.backing_file, "write {number}");
            assert_eq!(header.extensions.backing_format, before.extensions.backing_format);
            assert_eq!(header.extensions.unknown, before.extensions.unknown);
        }
        now = whole;
    }
    let after = parse(&now);
    assert_eq!(after.extensions.bitmaps, new.copied());
    assert_eq!(after.autoclear.contains(Autoclear::BITMAPS), new.is_some());
    now
}

#[test]
fn a_torn_write_leaves_a_valid_header_with_the_old_or_the_new_bitmaps_or_none() {
    for cluster_bits in [9, 10, 12, 16] {
        for name_len in [0, 1, 60, 150, 300, 480, 900] {
            for unknown in [0_usize, 8, 16, 40, 48, 56, 200, 360, 370] {
                let features = if cluster_bits > 12 { 392 } else { 0 };
                // A name that moves needs space for two copies.
                let needed = 112 + 16 + 48 + unknown.next_multiple_of(8) + features + name_len * 2;
                if needed > 1 << cluster_bits {
                    continue;
                }
                let plain = head(cluster_bits, |header| {
                    header.backing_file = (name_len > 0).then(|| "n".repeat(name_len));
                    header.extensions.backing_format = (name_len > 0).then(|| "raw".to_owned());
                    if unknown > 0 {
                        header.extensions.unknown = vec![(0x1234_5678, vec![5; unknown])];
                    }
                });
                let with = apply_planned(&plain, Some(&OLD));
                let changed = apply_planned(&with, Some(&NEW));
                let without = apply_planned(&changed, None);
                apply_planned(&without, Some(&NEW));
            }
        }
    }
}

#[test]
fn a_directory_is_replaced_by_another_in_one_write() {
    for backing in [None, Some("base.qcow2")] {
        let start = head(16, |header| {
            header.backing_file = backing.map(str::to_owned);
            header.extensions.backing_format = backing.map(|_| "qcow2".to_owned());
        });
        let with = apply_planned(&start, Some(&OLD));
        assert_eq!(change_bitmaps_extension(&with, Some(&NEW)).unwrap().len(), 1);
    }
}

#[test]
fn an_extension_in_front_of_others_stays_but_is_not_valid() {
    let start = head(16, |header| {
        header.autoclear = Autoclear::BITMAPS;
        header.extensions.bitmaps = Some(OLD);
        header.extensions.unknown = vec![(0x1234_5678, vec![5; 20])];
    });
    let without = apply_planned(&start, None);
    // The next change reuses the extension.
    apply_planned(&without, Some(&NEW));
}

#[test]
fn a_header_without_space_for_the_extension_is_refused() {
    let full = head(9, |header| header.backing_file = Some("n".repeat(370)));
    let refused = change_bitmaps_extension(&full, Some(&OLD)).unwrap_err();
    assert_eq!(refused.kind(), oxblk_core::ErrorKind::NoSpace);
}

#[test]
fn a_backing_name_directly_behind_the_extension_is_not_changed() {
    let mut start = head(16, |header| {
        header.autoclear = Autoclear::BITMAPS;
        header.extensions.bitmaps = Some(OLD);
        header.backing_file = Some("name".to_owned());
    });
    // There is no end marker: the extensions end where the name begins.
    let offset = u64::from_be_bytes(start[8..16].try_into().unwrap());
    let at = usize::try_from(offset).unwrap();
    start[8..16].copy_from_slice(&(offset - 8).to_be_bytes());
    start.copy_within(at..at + 4, at - 8);
    assert_eq!(parse(&start).extensions.bitmaps, Some(OLD));
    assert_eq!(parse(&start).backing_file.as_deref(), Some("name"));
    apply_planned(&start, None);
}
