//! Requests from and to memory that others may change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use oxblk_core::{Backend, Errno, ErrorKind, Limits, Perm, Permissions, WriteFlags};
use oxblk_ring::{ForeignOwner, ForeignVec, ForeignVecMut, IoBufMut, block_on};

use super::memory::{Memory, graph, node, options};

fn all() -> Permissions {
    Permissions::sharing_all(Perm::all())
}

/// Memory that anybody may change.
struct Shared(Arc<Vec<AtomicU64>>);

impl Shared {
    fn new(bytes: usize) -> Self {
        Self(Arc::new((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()))
    }

    fn ranges(&self, ranges: &[(usize, usize)]) -> Vec<(*mut u8, usize)> {
        assert!(ranges.iter().all(|(at, len)| at + len <= self.0.len() * 8));
        let base = self.0.as_ptr().cast::<u8>().cast_mut();
        ranges.iter().map(|(at, len)| (base.wrapping_add(*at), *len)).collect()
    }

    fn owner(&self) -> ForeignOwner {
        Arc::clone(&self.0) as ForeignOwner
    }

    fn to_read(&self, ranges: &[(usize, usize)]) -> ForeignVecMut {
        // SAFETY: the ranges lie in the words, which the owner keeps and which are atomics.
        unsafe { ForeignVecMut::new(self.owner(), self.ranges(ranges)) }
    }

    fn to_write(&self, ranges: &[(usize, usize)]) -> ForeignVec {
        let ranges = self.ranges(ranges).into_iter().map(|(base, len)| (base.cast_const(), len));
        // SAFETY: as above.
        unsafe { ForeignVec::new(self.owner(), ranges) }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.load(Relaxed).to_ne_bytes()).collect()
    }
}

#[test]
fn data_is_scattered_and_gathered_through_drivers_without_a_host_file() {
    block_on(async {
        for alignment in [1, 512] {
            let graph = graph();
            let limits = Limits { request_alignment: alignment, ..Limits::default() };
            let memory = Memory::new(8192, limits);
            let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
            let shared = Shared::new(4096);
            let pieces = [(100, 300), (0, 50), (1000, 1000)];
            let pattern = super::pattern(1350, 1);
            shared.to_read(&pieces).copy_from(&pattern);
            disk.write_from(700, shared.to_write(&pieces), WriteFlags::empty()).await.unwrap();
            let read = disk.read(700, IoBufMut::new(1350)).await.unwrap();
            assert_eq!(*read, *pattern);
            disk.write_from(4096, shared.to_write(&pieces), WriteFlags::FUA).await.unwrap();

            let target = Shared::new(2048);
            let pieces = [(8, 1000), (1500, 350)];
            disk.read_into(4096, target.to_read(&pieces)).await.unwrap();
            assert_eq!(*target.to_write(&pieces).to_buf(), *pattern);
            let outside = disk.read_into(8000, target.to_read(&pieces)).await.unwrap_err();
            assert_eq!(outside.kind(), ErrorKind::OutOfRange);
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn reads_of_a_chain_fill_the_memory_from_all_images() {
    block_on(async {
        let graph = graph();
        let top = options(
            "driver=checkered,size=8192,file.driver=memory,file.size=8192,file.node-name=f,\
             backing.driver=memory,backing.size=3000,backing.node-name=base",
        );
        let disk = graph.open_backend(None, top, oxblk_core::OpenFlags::default()).await.unwrap();
        for (name, byte) in [("f", 1_u8), ("base", 2)] {
            let node = graph.node(name).unwrap();
            let data = vec![byte; usize::try_from(node.size()).unwrap()];
            node.driver().write(0, data.into(), WriteFlags::empty()).await.unwrap();
        }
        let expected = disk.read(100, IoBufMut::new(6000)).await.unwrap();
        let target = Shared::new(8192);
        target.to_read(&[(0, 8192)]).copy_from(&[0xff; 8192]);
        let pieces = [(1, 2999), (4000, 3001)];
        disk.read_into(100, target.to_read(&pieces)).await.unwrap();
        assert_eq!(*target.to_write(&pieces).to_buf(), *expected);
        let bytes = target.bytes();
        assert!([0, 3000, 3999, 7001].iter().all(|at| bytes[*at] == 0xff));
        disk.close().await.unwrap();
    });
}

#[test]
fn a_failed_request_reports_the_error_of_the_driver() {
    block_on(async {
        let graph = graph();
        let memory = Memory::new(8192, Limits::default());
        let disk = Backend::new(&graph, "b", node(&graph, "m", &memory), all()).unwrap();
        memory.errno.store(Errno::IO, Relaxed);
        let shared = Shared::new(512);
        let read = disk.read_into(0, shared.to_read(&[(0, 512)])).await;
        let written = disk.write_from(0, shared.to_write(&[(0, 512)]), WriteFlags::empty()).await;
        for failed in [read, written] {
            assert_eq!(failed.unwrap_err().raw_errno(), Errno::IO);
        }
        memory.errno.store(0, Relaxed);
        disk.close().await.unwrap();
        assert_eq!(Arc::strong_count(&shared.0), 1);
    });
}

#[test]
fn a_driver_sees_no_bytes_that_change_during_a_write() {
    let shared = Shared::new(4096);
    let stop = Arc::new(AtomicBool::new(false));
    let (words, stopped) = (Arc::clone(&shared.0), Arc::clone(&stop));
    let scribbler = std::thread::spawn(move || {
        let mut byte = 0_u8;
        while !stopped.load(Relaxed) {
            byte = byte.wrapping_add(1);
            words.iter().for_each(|word| word.store(u64::from_ne_bytes([byte; 8]), Relaxed));
        }
    });
    block_on(async {
        let graph = graph();
        // Zero detection looks at the data twice, so it would go wrong if the data changed in between.
        let settings = oxblk_core::OpenFlags::default();
        let memory =
            Arc::new(Memory { bytes: vec![0; 8192].into(), yields: 3, ..Memory::default() });
        let node = super::node_with(&graph, "m", &memory, settings);
        let disk = Backend::new(&graph, "b", node, all()).unwrap();
        for _ in 0..200 {
            disk.write_from(0, shared.to_write(&[(0, 4096)]), WriteFlags::empty()).await.unwrap();
            let read = disk.read(0, IoBufMut::new(4096)).await.unwrap();
            assert!(read.chunks(8).all(|word| word.iter().all(|byte| *byte == word[0])));
        }
        disk.close().await.unwrap();
    });
    stop.store(true, Relaxed);
    scribbler.join().unwrap();
}

#[test]
fn a_flush_after_a_failed_read_into_memory_reaches_no_driver() {
    block_on(async {
        let graph = graph();
        let memory = Arc::new(Memory { bad_read: Some(512), ..Memory::default() });
        memory.bytes.lock().unwrap().resize(4096, 0);
        let disk = Backend::new(&graph, "", node(&graph, "m", &memory), all()).unwrap();
        let shared = Shared::new(512);
        disk.read_into(512, shared.to_read(&[(0, 512)])).await.unwrap_err();
        oxblk_ring::settled().await;
        disk.flush().await.unwrap();
        disk.close().await.unwrap();
        assert_eq!(memory.take_log(), ["read 512+512", "close 0+0"]);
    });
}
