use super::*;
use oxblk_ring::{IoBufMut, block_on, spawn};
use std::rc::Rc;

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
        let cache = SliceCache::new(4, 2);
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
fn dirty_and_pinned_slices_stay() {
    block_on(async {
        let cache = SliceCache::new(4, 2);
        let pinned = cache.get(1, || async { Ok(bytes_of(1, 4)) }).await.unwrap().unwrap();
        load(&cache, 2).await;
        cache.pin(2).unwrap().mark_dirty();
        assert_eq!(load(&cache, 3).await, None, "nothing can be given away");
        let copies = cache.take_dirty();
        assert_eq!(copies.iter().map(|copy| copy.slice).collect::<Vec<_>>(), [2]);
        assert_eq!(load(&cache, 3).await, None, "a copy not yet written keeps its slice");
        copies.into_iter().for_each(DirtyCopy::written);
        assert_eq!(load(&cache, 3).await, Some(3));
        assert_eq!(cache.peek(1, |words| words[0].load(Relaxed)), Some(1));
        drop(pinned);
    });
}

#[test]
fn misses_of_one_slice_load_it_once() {
    block_on(async {
        let cache = Rc::new(SliceCache::new(4, 8));
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
fn a_copy_that_was_not_written_leaves_its_slice_dirty() {
    block_on(async {
        let cache = SliceCache::new(4, 4);
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
        let cache = SliceCache::new(4, 4);
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
fn readers_never_see_the_words_of_another_slice() {
    let cache = Arc::new(SliceCache::new(64, 2));
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (cache, stop) = (Arc::clone(&cache), Arc::clone(&stop));
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
    for round in 0..20_000_u64 {
        let slice = round % 5 + 1;
        if cache.pin(slice).is_none() {
            let _ = cache.insert(slice, &bytes_of(slice, 64));
        }
    }
    stop.store(true, Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
}

#[test]
fn words_that_belong_together_are_seen_and_written_together() {
    let cache = Arc::new(SliceCache::new(64, 2));
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
    // Each writer has entries of its own, as those who hold a lock on them do.
    let writers: Vec<_> = (0..2_usize)
        .map(|own| {
            let cache = Arc::clone(&cache);
            std::thread::spawn(move || {
                for round in 0..50_000_u64 {
                    let pinned = cache.pin(1).unwrap();
                    let pair = &pinned.words()[own * 32..own * 32 + 2];
                    let changing = pinned.begin_change();
                    pair[0].store(round, Relaxed);
                    pair[1].store(round, Relaxed);
                    drop(changing);
                    pinned.mark_dirty();
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
