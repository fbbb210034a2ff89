//! Tests of threads that concurrently write parts of the same blocks of a file that requires aligned requests.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

use crate::common::graph;
use oxblk_core::{
    Attachment, ErrorKind, Graph, OpenFlags, Perm, Permissions, Preallocation, WriteFlags,
};
use oxblk_protocols::file::{FILE, FileDriver};
use oxblk_ring::{Aio, Config, File, IoBuf, IoBufMut, IoThread, block_on};

const THREADS: u64 = 4;
const BLOCK: u64 = 4096;
const PART: u64 = BLOCK / THREADS;
const BLOCKS: u64 = 60;

/// The I/O threads of all tests of this process, because a process can have only a limited number of I/O threads.
fn threads() -> &'static [IoThread] {
    static STARTED: OnceLock<Vec<IoThread>> = OnceLock::new();
    STARTED.get_or_init(|| {
        oxblk_ring::perturb::start(1);
        (0..THREADS).map(|_| IoThread::start("writer", Config::default()).unwrap()).collect()
    })
}

/// An edge to a new, empty file that requires whole blocks.
async fn empty_file() -> (Graph, Arc<Attachment>) {
    let graph = graph();
    let file = File::from_fd(OwnedFd::from(tempfile::tempfile().unwrap()), Aio::default());
    let driver = FileDriver::from_ring_file(file, 0).with_alignment(u32::try_from(BLOCK).unwrap());
    let node = graph.add_node(Some("f"), &FILE, Box::new(driver), OpenFlags::default()).unwrap();
    let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
    (graph, Arc::new(Attachment::new(&node, "test", "root", all).unwrap()))
}

/// The change that a thread makes to its part of a block.
type Change = fn(Arc<Attachment>, u64, u8) -> oxblk_core::BoxFuture<'static, ()>;

fn part_of(edge: Arc<Attachment>, offset: u64, value: u8) -> oxblk_core::BoxFuture<'static, ()> {
    Box::pin(async move {
        let data: IoBuf = vec![value; usize::try_from(PART).unwrap()].into();
        edge.write(offset, data, WriteFlags::empty()).await.unwrap();
    })
}

/// Each thread changes its part of each of `BLOCKS` new blocks. All threads change the same block at about the same
/// time.
fn write_in_step(edge: &Arc<Attachment>, change: Change) {
    let turn = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = threads()
        .iter()
        .zip(0..THREADS)
        .map(|(thread, me)| {
            let (edge, turn) = (Arc::clone(edge), Arc::clone(&turn));
            thread.spawn(move || async move {
                for block in 0..BLOCKS {
                    let value = u8::try_from(me + 1).unwrap();
                    change(Arc::clone(&edge), block * BLOCK + me * PART, value).await;
                    turn.fetch_add(1, SeqCst);
                    while turn.load(SeqCst) < (block + 1) * THREADS {
                        oxblk_ring::yield_now().await;
                    }
                }
            })
        })
        .collect();
    block_on(async move {
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

async fn parts(edge: &Attachment, block: u64) -> Vec<u8> {
    let read = edge.read(block * BLOCK, IoBufMut::new(4096)).await.unwrap();
    read.chunks(usize::try_from(PART).unwrap())
        .map(|part| if part.iter().all(|byte| *byte == part[0]) { part[0] } else { 0xff })
        .collect()
}

#[test]
fn concurrent_writes_of_parts_of_a_new_block_preserve_one_another() {
    let (graph, edge) = block_on(empty_file());
    write_in_step(&edge, part_of);
    block_on(async move {
        for block in 0..BLOCKS {
            assert_eq!(parts(&edge, block).await, [1, 2, 3, 4], "block {block}");
        }
        drop(graph);
    });
}

#[test]
fn concurrent_writes_of_whole_new_blocks_and_of_parts_preserve_one_another() {
    // The first thread writes each complete block, before or after the other threads write their parts. The part has
    // the value of its last writer, in every order.
    let (graph, edge) = block_on(empty_file());
    write_in_step(&edge, |edge, offset, value| {
        if value != 1 {
            return part_of(edge, offset, value);
        }
        Box::pin(async move {
            let data: IoBuf = vec![1; 4096].into();
            edge.write(offset, data, WriteFlags::empty()).await.unwrap();
        })
    });
    block_on(async move {
        for block in 0..BLOCKS {
            for (part, own) in parts(&edge, block).await.into_iter().zip(1..) {
                assert!(part == own || part == 1, "block {block}, part {own}: {part}");
            }
        }
        drop(graph);
    });
}

#[test]
fn copy_offload_and_concurrent_writes_of_parts_preserve_one_another() {
    /// The source of the copies.
    static ONES: OnceLock<Arc<Attachment>> = OnceLock::new();
    let (graph, edge) = block_on(empty_file());
    let (sources, ones) = block_on(empty_file());
    block_on(async {
        edge.resize(BLOCKS * BLOCK, Preallocation::Off).await.unwrap();
        ones.write(0, vec![1; 4096].into(), WriteFlags::empty()).await.unwrap();
    });
    ONES.get_or_init(|| ones);
    write_in_step(&edge, |edge, offset, value| {
        if value != 1 {
            return part_of(edge, offset, value);
        }
        Box::pin(async move {
            let ones = ONES.get().unwrap();
            if let Err(error) = ones.copy_to(0, &edge, offset, BLOCK).await {
                // `copy_to` is also unsupported while another thread writes a part of the block.
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                edge.write(offset, vec![1; 4096].into(), WriteFlags::empty()).await.unwrap();
            }
        })
    });
    block_on(async move {
        for block in 0..BLOCKS {
            for (part, own) in parts(&edge, block).await.into_iter().zip(1..) {
                assert!(part == own || part == 1, "block {block}, part {own}: {part}");
            }
        }
        drop((graph, sources));
    });
}
