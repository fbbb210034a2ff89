//! Requests that are cancelled (their futures are dropped) on simulated disks.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use oxblk_core::{Backend, WriteFlags, ZeroFlags};
use oxblk_ring::sim::{self, Disk, Faults};
use oxblk_ring::{IoBuf, IoBufMut};
use oxblk_tests::formats::named;
use oxblk_tests::model::chain::{self, Image, Tolerance};

const CLUSTER: usize = 4096;
const SIZE: u64 = 1 << 20;

/// Polls a request up to `polls` times, then cancels it. Returns whether the request completed first.
pub(crate) async fn give_up<F: Future>(polls: usize, request: F) -> bool {
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

/// Runs a test on the simulated executor again and again, with one more poll each time, until the test no longer cancels a
/// request.
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
        // Two full clusters and two partial ones: the write needs tables, clusters and copy-on-write.
        let data = IoBuf::from(vec![7; 3 * CLUSTER]);
        let mut done = give_up(polls, disk.write(100, data, WriteFlags::empty())).await;
        let packed = IoBuf::from(vec![8; CLUSTER]);
        let compressed = disk.write(65_536, packed, WriteFlags::COMPRESSED);
        done &= give_up(polls, compressed).await;
        drop(disk.quiesce().await);
        assert!(read(&disk, 100, 3 * CLUSTER).await.iter().all(|byte| *byte == 7));
        assert!(read(&disk, 65_536, CLUSTER).await.iter().all(|byte| *byte == 8));
        let zeroes = disk.write_zeroes(0, 8192, ZeroFlags::MAY_UNMAP);
        done &= give_up(polls, zeroes).await;
        drop(disk.quiesce().await);
        assert!(read(&disk, 0, 8192).await.iter().all(|byte| *byte == 0));
        chain::close(disk).await.expect("it closes");
        chain::check(&image, Tolerance::Clean).await.expect("it is clean");
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
        let done = give_up(polls, disk.flush()).await;
        disk.flush().await.expect("a flush");
        // A power cut.
        let left = Image { disk: image.disk.after_power_loss_none(), ..image };
        let again = chain::open(&[left]).await.expect("it opens");
        assert!(read(&again, 0, CLUSTER).await.iter().all(|byte| *byte == 7));
        chain::close(again).await.expect("it closes");
        chain::close(disk).await.expect("it closes");
        done
    });
}
