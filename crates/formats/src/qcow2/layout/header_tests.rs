//! Tests of the header: which headers are accepted, which are refused, and with which message.

use oxblk_core::Errno;
use proptest::prelude::*;

use super::super::{BitmapsExtension, FeatureKind, field_offsets};
use super::*;

/// A valid version 3 header of a disk of 64 MiB, with 64 KiB clusters.
fn good() -> Header {
    Header {
        version: 3,
        geometry: Geometry {
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            data_file: false,
        },
        size: 64 << 20,
        crypt_method: CryptMethod::None,
        l1_offset: 0x3_0000,
        l1_entries: 1,
        refcount_table_offset: 0x1_0000,
        refcount_table_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: 0,
        incompatible: Incompatible::empty(),
        compatible: Compatible::empty(),
        autoclear: Autoclear::empty(),
        header_length: 112,
        compression: Compression::Zlib,
        backing_file: None,
        extensions: Extensions::default(),
        unknown_fields: Vec::new(),
    }
}

/// The first cluster of the valid image with some bytes replaced.
fn spoiled(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = good().encode().unwrap();
    bytes.resize(0x1_0000, 0);
    for (offset, change) in changes {
        bytes[*offset..*offset + change.len()].copy_from_slice(change);
    }
    bytes
}

fn refused(changes: &[(usize, &[u8])]) -> String {
    let bytes = spoiled(changes);
    Header::parse(&bytes, bytes.len() as u64).unwrap_err().to_string()
}

fn be32(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn be64(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

/// Offset of the first extension.
const EXTENSIONS: usize = 112;

#[test]
fn a_header_survives_encoding_and_parsing() {
    let mut header = good();
    header.backing_file = Some("base.qcow2".into());
    header.extensions.backing_format = Some("qcow2".into());
    header.extensions.unknown = vec![(0x1234_5678, vec![1, 2, 3])];
    header.autoclear = Autoclear::BITMAPS;
    header.extensions.bitmaps =
        Some(BitmapsExtension { count: 1, directory_size: 32, directory_offset: 0x7_0000 });
    header.incompatible = Incompatible::COMPRESSION | Incompatible::DIRTY;
    header.compression = Compression::Zstd;
    header.unknown_fields = vec![9; 8];
    header.header_length = 120;
    let bytes = header.encode().unwrap();
    let mut parsed = Header::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(parsed.extensions.feature_names.len(), 8);
    parsed.extensions.feature_names.clear();
    assert_eq!(parsed, header);
}

#[test]
fn extensions_are_found_behind_a_header_of_odd_length() {
    let mut header = good();
    header.unknown_fields = vec![0; 153];
    header.header_length = 265;
    header.extensions.unknown = vec![(7, vec![1; 13]), (9, vec![])];
    let bytes = header.encode().unwrap();
    let mut parsed = Header::parse(&bytes, bytes.len() as u64).unwrap();
    parsed.extensions.feature_names.clear();
    assert_eq!(parsed, header);
}

#[test]
fn a_version_2_header_ends_after_72_bytes() {
    let header =
        Header { version: 2, header_length: 72, backing_file: Some("base".into()), ..good() };
    let bytes = header.encode().unwrap();
    assert_eq!(bytes.len(), 72 + 8 + 4);
    assert_eq!(Header::parse(&bytes, bytes.len() as u64).unwrap(), header);
}

#[test]
fn feature_fields_are_ignored_in_version_2() {
    let bytes = spoiled(&[(4, &be32(2)), (72, &[0; 40]), (80, &be32(5)), (84, &be32(8))]);
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(header.incompatible, Incompatible::empty());
    assert_eq!(header.geometry.refcount_order, 4);
}

#[test]
fn small_clusters_have_no_feature_names() {
    let header = Header {
        geometry: Geometry {
            cluster_bits: 12,
            refcount_order: 4,
            extended_l2: false,
            data_file: false,
        },
        l1_entries: 32,
        ..good()
    };
    assert_eq!(header.encode().unwrap().len(), 120);
}

#[test]
fn header_faults_are_reported_with_the_messages_of_qemus_tools() {
    type Changes<'a> = &'a [(usize, &'a [u8])];
    let cases: &[(Changes<'_>, &str)] = &[
        (&[(0, b"QFI\0")], "Image is not in qcow2 format"),
        (&[(4, &be32(1))], "Unsupported qcow2 version 1"),
        (&[(20, &be32(8))], "Unsupported cluster size: 2^8"),
        (&[(20, &be32(22))], "Unsupported cluster size: 2^22"),
        (&[(100, &be32(103))], "qcow2 header too short"),
        (&[(100, &be32(65_537))], "qcow2 header exceeds cluster size"),
        (&[(8, &be64(65_537))], "Invalid backing file offset"),
        (&[(8, &be64(1024)), (16, &be32(1024))], "Backing file name too long"),
        (&[(8, &be64(65_530)), (16, &be32(7))], "Backing file name too long"),
        (&[(96, &be32(7))], "Reference count entry width too large; may not exceed 64 bits"),
        (&[(32, &be32(3))], "Unsupported encryption method 3"),
        (&[(32, &be32(2))], "Missing CRYPTO header for crypt method 2"),
        (&[(56, &be32(129))], "Reference count table too large"),
        (&[(48, &be64(0x1_0200))], "Reference count table offset invalid"),
        (&[(48, &be64(1 << 63))], "Reference count table offset invalid"),
        (&[(36, &be32((4 << 20) + 1))], "Active L1 table too large"),
        (&[(40, &be64(0x3_0008))], "Active L1 table offset invalid"),
        (&[(40, &be64(u64::MAX - 0xffff))], "Active L1 table offset invalid"),
        (&[(24, &be64(1 << 61))], "Image is too big"),
        (&[(24, &be64((512 << 20) + 1))], "L1 table is too small"),
        (&[(72, &be64(8))], "qcow2: Compression type incompatible feature bit must not be set"),
        (&[(104, &[1])], "qcow2: Compression type incompatible feature bit must be set"),
        (&[(104, &[9])], "qcow2: unknown compression type: 9"),
        (&[(72, &be64(16)), (20, &be32(13))], "Unsupported subcluster size: 256"),
        (&[(EXTENSIONS + 4, &be32(u32::MAX))], "Header extension too large"),
        (&[(EXTENSIONS, &be32(5)), (EXTENSIONS + 4, &be32(65_420))], "Header extension too large"),
        (
            &[(EXTENSIONS, &be32(0xe279_2aca)), (EXTENSIONS + 4, &be32(16))],
            "ERROR: ext_backing_format: len=16 too large (>=16)",
        ),
        (
            &[(EXTENSIONS, &be32(0x0537_be77)), (EXTENSIONS + 4, &be32(16))],
            "CRYPTO header extension only expected with LUKS encryption method",
        ),
    ];
    for (changes, message) in cases {
        assert_eq!(refused(changes), *message);
    }
}

#[test]
fn an_invalid_snapshot_table_is_accepted_only_for_a_check() {
    for (changes, message) in [
        (&[(60, &be32(65_537)[..])], "Snapshot table too large"),
        (&[(64, &be64(0x200)[..])], "Snapshot table offset invalid"),
    ] {
        let bytes = spoiled(changes);
        let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
        assert_eq!(header.require_snapshots().unwrap_err().to_string(), message);
    }
}

#[test]
fn unknown_features_are_reported_with_names_from_the_images_table() {
    let bits = be64(1 << 5 | 1 << 7 | 1 << 63);
    let name = [&[0, 5][..], b"frobnication\0"].concat();
    let long = [&[0, 7][..], &[b'y'; 46]].concat();
    let other_kind = [&[1, 63][..], b"compatible\0"].concat();
    let entry = |index: usize| EXTENSIONS + 8 + 48 * index;
    let message = refused(&[
        (72, &bits),
        (entry(0), &name),
        (entry(1), &long),
        (entry(2), &other_kind),
        (entry(7), &[0xff; 48]),
    ]);
    let long = "y".repeat(46);
    assert_eq!(
        message,
        format!(
            "Unsupported qcow2 feature(s): frobnication, {long}, \
             Unknown incompatible feature: 8000000000000000"
        )
    );
}

#[test]
fn feature_names_before_a_broken_extension_are_used() {
    let name = [&[0, 5][..], b"frobnication\0"].concat();
    let message = refused(&[
        (72, &be64(1 << 5)),
        (EXTENSIONS + 8, &name),
        (EXTENSIONS + 8 + 384, &be64(u64::MAX)),
    ]);
    assert_eq!(message, "Unsupported qcow2 feature(s): frobnication");
}

#[test]
fn header_bytes_behind_the_end_of_a_short_file_count_as_zeroes() {
    let bytes = good().encode().unwrap();
    let parse = |len: usize| Header::parse(&bytes[..len], len as u64);
    assert_eq!(parse(3).unwrap_err().to_string(), "Image is not in qcow2 format");
    assert_eq!(parse(4).unwrap_err().to_string(), "Unsupported qcow2 version 0");
    assert_eq!(parse(71).unwrap_err().to_string(), "qcow2 header too short");
    assert!(parse(104).unwrap().extensions.feature_names.is_empty());
}

#[test]
fn a_head_shorter_than_the_header_in_the_file_is_refused() {
    let bytes = good().encode().unwrap();
    let extent = usize::try_from(header_extent(&bytes)).unwrap();
    assert!(Header::parse(&bytes[..extent], 1 << 20).is_ok());
    assert_eq!(Header::parse(&bytes[..extent - 1], 1 << 20).unwrap_err().raw_errno(), Errno::IO);
}

#[test]
fn encoding_fails_if_the_backing_name_does_not_fit() {
    let small = Header {
        geometry: Geometry {
            cluster_bits: 9,
            refcount_order: 4,
            extended_l2: false,
            data_file: false,
        },
        backing_file: Some("x".repeat(393)),
        ..good()
    };
    assert_eq!(small.encode().unwrap_err().to_string(), "No space left on device");
    assert!(Header { backing_file: Some("x".repeat(392)), ..small }.encode().is_ok());
    let long = Header { backing_file: Some("x".repeat(1024)), ..good() };
    assert_eq!(long.encode().unwrap_err().to_string(), "Backing file name too long");
}

#[test]
fn corrupt_images_are_not_writable_and_missing_refcount_tables_are_refused() {
    let corrupt = Header { incompatible: Incompatible::CORRUPT, ..good() };
    assert_eq!(
        corrupt.require_writable().unwrap_err().to_string(),
        "qcow2: Image is corrupt; cannot be opened read/write"
    );
    assert!(good().require_writable().is_ok());
    let bare = Header { refcount_table_clusters: 0, ..good() };
    assert!(bare.require_refcounts().is_err());
    assert!(good().require_refcounts().is_ok());
}

#[test]
fn field_offsets_match_the_parsed_fields() {
    let bytes = spoiled(&[
        (usize::try_from(field_offsets::SIZE).unwrap(), &be64(4096)),
        (usize::try_from(field_offsets::AUTOCLEAR).unwrap(), &be64(1 << 40)),
        (usize::try_from(field_offsets::L1_TABLE_OFFSET).unwrap(), &be64(0x9_0000)),
    ]);
    let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!((header.size, header.l1_offset), (4096, 0x9_0000));
    assert_eq!(header.autoclear.bits(), 1 << 40);
    assert_eq!(header.extensions.feature_names[0].kind, FeatureKind::Incompatible);
}

proptest! {
    #[test]
    fn every_accepted_header_is_within_the_limits_of_the_format(
        changes in prop::collection::vec((0usize..600, any::<u8>()), 0..8)
    ) {
        let mut bytes = spoiled(&[]);
        for (offset, byte) in changes {
            bytes[offset] = byte;
        }
        if let Ok(header) = Header::parse(&bytes, bytes.len() as u64) {
            let geometry = header.geometry;
            prop_assert!((9..=21).contains(&geometry.cluster_bits));
            prop_assert!(geometry.refcount_order <= 6);
            prop_assert!(u64::from(header.l1_entries) * 8 <= MAX_L1_BYTES);
            prop_assert!(geometry.l1_entries_for(header.size) <= Some(header.l1_entries.into()));
            prop_assert!(geometry.is_aligned(header.l1_offset));
            prop_assert!(geometry.is_aligned(header.refcount_table_offset));
            prop_assert!(header.backing_file.is_none_or(|name| name.len() <= 1023));
        }
    }
}

#[test]
fn a_broken_bitmaps_extension_is_reported_by_require_bitmaps() {
    let bitmaps = |autoclear: u64, len: u32, fields: [u64; 3]| {
        let bytes = spoiled(&[
            (88, &be64(autoclear)),
            (EXTENSIONS, &be32(0x2385_2875)),
            (EXTENSIONS + 4, &be32(len)),
            (EXTENSIONS + 8, &fields.map(u64::to_be_bytes).concat()),
            (EXTENSIONS + 8 + len as usize, &[0; 8]),
        ]);
        let header = Header::parse(&bytes, bytes.len() as u64).unwrap();
        let fault = header.require_bitmaps().err().map(|error| error.to_string());
        (fault.unwrap_or_default(), header.extensions.bitmaps)
    };
    let good = [1 << 32, 32, 0x7_0000];
    assert_eq!(bitmaps(1, 24, good).1.unwrap().directory_offset, 0x7_0000);
    assert_eq!(bitmaps(0, 24, good), (String::new(), None));
    for (len, fields, message) in [
        (16, good, "bitmaps_ext: Invalid extension length"),
        (24, [1 << 32 | 1, 32, 0x7_0000], "bitmaps_ext: Reserved field is not zero"),
        (24, [0, 32, 0x7_0000], "found bitmaps extension with zero bitmaps"),
        (24, [1 << 32, 32, 0x7_0200], "bitmaps_ext: invalid bitmap directory offset"),
        (
            24,
            [1 << 32, 1 << 40, 0x7_0000],
            "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum supported size (67107840)",
        ),
        (
            24,
            [70_000 << 32, 32, 0x7_0000],
            "bitmaps_ext: Image has 70000 bitmaps, exceeding the QEMU supported maximum of 65535",
        ),
    ] {
        assert_eq!(bitmaps(1, len, fields), (message.to_owned(), None));
    }
}
