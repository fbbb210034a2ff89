//! Power cuts while an overlay is committed. Each image may have stored any part of the commit. In all cases, the contents of
//! the overlay stay the same.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk::commit::{self, Commit};
use oxblk::copy::Observer;
use oxblk_core::{
    Backend, ChildIdx, Graph, OpenFlags, Options, Perm, Permissions, Result, WriteFlags,
};
use oxblk_ring::sim::{self, Disk};
use oxblk_tests::crash::change::{self, assert_sound, contents, image};
use oxblk_tests::sim_disk::{self, Pace};

struct Unheard;

impl Observer for Unheard {
    fn progress(&self, _done: u64, _total: u64) {}
}

/// Opens an overlay over its base; each image has its own disk.
async fn open(top: &Disk, base: &Disk) -> Result<Backend> {
    let graph = Graph::new(oxblk::drivers(), oxblk_core::Gate::Anything);
    graph.keep_open(sim_disk::add(&graph, "top-disk", top, false, Pace::AtOnce)?).unwrap();
    graph.keep_open(sim_disk::add(&graph, "base-disk", base, false, Pace::AtOnce)?).unwrap();
    let options = "driver=qcow2,file=top-disk,backing.driver=qcow2,backing.file=base-disk";
    let options = Options::from_dotted(options, None)?;
    let node = graph.open(options, OpenFlags { unmap: true, ..OpenFlags::default() }).await?;
    let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    Backend::new(&graph, "", node, Permissions::sharing_all(taken))
}

async fn seen(top: &Disk, base: &Disk) -> Result<Vec<u8>> {
    let backend = open(top, base).await?;
    let seen = contents(&backend).await;
    backend.close().await?;
    Ok(seen)
}

async fn commit(top: &Disk, base: &Disk, empty: bool) {
    let backend = open(top, base).await.expect("the chain");
    let below = backend.node().expect("a node").child(ChildIdx::BACKING).expect("a base");
    let commit = Commit {
        top: backend.clone(),
        base: below,
        empty,
        parallel: 4,
        rate: None,
        observer: Arc::new(Unheard),
        stop: Arc::new(AtomicBool::new(false)),
    };
    commit::run(commit, &[]).await.expect("a commit");
    backend.close().await.expect("a close");
}

/// Returns the disk after a power cut.
fn left(disk: &Disk, how: u64) -> Disk {
    match how {
        0 => disk.after_power_loss_none(),
        1 => disk.after_power_loss_all(),
        seed => disk.after_power_loss(seed),
    }
}

const BELOW: &[&[&str]] =
    &[&["qemu-io", "-c", "write -P 1 0 300k", "-c", "write -P 2 500k 100k", "image"]];
const ABOVE: &[&[&str]] = &[&[
    "qemu-io",
    "-c",
    "write -P 3 100k 50k",
    "-c",
    "write -z 250k 100k",
    "-c",
    "write -P 4 700k 90k",
    "-c",
    "write -c -P 5 896k 64k",
    "image",
]];

#[test]
fn a_power_cut_during_a_commit_leaves_the_overlay_contents_unchanged() {
    let cases = [
        ("cluster_size=4k", "cluster_size=64k", "1M", true),
        ("cluster_size=64k", "cluster_size=512", "1M", true),
        ("cluster_size=4k,extended_l2=off", "cluster_size=16k,extended_l2=on", "700k", true),
        ("cluster_size=4k,lazy_refcounts=on", "cluster_size=4k,lazy_refcounts=on", "600k", true),
        ("cluster_size=4k,compat=0.10", "cluster_size=4k,compat=0.10", "1M", true),
        ("cluster_size=64k", "cluster_size=4k", "1M", false),
    ];
    for (seed, (above, below, size, empty)) in (0..).zip(cases) {
        let what = format!("{above} onto {below}, {size}");
        let base = image(seed, &["-o", below, "image", size], BELOW);
        let top = image(seed, &["-o", above, "image", "1M"], ABOVE);
        let old = sim::run(seed, async {
            let copies = (top.after_power_loss_all(), base.after_power_loss_all());
            let old = seen(&copies.0, &copies.1).await.expect("the chain");
            Disk::keep_common_moments(&[&top, &base], seed, 12);
            commit(&top, &base, empty).await;
            let now = seen(&top.after_power_loss_none(), &base.after_power_loss_none()).await;
            assert!(now.expect("the chain") == old, "{what}: the overlay shows something else");
            old
        });
        let moments = top.common_moments();
        assert!(moments.len() >= 8, "{what}: {} moments", moments.len());
        for (number, (_, disks)) in moments.iter().enumerate() {
            let [top, base] = disks.as_slice() else { panic!("{} disks", disks.len()) };
            for (above, below) in [(0, 0), (1, 1), (0, 1), (1, 0), (2, 3), (4, 5), (2, 1), (0, 3)] {
                let what = format!("{what}: moment {number}, {above}, {below}");
                let (top, base) = (left(top, above), left(base, below));
                sim::run(seed, async {
                    let now = seen(&top, &base).await;
                    let now = now.unwrap_or_else(|error| panic!("{what}: {error}"));
                    assert!(now == old, "{what}: the overlay shows something else");
                    for disk in [&top, &base] {
                        // A dirty image is repaired when it is opened for writing.
                        let image = change::open(disk, "", false).await.expect("an image");
                        image.close().await.expect("a close");
                        assert_sound(disk, true, &what).await;
                    }
                });
            }
        }
    }
}

#[test]
fn a_commit_does_not_change_the_bitmaps_of_the_overlay() {
    const GRANULARITY: u64 = 65536;
    let base = image(1, &["image", "1M"], &[]);
    let top = image(1, &["image", "1M"], &[]);
    sim::run(1, async {
        let backend = open(&top, &base).await.expect("the chain");
        let node = backend.node().expect("a node");
        let graph = backend.graph().clone();
        let bitmap = graph.add_bitmap(&node, "changes", Some(GRANULARITY)).await.expect("a bitmap");
        backend
            .write(GRANULARITY, vec![1; 512].into(), WriteFlags::empty())
            .await
            .expect("a write");
        let commit = Commit {
            top: backend.clone(),
            base: node.child(ChildIdx::BACKING).expect("a base"),
            empty: true,
            parallel: 4,
            rate: None,
            observer: Arc::new(Unheard),
            stop: Arc::new(AtomicBool::new(false)),
        };
        commit::run(commit, &[]).await.expect("a commit");
        assert_eq!(bitmap.map().count(), GRANULARITY);
        drop(node);
        backend.close().await.expect("a close");
    });
}
