//! Requests that are cancelled (their futures are dropped) on simulated disks.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use oxblk_core::{Backend, Graph, Node, OpenFlags, Options, WriteFlags, ZeroFlags};
use oxblk_ring::sim::{self, Disk, Faults};
use oxblk_ring::{IoBuf, IoBufMut};
use oxblk_tests::formats::named;
use oxblk_tests::model::chain::{self, Image, Tolerance};
use oxblk_tests::sim_disk::{self, Pace};

const CLUSTER: usize = 4096;
const SIZE: u64 = 1 << 20;

/// Polls a request up to `polls` times, then cancels it. Returns whether the request completed first.
pub(crate) async fn cancel<F: Future>(polls: usize, request: F) -> bool {
    let mut request = pin!(request);
    for _ in 0..polls {
        let done =
            std::future::poll_fn(|context| Poll::Ready(request.as_mut().poll(context).is_ready()));
        if done.await {
            return true;
        }
        oxblk_ring::sleep(Duration::from_micros(300)).await;
    }
    false
}

/// Runs a test on the simulated executor repeatedly, each time with one more poll, until the request of the test completes
/// without being cancelled.
pub(crate) fn at_every_step<F: Future<Output = bool>>(most: usize, test: impl Fn(usize) -> F) {
    let ended = (1..most).any(|polls| sim::run(polls as u64, test(polls)));
    assert!(ended, "no number of polls is enough");
}

/// Creates a qcow2 image on a disk with latency.
pub(crate) async fn image() -> Image {
    let image = Image { variant: named("qcow2-4k")[0], disk: Disk::new(1, 0) };
    chain::create(&image, SIZE).await.expect("an image");
    let delay = Duration::from_micros(100)..Duration::from_millis(1);
    image.disk.set_faults(Faults { delay, ..Faults::default() });
    image
}

pub(crate) async fn read(disk: &Backend, offset: u64, len: usize) -> IoBufMut {
    disk.read(offset, IoBufMut::zeroed(len)).await.expect("a read")
}

#[test]
fn a_write_cancelled_at_any_step_runs_to_completion() {
    at_every_step(40, |polls| async move {
        let image = image().await;
        let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
        // The write covers two full clusters and two partial clusters, so it needs tables, clusters and copy-on-write.
        let data = IoBuf::from(vec![7; 3 * CLUSTER]);
        let mut done = cancel(polls, disk.write(100, data, WriteFlags::empty())).await;
        let packed = IoBuf::from(vec![8; CLUSTER]);
        let compressed = disk.write(65_536, packed, WriteFlags::COMPRESSED);
        done &= cancel(polls, compressed).await;
        drop(disk.quiesce().await);
        assert!(read(&disk, 100, 3 * CLUSTER).await.iter().all(|byte| *byte == 7));
        assert!(read(&disk, 65_536, CLUSTER).await.iter().all(|byte| *byte == 8));
        let zeroes = disk.write_zeroes(0, 8192, ZeroFlags::MAY_UNMAP);
        done &= cancel(polls, zeroes).await;
        drop(disk.quiesce().await);
        assert!(read(&disk, 0, 8192).await.iter().all(|byte| *byte == 0));
        chain::close(disk).await.expect("it closes");
        chain::check(&image, Tolerance::Clean).await.expect("it is clean");
        done
    });
}

/// Opens an image on a disk node that is added to the graph.
async fn open_on(
    graph: &Graph,
    (name, disk): (&str, &Disk),
    more: &str,
    flags: OpenFlags,
) -> oxblk_core::Result<Arc<Node>> {
    let below = format!("{name}-disk");
    graph.keep_open(sim_disk::add(graph, &below, disk, false, Pace::AtOnce)?)?;
    let text = format!("driver=qcow2,file={below},node-name={name}{more}");
    graph.open(Options::from_dotted(&text, None)?, flags).await
}

/// Waits longer than any cancelled operation takes. The time is simulated.
async fn wait_for_cancelled() {
    oxblk_ring::sleep(Duration::from_secs(1)).await;
}

#[test]
fn a_cancelled_open_leaves_a_closed_image() {
    at_every_step(60, |polls| async move {
        let image = image().await;
        let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
        let (graph, node) = (disk.graph(), disk.node().expect("a node"));
        graph.add_persistent_bitmap(&node, "b", None).await.expect("a bitmap");
        drop(node);
        chain::close(disk).await.expect("it closes");
        let graph = chain::graph();
        let open = async {
            let node = open_on(&graph, ("a", &image.disk), "", OpenFlags::default()).await;
            graph.release(node.expect("it opens")).await.expect("it closes");
        };
        let done = cancel(polls, open).await;
        wait_for_cancelled().await;
        assert!(graph.node("a").is_none());
        let disk = chain::open(&[image]).await.expect("it opens");
        let bitmap = disk.node().unwrap().bitmaps().find("b").expect("a bitmap");
        assert!(!bitmap.is_inconsistent(), "the image was not closed");
        chain::close(disk).await.expect("it closes");
        done
    });
}

#[test]
fn a_base_is_read_only_after_a_cancelled_commit() {
    at_every_step(100, |polls| async move {
        let (below, above) = (image().await, image().await);
        let graph = chain::graph();
        let read_only = OpenFlags { read_only: true, ..OpenFlags::default() };
        let base = open_on(&graph, ("base", &below.disk), "", read_only).await.expect("it opens");
        let flags = OpenFlags::default();
        let top = open_on(&graph, ("top", &above.disk), ",backing=base", flags).await;
        let top = top.expect("it opens");
        let write = async {
            let writable = graph.write_base(&top, &base).await.expect("a writable base");
            let data = IoBuf::from(vec![7; CLUSTER]);
            let written = writable.backend().write(0, data, WriteFlags::empty()).await;
            written.expect("a write");
            writable.close().await.expect("it closes");
        };
        let done = cancel(polls, write).await;
        wait_for_cancelled().await;
        assert!(base.is_read_only(), "after {polls} polls");
        graph.release(top).await.expect("it closes");
        chain::check(&below, Tolerance::Clean).await.expect("it is clean");
        done
    });
}

#[test]
fn the_flush_after_a_cancelled_flush_makes_writes_durable() {
    at_every_step(60, |polls| async move {
        let image = image().await;
        let disk = chain::open(std::slice::from_ref(&image)).await.expect("it opens");
        let data = IoBuf::from(vec![7; CLUSTER]);
        disk.write(0, data, WriteFlags::empty()).await.expect("a write");
        let done = cancel(polls, disk.flush()).await;
        disk.flush().await.expect("a flush");
        // Cut the power: only flushed writes remain.
        let left = Image { disk: image.disk.after_power_loss_none(), ..image };
        let again = chain::open(&[left]).await.expect("it opens");
        assert!(read(&again, 0, CLUSTER).await.iter().all(|byte| *byte == 7));
        chain::close(again).await.expect("it closes");
        chain::close(disk).await.expect("it closes");
        done
    });
}
