//! Tests of the null disks in virtual time.

use std::time::Duration;

use oxblk_core::{Backend, DriverTable, Gate, Graph, OpenFlags, Options, WriteFlags, ZeroFlags};
use oxblk_protocols::null::{NULL_AIO, NULL_CO};
use oxblk_ring::{IoBuf, IoBufMut, now, sim, sleep, spawn};

static DRIVERS: DriverTable = &[&NULL_CO, &NULL_AIO];

const LATENCY: Duration = Duration::from_millis(250);

async fn open(options: &str) -> (Graph, Backend) {
    let graph = Graph::new(DRIVERS, Gate::Anything);
    let options = Options::from_dotted(options, None).unwrap();
    let disk = graph.open_backend(None, options, OpenFlags::default()).await.unwrap();
    (graph, disk)
}

#[test]
fn each_request_waits_for_the_latency() {
    for driver in ["null-co", "null-aio"] {
        sim::run(1, async move {
            let (_, disk) = open(&format!("driver={driver},latency-ns=250000000")).await;
            let begin = now();
            disk.read(0, IoBufMut::new(512)).await.unwrap();
            assert_eq!(now() - begin, LATENCY);
            disk.write(0, IoBuf::zeroes(512), WriteFlags::empty()).await.unwrap();
            assert_eq!(now() - begin, LATENCY * 2);
            disk.write_zeroes(0, 512, ZeroFlags::empty()).await.unwrap();
            assert_eq!(now() - begin, LATENCY * 3);
            disk.flush().await.unwrap();
            assert_eq!(now() - begin, LATENCY * 4);
            disk.close().await.unwrap();
            assert_eq!(now() - begin, LATENCY * 4);
        });
    }
}

#[test]
fn a_drain_waits_only_for_the_requests_in_flight() {
    sim::run(2, async {
        // The close of a read-only disk does not flush.
        let (graph, disk) = open("driver=null-co,latency-ns=250000000,read-only=on").await;
        let begin = now();
        let reads: Vec<_> = (0..8)
            .map(|_| {
                let disk = disk.clone();
                spawn(async move { disk.read(0, IoBufMut::new(512)).await.unwrap() })
            })
            .collect();
        sleep(LATENCY / 2).await;
        drop(graph.drain(&disk.node().unwrap()).await);
        assert_eq!(now() - begin, LATENCY);
        for read in reads {
            read.await;
        }
        let dropped = spawn({
            let disk = disk.clone();
            async move { disk.read(0, IoBufMut::new(512)).await.unwrap() }
        });
        sleep(LATENCY / 2).await;
        drop(dropped);
        let dropped = now();
        disk.close().await.unwrap();
        assert_eq!(now(), dropped);
    });
}

#[test]
fn reads_return_zeroes_only_if_asked_for() {
    sim::run(3, async {
        for (options, expected) in [
            ("driver=null-co", 7),
            ("driver=null-co,read-zeroes=on", 0),
            ("driver=null-aio,read-zeroes=on,latency-ns=1", 0),
        ] {
            let (_, disk) = open(options).await;
            let buf = disk.read(0, IoBufMut::filled(512, 7)).await.unwrap();
            assert!(buf.iter().all(|byte| *byte == expected), "{options}");
            disk.close().await.unwrap();
        }
    });
}
