//! Tests of requests in several pieces when one piece fails. The host still carries out the other pieces. The other
//! pieces must complete before the failure is reported; otherwise they could overwrite data that is written after the
//! failure.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use oxblk_core::{Backend, Errno, Error, Limits, OpenFlags, WriteFlags};
use oxblk_ring::{IoBuf, block_on, yield_now};

use crate::memory::{Memory, graph, node, options};
use crate::{all, pattern};

const PIECE: usize = 4096;
const SIZE: usize = 4 * PIECE;
/// Offset of the last piece. The tests make this piece fail. Pieces are started in order, so all other pieces have been
/// started when this piece fails.
const LAST: usize = SIZE - PIECE;

/// A memory protocol that accepts requests of up to [`PIECE`] bytes. The piece at `bad` fails, and the other pieces
/// take a long time.
fn failing_at(bad: u64) -> Arc<Memory> {
    let piece = PIECE as u64;
    let limits = Limits { max_transfer: piece, max_discard: piece, ..Limits::default() };
    Arc::new(Memory {
        bytes: vec![0; SIZE].into(),
        limits,
        landing: AtomicU32::new(50),
        bad: Some(bad),
        ..Memory::default()
    })
}

/// Writes newer data over the pieces that did not fail, and checks that the newer data stays.
async fn newer_data_stays(backend: &Backend, memory: &Memory) {
    memory.landing.store(0, SeqCst);
    let newer = pattern(LAST, 7);
    for (offset, piece) in (0..).step_by(PIECE).zip(newer.chunks(PIECE)) {
        backend.write(offset, piece.to_vec().into(), WriteFlags::empty()).await.unwrap();
    }
    wait().await;
    assert!(
        memory.bytes.lock().unwrap()[..LAST] == newer,
        "an older piece has overwritten newer data"
    );
}

async fn wait() {
    for _ in 0..200 {
        yield_now().await;
    }
}

fn is_eio(outcome: Result<(), Error>) -> bool {
    outcome.is_err_and(|error| error.raw_errno() == Errno::IO)
}

#[test]
fn no_piece_of_a_failed_write_overwrites_newer_data() {
    block_on(async {
        let graph = graph();
        let memory = failing_at(LAST as u64);
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        let older = IoBuf::from(vec![1; SIZE]);
        assert!(is_eio(backend.write(0, older, WriteFlags::empty()).await));
        newer_data_stays(&backend, &memory).await;
    });
}

#[test]
fn no_piece_of_a_failed_discard_overwrites_newer_data() {
    block_on(async {
        let graph = graph();
        let memory = failing_at(LAST as u64);
        let backend = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        assert!(is_eio(backend.discard(0, SIZE as u64).await));
        newer_data_stays(&backend, &memory).await;
    });
}

#[test]
fn no_extent_of_a_failed_write_overwrites_newer_data() {
    block_on(async {
        let graph = graph();
        // The first block lies in the memory; the second cannot be written.
        let memory = failing_at(u64::MAX);
        let _file = node(&graph, "m", &memory);
        let top = options("driver=checkered,node-name=top,size=1024,file=m,backing=");
        let backend = graph.open_backend(None, top, OpenFlags::default()).await.unwrap();
        let older = IoBuf::from(vec![1; 1024]);
        let failed = backend.write(0, older, WriteFlags::empty()).await.unwrap_err();
        assert_eq!(failed.raw_errno(), Errno::NOSPC);
        memory.landing.store(0, SeqCst);
        backend.write(0, vec![2; 512].into(), WriteFlags::empty()).await.unwrap();
        wait().await;
        assert_eq!(memory.bytes.lock().unwrap()[512..1024], [2; 512]);
        backend.close().await.unwrap();
    });
}
