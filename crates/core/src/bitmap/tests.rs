use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use roaring::RoaringTreemap;

use super::*;

const SIZE: u64 = 40 << 20;
const GRAIN: u64 = 512;

#[derive(Debug, Clone)]
enum Op {
    Set(u64, u64),
    Reset(u64, u64),
}

fn op(size: u64) -> impl Strategy<Value = Op> {
    let long = (0..size, 0..size);
    let short = (0..size, 0..200_000u64);
    (any::<bool>(), prop_oneof![1 => long, 4 => short]).prop_map(|(set, (offset, len))| {
        if set { Op::Set(offset, len) } else { Op::Reset(offset, len) }
    })
}

/// A simple model of a map: the set of its dirty granules.
struct Oracle {
    bits: RoaringTreemap,
    size: u64,
    grain: u64,
}

impl Oracle {
    fn new(size: u64, grain: u64) -> Self {
        Self { bits: RoaringTreemap::new(), size, grain }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Set(_, 0) | Op::Reset(_, 0) => {}
            Op::Set(offset, len) => {
                let past = (offset + len).min(self.size).div_ceil(self.grain);
                self.bits.insert_range(offset / self.grain..past);
            }
            Op::Reset(offset, len) => {
                let end = offset + len;
                let past = if end >= self.size {
                    self.size.div_ceil(self.grain)
                } else {
                    end / self.grain
                };
                let first = offset.div_ceil(self.grain);
                if first < past {
                    self.bits.remove_range(first..past);
                }
            }
        }
    }
}

fn apply(map: &RangeMap, op: &Op) {
    match *op {
        Op::Set(offset, len) => map.set(offset, len),
        Op::Reset(offset, len) => map.reset(offset, len),
    }
}

fn bits_of(map: &RangeMap) -> RoaringTreemap {
    let grain = map.granularity();
    let mut bits = RoaringTreemap::new();
    for area in map.areas() {
        bits.insert_range(area.start / grain..area.end.div_ceil(grain));
    }
    bits
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_sequence_of_sets_and_resets_agrees_with_the_model(
        size in 1..SIZE,
        shift in 9u32..20,
        ops in prop::collection::vec(op(SIZE), 1..40),
        probes in prop::collection::vec((0..SIZE, 0..SIZE), 20),
    ) {
        let map = RangeMap::new(size, 1 << shift).unwrap();
        let mut oracle = Oracle::new(size, 1 << shift);
        for op in &ops {
            apply(&map, op);
            oracle.apply(op);
            prop_assert_eq!(map.dirty_granules(), oracle.bits.len());
        }
        prop_assert_eq!(bits_of(&map), oracle.bits.clone());
        for (offset, len) in probes {
            prop_assert_eq!(map.get(offset), offset < size && oracle.bits.contains(offset >> shift));
            let end = (offset + len).min(size);
            let granules = (offset >> shift)..end.div_ceil(1 << shift);
            let find = |dirty: bool| {
                let mut granules = granules.clone();
                let found = granules.find(|g| oracle.bits.contains(*g) == dirty)?;
                Some((found << shift).max(offset))
            };
            let (dirty, zero) = if len == 0 || offset >= end { (None, None) } else { (find(true), find(false)) };
            prop_assert_eq!(map.next_dirty(offset, len), dirty);
            prop_assert_eq!(map.next_zero(offset, len), zero);
        }
    }

    #[test]
    fn merging_marks_every_granule_that_the_source_touches(
        ops in prop::collection::vec(op(SIZE), 1..12),
        more in prop::collection::vec(op(SIZE), 1..12),
        from in 9u32..20,
        to in 9u32..20,
    ) {
        let source = RangeMap::new(SIZE, 1 << from).unwrap();
        let target = RangeMap::new(SIZE, 1 << to).unwrap();
        let mut oracle = Oracle::new(SIZE, 1 << to);
        ops.iter().for_each(|op| apply(&source, op));
        for op in &more {
            apply(&target, op);
            oracle.apply(op);
        }
        for area in source.areas() {
            oracle.apply(&Op::Set(area.start, area.end - area.start));
        }
        target.merge(&source).unwrap();
        prop_assert_eq!(bits_of(&target), oracle.bits);
    }

    #[test]
    fn a_map_serialised_in_chunks_of_any_size_is_restored(
        size in 1..SIZE,
        shift in 9u32..14,
        chunk in 1u64..9,
        ops in prop::collection::vec(op(SIZE), 1..12),
    ) {
        let map = RangeMap::new(size, 1 << shift).unwrap();
        let copy = RangeMap::new(size, 1 << shift).unwrap();
        copy.set(0, size);
        ops.iter().for_each(|op| apply(&map, op));
        let step = chunk * map.chunk_alignment();
        let mut offset = 0;
        while offset < size {
            let len = step.min(size - offset);
            let bytes = usize::try_from(map.serialized_len(offset, len).unwrap()).unwrap();
            let mut data = vec![0xff; bytes];
            map.serialize(offset, len, &mut data).unwrap();
            copy.deserialize(offset, len, &data).unwrap();
            offset += len;
        }
        prop_assert_eq!(bits_of(&copy), bits_of(&map));
        prop_assert_eq!(copy.dirty_granules(), map.dirty_granules());
    }
}

#[test]
fn granule_n_is_bit_n_of_the_serialised_bytes_and_bits_past_the_end_are_dropped() {
    let map = RangeMap::new(10 * GRAIN, GRAIN).unwrap();
    map.set(9 * GRAIN, 1);
    map.set(0, 1);
    let mut data = [0; 8];
    map.serialize(0, 10 * GRAIN, &mut data).unwrap();
    assert_eq!(data, [1, 2, 0, 0, 0, 0, 0, 0]);
    map.deserialize(0, 10 * GRAIN, &[0xff; 8]).unwrap();
    assert_eq!(map.dirty_granules(), 10);
    assert_eq!(map.deserialize(0, 10 * GRAIN, &[0; 16]), Err(BitmapError::Chunk));
    assert_eq!(map.deserialize(GRAIN, 9 * GRAIN, &[0; 8]), Err(BitmapError::Chunk));
    assert_eq!(map.serialized_len(u64::MAX - 1, 5), Err(BitmapError::Chunk));
    map.deserialize_fill(0, 10 * GRAIN, false).unwrap();
    assert!(map.is_clean());
}

#[test]
fn invalid_sizes_are_refused_and_huge_clean_maps_take_little_memory() {
    assert_eq!(RangeMap::new(1 << 30, 1000).unwrap_err(), BitmapError::Granularity);
    assert_eq!(RangeMap::new(1 << 30, 256).unwrap_err(), BitmapError::Granularity);
    assert_eq!(RangeMap::new(1 << 30, 1 << 32).unwrap_err(), BitmapError::Granularity);
    assert_eq!(RangeMap::new(u64::MAX, 512).unwrap_err(), BitmapError::TooBig);
    let map = RangeMap::new(1 << 50, 512).unwrap();
    map.set((1 << 50) - 1, 1);
    map.set(1 << 40, 1 << 20);
    assert_eq!(map.next_dirty(0, u64::MAX), Some(1 << 40));
    assert_eq!(map.next_dirty((1 << 40) + (1 << 20), u64::MAX), Some((1 << 50) - 512));
    assert!(map.memory() < 3 << 20, "{} bytes", map.memory());
    assert_eq!(RangeMap::new(u64::MAX, 1 << 31).unwrap().next_zero(5, 10), Some(5));
    assert_eq!(RangeMap::new(0, 512).unwrap().next_dirty(0, u64::MAX), None);
}

#[test]
fn dirty_areas_are_limited_to_the_requested_length() {
    let map = RangeMap::new(SIZE, 4096).unwrap();
    map.set(10_000, 50_000);
    assert_eq!(map.next_dirty_area(0..SIZE, u64::MAX), Some(8192..61440));
    assert_eq!(map.next_dirty_area(9000..SIZE, 8192), Some(9000..20480));
    assert_eq!(map.next_dirty_area(9000..10_000, u64::MAX), Some(9000..10_000));
    assert_eq!(map.next_dirty_area(61440..SIZE, u64::MAX), None);
}

#[test]
fn merging_maps_of_different_sizes_is_refused() {
    let error = RangeMap::new(1024, 512).unwrap().merge(&RangeMap::new(2048, 512).unwrap());
    assert_eq!(
        error.unwrap_err().to_string(),
        "Bitmaps are of different sizes (destination size is 1024, source size is 2048) and can't \
         be merged"
    );
}

/// Calls `run` for `rounds` rounds without delays, and then for fewer rounds with random delays between the steps of
/// each thread.
fn race(rounds: u64, run: impl Fn(u64)) {
    // Under Miri the test runs several thousand times slower.
    let rounds = if cfg!(miri) { rounds / 1000 } else { rounds };
    run(rounds);
    for seed in 1..4 {
        oxblk_ring::perturb::start(seed);
        run(rounds.div_ceil(100));
    }
    oxblk_ring::perturb::stop();
}

#[test]
fn no_dirty_bit_is_lost_while_another_thread_clears_the_bits_that_it_finds() {
    race(20_000, mark_and_clear);
}

fn mark_and_clear(rounds: u64) {
    const THREADS: u64 = 4;
    let map = Arc::new(RangeMap::new(THREADS * rounds * GRAIN, GRAIN).unwrap());
    let stop = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let map = map.clone();
                // The threads set the bits of interleaved granules, so that all threads change every word.
                scope.spawn(move || {
                    (0..rounds).for_each(|n| map.set((n * THREADS + thread) * GRAIN, GRAIN));
                })
            })
            .collect();
        let reader = scope.spawn(|| {
            let mut seen = 0;
            loop {
                let last_round = stop.load(Ordering::SeqCst);
                let mut at = 0;
                while let Some(found) = map.next_dirty(at, u64::MAX) {
                    map.reset(found, GRAIN);
                    seen += 1;
                    at = found + GRAIN;
                }
                if last_round {
                    return seen;
                }
            }
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        stop.store(true, Ordering::SeqCst);
        reader.join().unwrap()
    });
    assert_eq!(seen, THREADS * rounds);
    assert!(map.is_clean());
}

#[test]
fn a_bit_set_while_its_neighbours_are_cleared_keeps_its_summaries() {
    race(50_000, set_beside_clearing);
}

fn set_beside_clearing(rounds: u64) {
    let map = Arc::new(RangeMap::new(1 << 30, GRAIN).unwrap());
    std::thread::scope(|scope| {
        for side in 0..2u64 {
            let map = &map;
            scope.spawn(move || {
                let mine = side * GRAIN;
                for _ in 0..rounds {
                    map.set(mine, GRAIN);
                    assert!(map.next_dirty(mine, GRAIN).is_some());
                    assert!(map.next_dirty(0, u64::MAX).is_some());
                    map.reset(mine, GRAIN);
                }
            });
        }
    });
    assert_eq!(map.next_dirty(0, u64::MAX), None);
    map.set(5 * GRAIN, 1);
    assert_eq!(map.next_dirty(0, u64::MAX), Some(5 * GRAIN));
}

#[test]
fn no_dirty_bit_is_lost_while_successors_are_created_and_reclaimed() {
    race(30_000, mark_while_successors_change);
}

fn mark_while_successors_change(rounds: u64) {
    let bitmap = DirtyBitmap::new("b", 2 * rounds * GRAIN, GRAIN).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2u64)
            .map(|thread| {
                let bitmap = &bitmap;
                scope.spawn(move || {
                    (0..rounds).for_each(|n| bitmap.mark((n * 2 + thread) * GRAIN, GRAIN));
                })
            })
            .collect();
        let bitmap = &bitmap;
        let stop = &stop;
        scope.spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                bitmap.create_successor().unwrap().reclaim();
                let old = bitmap.clear().unwrap();
                bitmap.restore(&old);
                bitmap.resize(2 * rounds * GRAIN).unwrap();
            }
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(bitmap.map().dirty_granules(), 2 * rounds);
}

#[test]
fn a_successor_replaces_the_bitmap_after_success_and_is_merged_after_failure() {
    let bitmap = DirtyBitmap::new("b", 1 << 20, 4096).unwrap();
    bitmap.mark(0, 1);
    let job = bitmap.create_successor().unwrap();
    bitmap.mark(8192, 1);
    assert_eq!(job.frozen().count(), 4096);
    assert!(bitmap.is_recording() && !bitmap.is_enabled() && bitmap.is_busy());
    assert_eq!(
        bitmap.create_successor().err().unwrap().to_string(),
        "Bitmap 'b' is currently in use by another operation and cannot be used"
    );
    drop(job);
    assert_eq!(bitmap.map().count(), 8192);
    assert!(bitmap.is_enabled() && !bitmap.is_busy());

    let job = bitmap.create_successor().unwrap();
    bitmap.mark(65536, 1);
    job.abdicate();
    let areas: Vec<_> = bitmap.map().areas().map(|area| (area.start, area.end)).collect();
    assert_eq!(areas, [(65536, 69632)]);
    assert!(bitmap.is_enabled() && !bitmap.is_busy());
}

#[test]
fn restoring_a_bitmap_keeps_a_size_that_it_got_after_the_clear() {
    let bitmap = DirtyBitmap::new("b", 1 << 20, 4096).unwrap();
    bitmap.mark(0, 1);
    bitmap.mark((1 << 20) - 1, 1);
    let old = bitmap.clear().unwrap();
    bitmap.resize(1 << 21).unwrap();
    bitmap.mark((1 << 21) - 1, 1);
    bitmap.restore(&old);
    let map = bitmap.map();
    assert_eq!((map.size(), map.dirty_granules()), (1 << 21, 3));
    let old = bitmap.clear().unwrap();
    bitmap.resize(1 << 19).unwrap();
    bitmap.restore(&old);
    assert_eq!((bitmap.map().size(), bitmap.map().dirty_granules()), (1 << 19, 1));
}

#[test]
fn a_reader_sees_all_earlier_dirty_bits_while_the_map_is_replaced() {
    race(3_000, read_while_the_map_is_replaced);
}

fn read_while_the_map_is_replaced(rounds: u64) {
    let bitmap = DirtyBitmap::new("b", 1 << 30, GRAIN).unwrap();
    bitmap.mark(5 * GRAIN, 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (bitmap, stop) = (&bitmap, &stop);
        scope.spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                bitmap.resize(1 << 30).unwrap();
                let successor = bitmap.create_successor().unwrap();
                bitmap.mark(7 * GRAIN, 1);
                successor.reclaim();
            }
        });
        let mut seven = false;
        for _ in 0..rounds {
            let all = bitmap.everything().unwrap();
            assert!(all.get(5 * GRAIN));
            seven |= all.get(7 * GRAIN);
            assert_eq!(all.get(7 * GRAIN), seven);
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn a_disabled_bitmap_and_its_successor_record_no_writes() {
    let bitmap = DirtyBitmap::new("b", 1 << 20, 4096).unwrap();
    bitmap.set_enabled(false);
    bitmap.mark(0, 1);
    let job = bitmap.create_successor().unwrap();
    bitmap.mark(0, 1);
    job.abdicate();
    assert!(bitmap.map().is_clean());
    assert!(!bitmap.is_recording());
}

#[test]
fn a_check_refuses_a_bitmap_in_a_state_that_it_checks() {
    let bitmap = DirtyBitmap::new("b", 1 << 20, 4096).unwrap();
    assert!(bitmap.check(Checks::CHANGE).is_ok());
    bitmap.set_read_only(true);
    assert!(bitmap.check(Checks::READ).is_ok());
    assert_eq!(bitmap.check(Checks::CHANGE), Err(BitmapError::ReadOnly("b".into())));
    bitmap.set_inconsistent();
    assert_eq!(bitmap.check(Checks::READ), Err(BitmapError::Inconsistent("b".into())));
    assert!(!bitmap.is_recording());
    let busy = bitmap.hold().unwrap();
    assert_eq!(bitmap.check(Checks::READ), Err(BitmapError::Busy("b".into())));
    drop(busy);
    assert!(bitmap.hold().is_ok());
}

#[test]
fn a_list_records_writes_in_all_its_bitmaps_and_refuses_duplicate_names() {
    let list = BitmapList::new();
    list.mark(0, 1);
    let recording = Cell::new(false);
    let add = |name: &str, granularity| {
        let bitmap = DirtyBitmap::new(name, 1 << 20, granularity)?;
        list.insert(std::slice::from_ref(&bitmap), |on| recording.set(on)).map(|()| bitmap)
    };
    let first = add("first", 65536).unwrap();
    let second = add("second", 4096).unwrap();
    assert!(recording.get());
    assert_eq!(add("first", 512).err(), Some(BitmapError::Exists("first".into())));
    let long = "x".repeat(MAX_NAME + 1);
    assert_eq!(add(&long, 512).err(), Some(BitmapError::NameTooLong(long)));
    list.mark(100_000, 1);
    assert_eq!((first.map().count(), second.map().count()), (65536, 4096));
    assert_eq!(
        list.infos().iter().map(|i| i.name.as_str()).collect::<Vec<_>>(),
        ["second", "first"]
    );
    list.resize(|| 1 << 30);
    list.mark((1 << 30) - 1, 1);
    assert_eq!((first.map().count(), second.map().count()), (131_072, 8192));
    list.resize(|| 200_000);
    assert_eq!((first.map().count(), second.map().count()), (65536, 4096));
    list.remove(&first, |on| recording.set(on));
    assert_eq!(list.find("first").err(), Some(BitmapError::NotFound("first".into())));
    assert!(list.find("second").is_ok() && recording.get());
    list.remove(&second, |on| recording.set(on));
    assert!(list.is_empty() && !recording.get());
}

#[test]
fn the_default_granularity_follows_the_cluster_size() {
    assert_eq!(default_granularity(0), 65536);
    assert_eq!(default_granularity(512), 4096);
    assert_eq!(default_granularity(16384), 16384);
    assert_eq!(default_granularity(2 << 20), 65536);
}
