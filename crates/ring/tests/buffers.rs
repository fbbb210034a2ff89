//! Tests of buffers. After any sequence of splits, joins, freezes and sends to other threads, each buffer has the
//! same bytes as a vector that models the buffer.

#![allow(clippy::unwrap_used, reason = "a test may fail by panicking, in its helpers too")]

use std::cell::RefCell;

use oxblk_ring::{IoBuf, IoBufMut, block_on, is_zero};
use proptest::prelude::*;

/// A step on a list of buffers; indices are taken modulo the length of the list.
#[derive(Clone, Copy, Debug)]
enum Step {
    New(usize),
    FromVec(usize),
    Static,
    Zeroes(usize),
    Fill(usize, u8),
    SplitOff(usize, usize),
    SplitTo(usize, usize),
    Unsplit(usize, usize),
    Truncate(usize, usize),
    Freeze(usize),
    Clone(usize),
    Slice(usize, usize, usize),
    SharedSplitTo(usize, usize),
    TryIntoMut(usize),
    Drop(usize),
    DropElsewhere(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![
        0usize..2000,
        4000usize..5000,
        60_000usize..70_000,
        1usize << 20..(1 << 20) + 2
    ];
    prop_oneof![
        len.clone().prop_map(Step::New),
        (0usize..3000).prop_map(Step::FromVec),
        Just(Step::Static),
        len.prop_map(Step::Zeroes),
        (any::<usize>(), any::<u8>()).prop_map(|(i, b)| Step::Fill(i, b)),
        (any::<usize>(), any::<usize>()).prop_map(|(i, n)| Step::SplitOff(i, n)),
        (any::<usize>(), any::<usize>()).prop_map(|(i, n)| Step::SplitTo(i, n)),
        (any::<usize>(), any::<usize>()).prop_map(|(i, n)| Step::Unsplit(i, n)),
        (any::<usize>(), any::<usize>()).prop_map(|(i, n)| Step::Truncate(i, n)),
        any::<usize>().prop_map(Step::Freeze),
        any::<usize>().prop_map(Step::Clone),
        (any::<usize>(), any::<usize>(), any::<usize>()).prop_map(|(i, a, b)| Step::Slice(i, a, b)),
        (any::<usize>(), any::<usize>()).prop_map(|(i, n)| Step::SharedSplitTo(i, n)),
        any::<usize>().prop_map(Step::TryIntoMut),
        any::<usize>().prop_map(Step::Drop),
        any::<usize>().prop_map(Step::DropElsewhere),
    ]
}

static TEXT: &[u8] = b"bytes in static memory";

/// The buffers, each with a vector of the same bytes.
#[derive(Default)]
struct World {
    unique: Vec<(IoBufMut, Vec<u8>)>,
    shared: Vec<(IoBuf, Vec<u8>)>,
}

fn pick<T>(list: &[T], index: usize) -> Option<usize> {
    index.checked_rem(list.len())
}

impl World {
    fn add(&mut self, buf: IoBufMut) {
        let model = buf.to_vec();
        self.unique.push((buf, model));
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::New(len) => {
                let buf = IoBufMut::new(len);
                assert!(len < 512 || buf.as_ptr().align_offset(4096) == 0);
                self.add(buf);
            }
            Step::FromVec(len) => self.add(IoBufMut::from(vec![3; len])),
            Step::Static => self.shared.push((IoBuf::from(TEXT), TEXT.to_vec())),
            Step::Zeroes(len) => self.shared.push((IoBuf::zeroes(len), vec![0; len])),
            Step::Clone(i) => {
                if let Some(i) = pick(&self.shared, i) {
                    let copy = (self.shared[i].0.clone(), self.shared[i].1.clone());
                    self.shared.push(copy);
                }
            }
            Step::Slice(i, a, b) => {
                if let Some(i) = pick(&self.shared, i) {
                    let (buf, model) = &self.shared[i];
                    let (a, b) = (a % (model.len() + 1), b % (model.len() + 1));
                    let (a, b) = (a.min(b), a.max(b));
                    let slice = (buf.slice(a..b), model[a..b].to_vec());
                    self.shared.push(slice);
                }
            }
            Step::SharedSplitTo(i, n) => {
                if let Some(i) = pick(&self.shared, i) {
                    let (buf, model) = &mut self.shared[i];
                    let n = n % (model.len() + 1);
                    let tail = model.split_off(n);
                    let front = (buf.split_to(n), std::mem::replace(model, tail));
                    self.shared.push(front);
                }
            }
            Step::TryIntoMut(i) => {
                if let Some(i) = pick(&self.shared, i) {
                    let (buf, model) = self.shared.swap_remove(i);
                    match buf.try_into_mut() {
                        Ok(buf) => self.unique.push((buf, model)),
                        Err(buf) => self.shared.push((buf, model)),
                    }
                }
            }
            other => self.apply_unique(other),
        }
    }

    fn apply_unique(&mut self, step: Step) {
        let (Step::Fill(i, _)
        | Step::SplitOff(i, _)
        | Step::SplitTo(i, _)
        | Step::Unsplit(i, _)
        | Step::Truncate(i, _)
        | Step::Freeze(i)
        | Step::Drop(i)
        | Step::DropElsewhere(i)) = step
        else {
            return;
        };
        let Some(i) = pick(&self.unique, i) else { return };
        let (mut buf, mut model) = self.unique.swap_remove(i);
        let cut = |n: usize| n % (model.len() + 1);
        match step {
            Step::Fill(_, byte) => {
                buf.fill(byte);
                model.fill(byte);
            }
            Step::SplitOff(_, n) => {
                let n = cut(n);
                self.unique.push((buf.split_off(n), model.split_off(n)));
            }
            Step::SplitTo(_, n) => {
                let n = cut(n);
                let tail = model.split_off(n);
                self.unique.push((buf.split_to(n), std::mem::replace(&mut model, tail)));
            }
            Step::Unsplit(_, other) => {
                if let Some(other) = pick(&self.unique, other) {
                    let (tail, mut tail_model) = self.unique.swap_remove(other);
                    match buf.unsplit(tail) {
                        Ok(()) => model.append(&mut tail_model),
                        Err(tail) => self.unique.push((tail, tail_model)),
                    }
                }
            }
            Step::Truncate(_, n) => {
                let n = cut(n);
                buf.truncate(n);
                model.truncate(n);
            }
            Step::Freeze(_) => return self.shared.push((buf.freeze(), model)),
            Step::DropElsewhere(_) => return std::thread::spawn(move || drop(buf)).join().unwrap(),
            _ => return,
        }
        self.unique.push((buf, model));
    }

    fn check(&self) {
        for (buf, model) in &self.unique {
            assert!(buf[..] == model[..], "a unique buffer of {} bytes differs", model.len());
        }
        for (buf, model) in &self.shared {
            assert!(buf[..] == model[..], "a shared buffer of {} bytes differs", model.len());
            assert_eq!(buf.is_zero(), model.iter().all(|&b| b == 0));
        }
    }
}

fn follow(steps: Vec<Step>) {
    let mut world = World::default();
    for step in steps {
        world.apply(step);
        world.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 64 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn buffers_equal_their_model_on_a_plain_thread(steps in proptest::collection::vec(step(), 1..40)) {
        follow(steps);
    }

    #[test]
    fn buffers_equal_their_model_on_an_io_thread(steps in proptest::collection::vec(step(), 1..40)) {
        block_on(async { follow(steps) });
    }
}

#[test]
fn the_pieces_of_a_split_buffer_join_again_in_order() {
    let mut a = IoBufMut::copy_from(b"hello world");
    let c = a.split_off(8);
    let b = a.split_off(5);
    let c = a.unsplit(c).unwrap_err();
    a.unsplit(b).unwrap();
    a.unsplit(c).unwrap();
    assert_eq!(&a[..], b"hello world");
}

#[test]
fn a_shared_buffer_becomes_unique_when_its_clones_are_gone() {
    let buf = IoBufMut::copy_from(b"abc").freeze();
    let clone = buf.clone();
    let buf = buf.try_into_mut().unwrap_err();
    drop(clone);
    let mut buf = buf.try_into_mut().unwrap();
    buf[0] = b'x';
    assert_eq!(&buf[..], b"xbc");
    assert!(IoBuf::zeroes(10).try_into_mut().is_err(), "static memory must never become writable");
}

#[test]
fn buffers_outlive_the_thread_whose_arena_they_come_from() {
    let buf = std::thread::spawn(|| block_on(async { IoBufMut::filled(4096, 5) })).join().unwrap();
    assert!(buf.iter().all(|&b| b == 5));
}

/// Buffers from every source of memory, filled with `byte`.
fn one_of_each(byte: u8) -> Vec<IoBufMut> {
    let pooled = [0, 100, 4096, 16 << 10, 64 << 10, 100_000, 1 << 20, 5 << 20];
    let pooled = pooled.into_iter().map(|len| IoBufMut::filled(len, byte));
    pooled.chain([IoBufMut::from(vec![byte; 1000])]).collect()
}

/// Whether all bytes of the buffers are `byte`. Under Miri, which is slow, only some of the bytes are checked.
fn hold(bufs: &[IoBufMut], byte: u8) -> bool {
    let step = if cfg!(miri) { 50_000 } else { 1 };
    bufs.iter().all(|buf| buf.iter().step_by(step).all(|found| *found == byte))
}

/// Buffers that are dropped when the thread ends. The destructor also creates and drops other buffers.
#[derive(Default)]
struct AtEnd(Vec<IoBufMut>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        let new = one_of_each(2);
        assert!(hold(&self.0, 1));
        assert!(hold(&new, 2));
        self.0.clear();
        drop(one_of_each(3));
        drop(new);
    }
}

thread_local! {
    static EARLY: RefCell<AtEnd> = RefCell::default();
    static LATE: RefCell<AtEnd> = RefCell::default();
}

/// Runs `keep` on a thread that ends. The thread-local values `EARLY` and `LATE` may contain buffers: `LATE` is
/// dropped before the buffer pool of the thread, `EARLY` after it.
fn end_with_buffers(keep: impl FnOnce() + Send + 'static) {
    let kept_elsewhere = std::thread::spawn(|| {
        // Thread-local values are dropped in the opposite order of their first use.
        EARLY.with_borrow(|early| assert!(early.0.is_empty()));
        let kept_elsewhere = one_of_each(1);
        LATE.with_borrow_mut(|late| late.0.extend(one_of_each(1)));
        keep();
        kept_elsewhere
    });
    let kept = kept_elsewhere.join().unwrap();
    assert!(hold(&kept, 1));
}

fn keep_here() {
    for value in [&EARLY, &LATE] {
        value.with_borrow_mut(|at_end| at_end.0.extend(one_of_each(1)));
    }
}

#[test]
fn buffers_are_allocated_and_freed_while_their_thread_ends() {
    end_with_buffers(keep_here);
}

#[test]
fn arena_pieces_are_allocated_and_freed_while_their_thread_ends() {
    end_with_buffers(|| {
        // Each `block_on` has its own arena. Pieces of the first arena are freed while the thread has the second
        // arena, or no arena.
        for _ in 0..2 {
            block_on(async { keep_here() });
        }
    });
}

#[test]
fn buffers_are_freed_on_other_threads_with_and_without_an_arena() {
    let make = || std::thread::spawn(|| block_on(async { one_of_each(1) })).join().unwrap();
    let (first, second) = (make(), make());
    drop(first);
    block_on(async {
        drop(second);
        let again = one_of_each(4);
        assert!(hold(&again, 4));
    });
}

#[test]
fn more_buffers_than_any_pool_holds_are_all_distinct() {
    block_on(async {
        let mut bufs: Vec<IoBufMut> = (0..500).map(|_| IoBufMut::zeroed(4096)).collect();
        for (i, buf) in (0u8..=255).cycle().zip(&mut bufs) {
            assert!(is_zero(buf));
            buf.fill(i);
        }
        for (i, buf) in (0u8..=255).cycle().zip(&bufs) {
            assert!(buf.iter().all(|&b| b == i));
        }
    });
}
