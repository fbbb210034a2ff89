//! Images whose disk size is not a multiple of the sector size. `oxblk_core` rounds the size up, and every request sees the
//! rounded size.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use oxblk_core::{DriverTable, Graph, OpenFlags, Options, Want, WriteFlags};
use oxblk_formats::qcow2::QCOW2;
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBufMut, block_on};

static DRIVERS: DriverTable = &[QCOW2, &FILE];

/// Byte offset of the disk size in the header (section "Header" of the qcow2 specification).
const SIZE_AT: usize = 24;
const ODD: u64 = 1_000_001;
const WHOLE: u64 = 1_000_448;

#[test]
fn a_qcow2_image_with_an_odd_size_has_the_rounded_size_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    block_on(async {
        let graph = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
        let options = Options::from_dotted("size=1000001", None).unwrap();
        graph.create_image(name, "qcow2", &options).await.unwrap();
        let mut image = std::fs::read(&path).unwrap();
        assert_eq!(image[SIZE_AT..SIZE_AT + 8], WHOLE.to_be_bytes());
        image[SIZE_AT..SIZE_AT + 8].copy_from_slice(&ODD.to_be_bytes());
        std::fs::write(&path, image).unwrap();

        let mut options = Options::new();
        options.insert("driver", "qcow2");
        let flags = OpenFlags { unmap: true, ..OpenFlags::default() };
        let disk = graph.open_backend(Some(name), options.clone(), flags.clone()).await.unwrap();
        assert_eq!(disk.size(), WHOLE);
        let status = disk.block_status(0, WHOLE, Want::Precise).await.unwrap().status;
        assert_eq!((status.len, status.is_zero()), (WHOLE, true));
        let last = WHOLE - 512;
        disk.write(last, vec![7; 512].into(), WriteFlags::empty()).await.unwrap();
        disk.write(WHOLE - 1, vec![8].into(), WriteFlags::COMPRESSED).await.unwrap_err();
        disk.read(last, IoBufMut::new(513)).await.unwrap_err();
        disk.close().await.unwrap();

        let disk = graph.open_backend(Some(name), options, flags).await.unwrap();
        assert_eq!(*disk.read(last, IoBufMut::new(512)).await.unwrap(), [7; 512]);
        disk.discard(0, WHOLE).await.unwrap();
        assert_eq!(*disk.read(last, IoBufMut::new(512)).await.unwrap(), [0; 512]);
        disk.close().await.unwrap();
    });
}
