//! Tests of the slice cache: hits, misses, eviction, dirty slices, and dropping unused slices.

use super::*;
use futures_util::FutureExt as _;
use oxblk_ring::{IoBufMut, block_on, spawn};
use std::rc::Rc;
use std::time::{Duration, Instant};

fn cache_of(words: usize, limit: usize) -> SliceCache {
    SliceCache::new(words, limit, Arc::default())
}

fn bytes_of(slice: u64, words: usize) -> IoBufMut {
    let bytes: Vec<u8> = (0..words).flat_map(|_| slice.to_be_bytes()).collect();
    IoBufMut::from(bytes)
}

async fn load(cache: &SliceCache, slice: u64) -> Option<u64> {
    let pinned = cache.get(slice, || async move { Ok(bytes_of(slice, 4)) }).await.unwrap()?;
    Some(pinned.words()[0].load(Relaxed))
}

#[test]
fn a_slice_is_found_until_another_takes_its_slot() {
    block_on(async {
        let cache = cache_of(4, 2);
        for slice in [5, 6, 7, 1 << 31] {
            assert_eq!(load(&cache, slice).await, Some(slice));
            assert_eq!(cache.peek(slice, |words| words[3].load(Relaxed)), Some(slice));
        }
        let cached =
            [5, 6, 7, 1 << 31].into_iter().filter(|slice| cache.peek(*slice, |_| ()).is_some());
        assert_eq!(cached.count(), 2);
    });
}

#[test]
fn dirty_and_pinned_slices_are_not_evicted() {
    block_on(async {
        let cache = cache_of(4, 2);
        let pinned = cache.get(1, || async { Ok(bytes_of(1, 4)) }).await.unwrap().unwrap();
        load(&cache, 2).await;
        cache.pin(2).unwrap().mark_dirty();
        assert_eq!(load(&cache, 3).await, None, "no slot can be reused");
        let copies = cache.take_dirty();
        assert_eq!(copies.iter().map(|copy| copy.slice).collect::<Vec<_>>(), [2]);
        assert_eq!(load(&cache, 3).await, None, "a copy that is not written yet pins its slice");
        copies.into_iter().for_each(DirtyCopy::written);
        assert_eq!(load(&cache, 3).await, Some(3));
        assert_eq!(cache.peek(1, |words| words[0].load(Relaxed)), Some(1));
        drop(pinned);
    });
}

#[test]
fn misses_of_one_slice_load_it_once() {
    block_on(async {
        let cache = Rc::new(cache_of(4, 8));
        let loads = Rc::new(std::cell::Cell::new(0));
        let tasks: Vec<_> = (0..8)
            .map(|_| {
                let (cache, loads) = (Rc::clone(&cache), Rc::clone(&loads));
                spawn(async move {
                    let load = || async {
                        loads.set(loads.get() + 1);
                        oxblk_ring::yield_now().await;
                        Ok(bytes_of(9, 4))
                    };
                    let pinned = cache.get(9, load).await.unwrap().unwrap();
                    assert_eq!(pinned.words()[0].load(Relaxed), 9);
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        assert_eq!(loads.get(), 1);
    });
}

#[test]
fn a_task_that_waits_for_a_load_does_not_wait_for_the_next_load() {
    let cache = cache_of(4, 4);
    let first = cache.begin_load(1).ok().unwrap();
    let waiting = cache.begin_load(1).err().unwrap();
    drop(first);
    let _second = cache.begin_load(1).ok().unwrap();
    assert!(waiting.now_or_never().is_some(), "the load that this task waits for has ended");
}

#[test]
fn a_lookup_sees_a_changed_word_only_after_the_slice_is_marked_dirty() {
    let cache = cache_of(4, 4);
    block_on(load(&cache, 1));
    let seen = || cache.peek(1, |words| words[0].load(Relaxed)) == Some(7);
    std::thread::scope(|scope| {
        // While this thread holds the list, no thread can mark the slice dirty.
        let taking = cache.dirty.hold();
        scope.spawn(|| cache.pin(1).unwrap().begin_change().replace(0, 7));
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(100) {
            assert!(!seen(), "the word was visible before its slice was marked dirty");
            std::thread::yield_now();
        }
        drop(taking);
    });
    assert!(seen());
    assert_eq!(cache.take_dirty().len(), 1);
}

#[test]
fn a_copy_that_was_not_written_leaves_its_slice_dirty() {
    block_on(async {
        let cache = cache_of(4, 4);
        load(&cache, 1).await;
        cache.pin(1).unwrap().mark_dirty();
        drop(cache.take_dirty());
        let again = cache.take_dirty();
        assert_eq!(again.len(), 1);
        again.into_iter().for_each(DirtyCopy::written);
        assert!(cache.take_dirty().is_empty());
    });
}

#[test]
fn a_change_made_while_a_copy_is_written_is_not_lost() {
    block_on(async {
        let cache = cache_of(4, 4);
        load(&cache, 1).await;
        let pinned = cache.pin(1).unwrap();
        pinned.words()[0].store(10, Release);
        pinned.mark_dirty();
        let first = cache.take_dirty();
        pinned.words()[0].store(11, Release);
        pinned.mark_dirty();
        assert_eq!(first[0].bytes[..8], 10_u64.to_be_bytes());
        first.into_iter().for_each(DirtyCopy::written);
        assert_eq!(cache.take_dirty()[0].bytes[..8], 11_u64.to_be_bytes());
    });
}

#[test]
fn take_dirty_includes_every_change_that_was_marked_before_it() {
    const ROUNDS: u64 = 3000;
    let cache = Arc::new(cache_of(4, 4));
    assert!(cache.insert(1, &bytes_of(0, 4)).is_ok());
    let stop = std::sync::atomic::AtomicBool::new(false);
    oxblk_ring::perturb::start(1);
    std::thread::scope(|scope| {
        for word in 1..3 {
            let (cache, stop) = (&cache, &stop);
            scope.spawn(move || {
                while !stop.load(Relaxed) {
                    let pinned = cache.pin(1).unwrap();
                    pinned.words()[word].fetch_add(1, AcqRel);
                    pinned.mark_dirty();
                }
            });
        }
        let seen = (1..=ROUNDS).all(|round| {
            let pinned = cache.pin(1).unwrap();
            pinned.words()[0].store(round, Release);
            pinned.mark_dirty();
            drop(pinned);
            let copies = cache.take_dirty();
            let seen = copies.iter().any(|copy| copy.bytes[..8] == round.to_be_bytes());
            copies.into_iter().for_each(DirtyCopy::written);
            seen
        });
        stop.store(true, Relaxed);
        assert!(seen, "a change was marked dirty but not copied");
    });
    oxblk_ring::perturb::stop();
}

/// Runs `work` while two threads read slices 1 to 5. Each word of a slice is the number of the slice.
fn while_read_by_others(cache: &Arc<SliceCache>, work: impl FnOnce()) {
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (cache, stop) = (Arc::clone(cache), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Relaxed) {
                    for slice in 1..6 {
                        let seen = cache.peek(slice, |words| {
                            words.iter().all(|word| word.load(Relaxed) == slice)
                        });
                        assert_ne!(seen, Some(false));
                    }
                }
            })
        })
        .collect();
    work();
    stop.store(true, Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
}

#[test]
fn readers_never_see_the_words_of_another_slice() {
    let cache = Arc::new(cache_of(64, 2));
    while_read_by_others(&cache, || {
        for round in 0..20_000_u64 {
            let slice = round % 5 + 1;
            if cache.pin(slice).is_none() {
                let _ = cache.insert(slice, &bytes_of(slice, 64));
            }
        }
    });
}

#[test]
fn words_of_one_change_are_read_and_copied_together() {
    let cache = Arc::new(cache_of(64, 2));
    assert!(cache.insert(1, &bytes_of(0, 64)).is_ok());
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let reader = {
        let (cache, stop) = (Arc::clone(&cache), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut seen = 0_u64;
            while !stop.load(Relaxed) {
                let pairs = cache.peek(1, |words| {
                    words.chunks(2).all(|pair| pair[0].load(Relaxed) == pair[1].load(Relaxed))
                });
                assert_ne!(pairs, Some(false));
                seen += u64::from(pairs.is_some());
                for copy in cache.take_dirty() {
                    let pairs: Vec<_> = copy.bytes.chunks(16).map(|p| p.split_at(8)).collect();
                    assert!(pairs.iter().all(|(first, second)| first == second));
                    copy.written();
                }
            }
            seen
        })
    };
    // Each writer changes its own entries, as if it held a lock on them.
    let writers: Vec<_> = (0..2_usize)
        .map(|own| {
            let cache = Arc::clone(&cache);
            std::thread::spawn(move || {
                for round in 0..50_000_u64 {
                    let pinned = cache.pin(1).unwrap();
                    let mut changing = pinned.begin_change();
                    changing.replace(own * 32, round);
                    changing.replace(own * 32 + 1, round);
                    drop(changing);
                    if round % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.join().unwrap();
    }
    stop.store(true, Relaxed);
    assert!(reader.join().unwrap() > 0);
}

/// Number of slots whose words use memory of the host.
fn filled(cache: &SliceCache) -> usize {
    let numbers = 1..=u32::try_from(cache.made.load(Acquire)).unwrap();
    numbers.filter(|number| cache.slot(*number).unwrap().is_filled()).count()
}

async fn load_long(cache: &SliceCache, slice: u64, words: usize) {
    let load = || async move { Ok(bytes_of(slice, words)) };
    assert!(cache.get(slice, load).await.unwrap().is_some());
}

#[test]
fn unused_slices_are_dropped_and_their_memory_is_released() {
    block_on(async {
        let words = WordMemory::page_words();
        let cache = cache_of(words, 16);
        for slice in 1..=4 {
            load_long(&cache, slice, words).await;
        }
        cache.pin(1).unwrap().mark_dirty();
        let pinned = cache.pin(2).unwrap();
        assert!(cache.drop_unused(0));
        assert_eq!((cache.in_use(), filled(&cache)), (4, 4), "all slices were used");
        assert!(cache.peek(3, |_| ()).is_some());
        cache.drop_unused(0);
        assert_eq!((cache.in_use(), filled(&cache)), (3, 3));
        assert!(cache.peek(4, |_| ()).is_none() && cache.pin(4).is_none());
        drop(pinned);
        cache.take_dirty().into_iter().for_each(DirtyCopy::written);
        cache.drop_unused(0);
        cache.drop_unused(0);
        assert_eq!((cache.in_use(), filled(&cache)), (0, 0));
        assert!(!cache.drop_unused(1), "there is no such chunk");
        // The slots are reused before new ones are created.
        for slice in 11..=14 {
            load_long(&cache, slice, words).await;
            let right = |seen: &[AtomicU64]| seen.iter().all(|word| word.load(Relaxed) == slice);
            assert_eq!(cache.peek(slice, right), Some(true));
        }
        assert_eq!((cache.made.load(Acquire), cache.in_use(), filled(&cache)), (4, 4, 4));
    });
}

#[test]
fn slices_that_share_a_page_release_it_together() {
    block_on(async {
        let words = WordMemory::page_words() / 4;
        let cache = cache_of(words, 16);
        for slice in 0..4 {
            load_long(&cache, slice, words).await;
        }
        cache.drop_unused(0);
        assert!(cache.peek(0, |_| ()).is_some());
        cache.drop_unused(0);
        assert_eq!((cache.in_use(), filled(&cache)), (1, 4));
        let right = |seen: &[AtomicU64]| seen.iter().all(|word| word.load(Relaxed) == 0);
        assert_eq!(cache.peek(0, right), Some(true));
        cache.drop_unused(0);
        cache.drop_unused(0);
        assert_eq!((cache.in_use(), filled(&cache)), (0, 0));
    });
}

#[test]
fn readers_never_see_released_words() {
    let words = WordMemory::page_words();
    let cache = Arc::new(cache_of(words, 8));
    while_read_by_others(&cache, || {
        for round in 0..5_000_u64 {
            let slice = round % 5 + 1;
            match cache.pin(slice) {
                Some(pinned) => assert_eq!(pinned.words()[words - 1].load(Relaxed), slice),
                None => drop(cache.insert(slice, &bytes_of(slice, words))),
            }
            let mut free = lock(&cache.claiming);
            cache.drop_slices(0, &mut free, |_| round % 3 == 0);
        }
    });
}

#[test]
fn a_cleaner_drops_unused_slices_until_its_interval_changes() {
    oxblk_ring::sim::run(1, async {
        let seconds = std::time::Duration::from_secs;
        let event = Arc::new(Event::new());
        let new = || Arc::new(SliceCache::new(4, 16, Arc::clone(&event)));
        let (one, two) = (new(), new());
        let cleaner = Cleaner::new(Arc::clone(&event), [&one, &two].map(Arc::downgrade));
        cleaner.set_interval(seconds(10));
        load(&one, 1).await;
        load(&two, 2).await;
        oxblk_ring::sleep(seconds(15)).await;
        assert_eq!((one.in_use(), two.in_use()), (1, 1));
        one.peek(1, |_| ());
        oxblk_ring::sleep(seconds(10)).await;
        assert_eq!((one.in_use(), two.in_use()), (1, 0), "only the first cache was used");
        oxblk_ring::sleep(seconds(10)).await;
        assert_eq!(one.in_use(), 0);
        // Turn the cleaner off, then on again.
        load(&one, 1).await;
        cleaner.set_interval(seconds(0));
        oxblk_ring::sleep(seconds(100)).await;
        assert_eq!(one.in_use(), 1);
        cleaner.set_interval(seconds(5));
        oxblk_ring::sleep(seconds(11)).await;
        assert_eq!(one.in_use(), 0);
        // The task does not keep caches alive, and dropping the cleaner ends its task.
        let weak = Arc::downgrade(&two);
        drop(two);
        assert!(weak.upgrade().is_none());
        load(&one, 1).await;
        drop(cleaner);
        oxblk_ring::sleep(seconds(100)).await;
        assert_eq!((one.in_use(), Arc::strong_count(&event)), (1, 2));
    });
}
