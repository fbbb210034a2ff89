//! Fuzzes extended L2 entries. Parsing never panics, and the operations on a subcluster bitmap give the same results as the
//! operations on an array of subclusters.

use oxblk_formats::qcow2::layout::{
    ExtendedEntry, Geometry, L2Kind, SUBCLUSTERS, Subcluster, Subclusters, l2_table,
};

/// Returns the subclusters of the bitmap as an array.
fn spread(bitmap: Subclusters) -> Vec<Subcluster> {
    (0..SUBCLUSTERS)
        .map(|index| {
            let allocated = bitmap.0 >> index & 1 == 1;
            let zero = bitmap.0 >> (index + SUBCLUSTERS) & 1 == 1;
            match (allocated, zero) {
                (true, _) => Subcluster::Data,
                (false, true) => Subcluster::Zero,
                (false, false) => Subcluster::Unallocated,
            }
        })
        .collect()
}

fn entry(geometry: Geometry, both: ExtendedEntry) {
    let all = spread(both.bitmap);
    let mut at = 0;
    while at < SUBCLUSTERS {
        let (what, count) = both.bitmap.run(at);
        assert!(count >= 1 && at + count <= SUBCLUSTERS);
        let range = usize::try_from(at).unwrap()..usize::try_from(at + count).unwrap();
        assert!(all[range].iter().all(|one| *one == what));
        at += count;
        let goes_on = all.get(usize::try_from(at).unwrap()) == Some(&what);
        assert!(!goes_on, "a run that ends early");
    }
    match both.kind(geometry) {
        Ok(L2Kind::Data { host }) => {
            assert!(geometry.is_aligned(host) && host < 1 << 56);
            assert!(!both.bitmap.is_contradictory());
        }
        Ok(L2Kind::Unallocated) => assert!(!all.contains(&Subcluster::Data)),
        Ok(L2Kind::Compressed { host, len }) => {
            assert!(host < 1 << 56 && len <= 2 * geometry.cluster_size());
        }
        Ok(L2Kind::Zero { .. }) => panic!("bit 0 has no meaning"),
        Err(_) => {}
    }
}

fn change(geometry: Geometry, bitmap: Subclusters, from: u64, to: u64) {
    let size = geometry.cluster_size();
    let (from, to) = (from % size, to % (size + 1));
    if from >= to {
        return;
    }
    let mask = Subclusters::touched_by(geometry, from, to);
    for (index, one) in (0_u64..).zip(spread(Subclusters::NONE.with_data(mask))) {
        let start = index * geometry.subcluster_size();
        let touched = start < to && from < start + geometry.subcluster_size();
        assert_eq!(one == Subcluster::Data, touched);
    }
    let before = spread(bitmap);
    for (changed, new) in
        [(bitmap.with_data(mask), Subcluster::Data), (bitmap.with_zero(mask), Subcluster::Zero)]
    {
        for (index, (was, is)) in before.iter().zip(spread(changed)).enumerate() {
            assert_eq!(is, if mask >> index & 1 == 1 { new } else { *was });
        }
    }
    assert_eq!(bitmap.without_data().allocated(), 0);
}

/// Runs one input.
///
/// # Panics
/// When the code under test panics or violates a checked property.
pub fn run(data: &[u8]) {
    let [bits, rest @ ..] = data else { return };
    let geometry = Geometry {
        cluster_bits: 14 + u32::from(bits % 8),
        refcount_order: 4,
        extended_l2: true,
        data_file: false,
    };
    let entries: Vec<_> = l2_table(rest, geometry).collect();
    assert_eq!(entries.len(), rest.len() / 16);
    for both in entries {
        entry(geometry, both);
        change(geometry, both.bitmap, both.entry.0, both.entry.0 >> 22);
    }
}
