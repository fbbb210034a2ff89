//! Tests of the filter `blkverify`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use oxblk_core::{Backend, DriverTable, Errno, Gate, Graph, OpenFlags, Options, WriteFlags};
use oxblk_filters::blkdebug::BLKDEBUG;
use oxblk_filters::blkverify::BLKVERIFY;
use oxblk_protocols::null::NULL_CO;
use oxblk_ring::{IoBuf, IoBufMut, sim};

static DRIVERS: DriverTable = &[&NULL_CO, &BLKDEBUG, &BLKVERIFY];

async fn open(raw: &str, test: &str) -> Backend {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let text = format!("driver=blkverify,{raw},{test}");
    let options = Options::from_dotted(&text, None).unwrap();
    graph.open_backend(None, options, OpenFlags::default()).await.unwrap()
}

#[test]
fn equal_results_pass_and_different_results_fail() {
    const ZEROES: &str = "test.driver=null-co,test.read-zeroes=on";
    sim::run(1, async {
        let disk = open("raw.driver=null-co,raw.read-zeroes=on", ZEROES).await;
        assert!(disk.read(0, IoBufMut::filled(512, 7)).await.unwrap().iter().all(|b| *b == 0));
        disk.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await.unwrap();
        disk.close().await.unwrap();
        let faulty = "raw.driver=blkdebug,raw.image.driver=null-co,raw.image.read-zeroes=on,\
                      raw.inject-error.0.event=none,raw.inject-error.0.errno=28";
        let disk = open(faulty, ZEROES).await;
        let error = disk.read(0, IoBufMut::new(512)).await.unwrap_err();
        assert_eq!(error.raw_errno(), Errno::IO);
        let text = "blkverify: read offset=0 bytes=512 return value mismatch 0 != -28";
        assert!(error.to_string().starts_with(text), "{error}");
        let error = disk.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await.unwrap_err();
        assert!(error.to_string().contains("write offset=0 bytes=512 return value mismatch"));
        drop(disk.close().await);
    });
}

#[test]
fn a_file_name_contains_the_copy_and_the_image() {
    sim::run(2, async {
        let graph = Graph::new(DRIVERS, Gate::Anything);
        let refused = graph.protocol_for("blkverify:a").err().unwrap();
        assert_eq!(refused.to_string(), "blkverify requires raw copy and original image path");
        let disk = open("raw.driver=null-co", "test.driver=null-co").await;
        let name = disk.node().unwrap().filename();
        assert_eq!(name.as_deref(), Some("blkverify:null-co://:null-co://"));
        disk.close().await.unwrap();
    });
}
