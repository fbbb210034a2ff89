//! Fuzzes qcow2 table entries, refcounts, snapshot entries and compressed clusters. Parsing never panics, and an accepted entry
//! refers only to allowed offsets.

use oxblk_formats::qcow2::compression::{compress, decompress};
use oxblk_formats::qcow2::layout::{
    Compression, Geometry, L1Entry, L2Entry, L2Kind, RefcountTableEntry, parse_snapshot,
    refcount_get, refcount_max, refcount_set,
};

fn entry(geometry: Geometry, version: u32, entry: u64) {
    if let Ok(Some(offset)) = L1Entry(entry).l2_offset(geometry) {
        assert!(geometry.is_aligned(offset) && offset < 1 << 56);
    }
    if let Ok(Some(offset)) = RefcountTableEntry(entry).block_offset(geometry) {
        assert!(geometry.is_aligned(offset));
    }
    match L2Entry(entry).kind(geometry, version) {
        Ok(L2Kind::Data { host } | L2Kind::Zero { host: Some(host) }) => {
            assert!(geometry.is_aligned(host) && host != 0 && host < 1 << 56);
        }
        Ok(L2Kind::Compressed { host, len }) => {
            assert!(host < 1 << 56 && (1..=2 * geometry.cluster_size()).contains(&len));
            let again = L2Entry::compressed(geometry, host, len).expect("it came from an entry");
            assert_eq!(again.kind(geometry, version), Ok(L2Kind::Compressed { host, len }));
        }
        Ok(L2Kind::Zero { host: None } | L2Kind::Unallocated) | Err(_) => {}
    }
}

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let [bits, order, version, rest @ ..] = data else { return };
    let geometry = Geometry {
        cluster_bits: 9 + u32::from(bits % 13),
        refcount_order: u32::from(order % 7),
        extended_l2: false,
        data_file: false,
    };
    for word in rest.chunks_exact(8) {
        entry(geometry, 2 + u32::from(version % 2), u64::from_be_bytes(word.try_into().unwrap()));
    }

    let mut block = rest.to_vec();
    let order = geometry.refcount_order;
    for index in 0..(rest.len() as u64) * 8 + 2 {
        let before = refcount_get(&block, index, order);
        let value = index & refcount_max(order);
        assert_eq!(refcount_set(&mut block, index, order, value).is_ok(), before.is_some());
        assert_eq!(refcount_get(&block, index, order), before.map(|_| value));
    }

    if let Ok(Some((snapshot, len))) = parse_snapshot(rest) {
        assert!(snapshot.extra.len() <= 1024 && len <= rest.len() as u64 + 7);
    }

    let method = if version & 2 == 0 { Compression::Zlib } else { Compression::Zstd };
    let mut cluster = [0; 4096];
    let _ = decompress(method, rest, &mut cluster);
    for (to, from) in cluster.iter_mut().zip(rest) {
        *to = *from;
    }
    if let Ok(Some(compressed)) = compress(method, &cluster) {
        let mut back = [0; 4096];
        decompress(method, &compressed, &mut back).expect("what was compressed is decompressed");
        assert_eq!(back, cluster);
    }
}
