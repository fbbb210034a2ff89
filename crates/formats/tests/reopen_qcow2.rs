//! Reopening qcow2 images: writability, cache sizes, replaced backing files, and rollback after a failure.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oxblk_core::create::{CreateRequest, CreateTarget};
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{
    Attachment, Backend, ChildIdx, DriverTable, Errno, Graph, Node, OpenFlags, Options, Perm,
    Permissions, ReopenRequest, Result, WriteFlags,
};
use oxblk_formats::qcow2::QCOW2;
use oxblk_formats::raw::RAW;
use oxblk_protocols::file::FILE;
use oxblk_ring::{IoBufMut, block_on, spawn, yield_now};

static DRIVERS: DriverTable = &[QCOW2, &RAW, &FILE];

const CLUSTER: u64 = 65536;

fn options(dotted: &str) -> Options {
    Options::from_dotted(dotted, None).unwrap()
}

struct Images {
    dir: tempfile::TempDir,
    graph: Graph,
}

impl Images {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            graph: Graph::new(DRIVERS, oxblk_core::Gate::Anything),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Creates an image of 1 MiB. With `byte`, its first cluster is filled with this byte.
    async fn make(&self, name: &str, more: &str, byte: Option<u8>) {
        let path = self.path(name);
        std::fs::write(&path, []).unwrap();
        let file = options(&format!("driver=file,filename={}", path.display()));
        let file = self.graph.open(file, OpenFlags::default()).await.unwrap();
        let all = Permissions::sharing_all(Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
        let edge = Attachment::new(&file, "creation", "file", all).unwrap();
        let request = CreateRequest {
            target: CreateTarget::File(Arc::clone(edge.edge())),
            options: options(&format!("size=1M{more}")),
        };
        QCOW2.create(&self.graph, request).unwrap().await.unwrap();
        drop(edge);
        self.graph.release(file).await.unwrap();
        if let Some(byte) = byte {
            let disk = self.open(name, "").await;
            write(&disk, 0, byte).await.unwrap();
            disk.close().await.unwrap();
        }
    }

    async fn open(&self, name: &str, more: &str) -> Backend {
        let path = self.path(name);
        let all = options(&format!(
            "driver=qcow2,node-name={name},file.filename={}{more}",
            path.display()
        ));
        self.graph.open_backend(None, all, OpenFlags::default()).await.unwrap()
    }

    /// Opens an image for writing, and does not share the write permission.
    async fn open_alone(&self, name: &str, more: &str) -> Backend {
        let path = self.path(name);
        let all = format!("driver=qcow2,node-name={name},file.filename={}{more}", path.display());
        let node = self.graph.open(options(&all), OpenFlags::default()).await.unwrap();
        let alone = Permissions {
            taken: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        };
        Backend::new(&self.graph, "", node, alone).unwrap()
    }

    fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.graph.node(name)
    }

    fn request(&self, name: &str, text: &str) -> ReopenRequest {
        ReopenRequest { node: self.node(name).unwrap(), options: options(text), keep: true }
    }

    async fn reopen(&self, name: &str, text: &str) -> Result<()> {
        self.graph.reopen(vec![self.request(name, text)]).await
    }

    /// The error message of a reopen that is refused.
    async fn refusal(&self, name: &str, text: &str) -> String {
        self.reopen(name, text).await.unwrap_err().to_string()
    }
}

async fn write(disk: &Backend, cluster: u64, byte: u8) -> Result<()> {
    let data = IoBufMut::filled(usize::try_from(CLUSTER).unwrap(), byte).freeze();
    disk.write(cluster * CLUSTER, data, WriteFlags::empty()).await
}

async fn byte(disk: &Backend, cluster: u64) -> u8 {
    let len = usize::try_from(CLUSTER).unwrap();
    let read = disk.read(cluster * CLUSTER, IoBufMut::new(len)).await.unwrap();
    assert!(read.iter().all(|byte| *byte == read[0]));
    read[0]
}

async fn is_sound(images: &Images, name: &str) {
    let disk = images.open(name, ",read-only=on").await;
    let node = disk.node().unwrap();
    let check = node.driver().check().unwrap();
    let report = check.check(oxblk_core::check::Fix::Nothing, &|_| {}).await.unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}");
    disk.close().await.unwrap();
}

#[test]
fn an_image_becomes_read_only_and_writable_again() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", Some(1)).await;
        let disk = images.open("disk", "").await;
        for round in 0..3 {
            write(&disk, round + 1, 10).await.unwrap();
            disk.reopen(options("read-only=on")).await.unwrap();
            assert_eq!(write(&disk, 9, 11).await.unwrap_err().raw_errno(), Errno::PERM);
            // All metadata is on disk, so another graph can read the image.
            let other = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let file = format!("driver=qcow2,file.filename={}", images.path("disk").display());
            let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
            let look = other.open_backend(None, options(&file), flags).await.unwrap();
            assert_eq!(byte(&look, round + 1).await, 10);
            look.close().await.unwrap();
            disk.reopen(options("read-only=off")).await.unwrap();
        }
        write(&disk, 9, 12).await.unwrap();
        assert_eq!((byte(&disk, 0).await, byte(&disk, 9).await), (1, 12));
        disk.resize(2 << 20, oxblk_core::Preallocation::Off).await.unwrap();
        disk.reopen(options("read-only=on")).await.unwrap();
        disk.reopen(options("read-only=off")).await.unwrap();
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

#[test]
fn a_write_in_flight_ends_before_the_image_becomes_read_only() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", None).await;
        let disk = images.open("disk", "").await;
        let writes: Vec<_> = (0..8)
            .map(|cluster| {
                let disk = disk.clone();
                spawn(async move { write(&disk, cluster, 6).await })
            })
            .collect();
        yield_now().await;
        disk.reopen(options("read-only=on")).await.unwrap();
        for write in writes {
            write.await.unwrap();
        }
        for cluster in 0..8 {
            assert_eq!(byte(&disk, cluster).await, 6);
        }
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

#[test]
fn an_image_opened_for_reading_can_be_made_writable() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", Some(1)).await;
        let disk = images.open("disk", ",read-only=on").await;
        assert_eq!(byte(&disk, 0).await, 1);
        disk.reopen(options("read-only=off")).await.unwrap();
        for cluster in 0..4 {
            write(&disk, cluster, 7).await.unwrap();
        }
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

#[test]
fn an_image_that_changed_while_it_was_read_only_does_not_become_writable() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", None).await;
        let disk = images.open("disk", ",read-only=on,file.locking=off").await;
        assert_eq!(byte(&disk, 0).await, 0);
        {
            let other = Graph::new(DRIVERS, oxblk_core::Gate::Anything);
            let path = images.path("disk");
            let file = format!("driver=qcow2,file.filename={}", path.display());
            let writer = other.open_backend(None, options(&file), OpenFlags::default()).await;
            let writer = writer.unwrap();
            write(&writer, 0, 3).await.unwrap();
            writer.close().await.unwrap();
        }
        let refused = disk.reopen(options("read-only=off")).await.unwrap_err();
        assert_eq!(refused.to_string(), "Image was changed while it was open read-only");
        assert!(disk.is_read_only());
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

#[test]
fn a_reopen_does_not_begin_or_end_the_use_of_file_locks() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", None).await;
        for (now, new) in [("on", "off"), ("off", "on")] {
            let disk = images.open("disk", &format!(",read-only=on,force-share={now}")).await;
            let refused = disk.reopen(options(&format!("force-share={new}"))).await.unwrap_err();
            assert_eq!(refused.to_string(), "Cannot change the option 'force-share'");
            disk.reopen(options(&format!("force-share={now}"))).await.unwrap();
            disk.close().await.unwrap();
        }
    });
}

#[test]
fn a_corrupt_image_does_not_become_writable() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", None).await;
        // Set incompatible feature bit 1 (corrupt).
        let file = std::fs::OpenOptions::new().write(true).open(images.path("disk")).unwrap();
        file.write_all_at(&2_u64.to_be_bytes(), 72).unwrap();
        let disk = images.open("disk", ",read-only=on").await;
        let refused = disk.reopen(options("read-only=off")).await.unwrap_err();
        assert_eq!(refused.raw_errno(), 13, "{refused}");
        assert!(disk.is_read_only());
        disk.close().await.unwrap();
    });
}

#[test]
fn an_image_that_was_not_closed_is_repaired_before_it_becomes_writable() {
    block_on(async {
        let images = Images::new();
        images.make("disk", ",cluster_size=4k", Some(1)).await;
        let path = images.path("disk");
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        // Set incompatible feature bit 0 (dirty), and overwrite all refcounts with zeroes.
        file.write_all_at(&1_u64.to_be_bytes(), 72).unwrap();
        file.write_all_at(&[0; 4096], 2 * 4096).unwrap();
        let disk = images.open("disk", ",read-only=on").await;
        disk.reopen(options("read-only=off")).await.unwrap();
        disk.write(1 << 16, vec![7; 1 << 16].into(), WriteFlags::empty()).await.unwrap();
        let read = disk.read(1 << 16, IoBufMut::new(1 << 16)).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

#[test]
fn a_repair_before_the_image_becomes_writable_may_replace_the_snapshot_table() {
    block_on(async {
        let images = Images::new();
        images.make("disk", "", Some(1)).await;
        let disk = images.open("disk", "").await;
        disk.create_snapshot(&SnapshotInfo::default()).await.unwrap();
        disk.close().await.unwrap();
        let mut bytes = std::fs::read(images.path("disk")).unwrap();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let table = usize::try_from(word(64)).unwrap();
        let extra = usize::try_from(word(table + 32) & 0xffff_ffff).unwrap();
        // Remove the extra data of the snapshot, and set incompatible feature bit 0 (dirty).
        bytes[table + 36..table + 40].fill(0);
        bytes.copy_within(table + 40 + extra..table + 200, table + 40);
        bytes[79] |= 1;
        std::fs::write(images.path("disk"), bytes).unwrap();
        let disk = images.open("disk", ",read-only=on").await;
        disk.reopen(options("read-only=off")).await.unwrap();
        for cluster in 1..5 {
            write(&disk, cluster, 7).await.unwrap();
        }
        disk.create_snapshot(&SnapshotInfo::default()).await.unwrap();
        assert_eq!(disk.snapshots().await.unwrap().len(), 2);
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

#[test]
fn cache_sizes_can_be_changed_and_fixed_options_are_refused() {
    block_on(async {
        let images = Images::new();
        images.make("disk", ",cluster_size=512", None).await;
        let disk = images.open("disk", "").await;
        let half = |disk: Backend, from: u64| async move {
            for offset in (from..1 << 20).step_by(4096) {
                disk.write(offset, vec![5; 512].into(), WriteFlags::empty()).await.unwrap();
            }
        };
        half(disk.clone(), 0).await;
        images.reopen("disk", "l2-cache-size=1024,refcount-cache-size=2048").await.unwrap();
        half(disk.clone(), 1024).await;
        images.reopen("disk", "l2-cache-size=1M,discard=unmap,detect-zeroes=unmap").await.unwrap();
        half(disk.clone(), 2048).await;
        let node = images.node("disk").unwrap();
        assert!(node.flags().unmap);
        assert_eq!(node.detect_zeroes(), oxblk_core::DetectZeroes::Unmap);
        for (text, message) in [
            ("colour=red", "Cannot change the option 'colour'"),
            (
                "l2-cache-entry-size=1024",
                "L2 cache entry size must be a power of two between 512 and the cluster size (512)",
            ),
            (
                "cache-size=1",
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
            ("driver=raw", "Cannot change the option 'driver'"),
        ] {
            assert_eq!(images.refusal("disk", text).await, message);
        }
        disk.close().await.unwrap();
        is_sound(&images, "disk").await;
    });
}

/// Opens `top`, an overlay of `base`, and a separate image `other`. The first cluster is filled with 1 in `base`, and
/// with 2 in `other`.
async fn chain(images: &Images) -> (Backend, Backend) {
    images.make("base", "", Some(1)).await;
    images.make("other", "", Some(2)).await;
    let backing = format!(",backing_file={},backing_fmt=qcow2", images.path("base").display());
    images.make("top", &backing, None).await;
    let other = images.open("other", ",read-only=on").await;
    (images.open_alone("top", ",backing.node-name=base,backing.driver=qcow2").await, other)
}

#[test]
fn a_backing_file_is_replaced_removed_and_added_again() {
    block_on(async {
        let images = Images::new();
        let (top, other) = chain(&images).await;
        write(&top, 1, 9).await.unwrap();
        assert_eq!(byte(&top, 0).await, 1);
        images.reopen("top", "backing=other").await.unwrap();
        assert_eq!((byte(&top, 0).await, byte(&top, 1).await), (2, 9));
        assert!(images.node("base").is_none(), "`base` has no user any more");
        let null = ReopenRequest {
            node: images.node("top").unwrap(),
            options: Options::from_json(r#"{"backing": null}"#).unwrap(),
            keep: true,
        };
        images.graph.reopen(vec![null]).await.unwrap();
        assert_eq!((byte(&top, 0).await, byte(&top, 1).await), (0, 9));
        assert!(images.node("other").is_some(), "`other` has its own user");
        images.reopen("top", "backing=other").await.unwrap();
        assert_eq!(byte(&top, 0).await, 2);
        // A backing file cannot be opened for writing by other users.
        let refused = other.reopen(options("read-only=off")).await.unwrap_err().to_string();
        assert!(refused.starts_with("Permission conflict on node 'other'"), "{refused}");
        top.close().await.unwrap();
        other.reopen(options("read-only=off")).await.unwrap();
        other.close().await.unwrap();
    });
}

#[test]
fn an_impossible_backing_file_is_refused_and_nothing_changes() {
    block_on(async {
        let images = Images::new();
        let (top, other) = chain(&images).await;
        for (name, text, message) in [
            ("top", "backing=nope", "Cannot find device='' nor node-name='nope'"),
            ("top", "backing=top", "Making 'top' a backing child of 'top' would create a cycle"),
            ("base", "backing=top", "Making 'top' a backing child of 'base' would create a cycle"),
        ] {
            assert_eq!(images.refusal(name, text).await, message);
        }
        // Without `keep`, the backing file must be given.
        let node = images.node("top").unwrap();
        let request = ReopenRequest { node, options: options("driver=qcow2"), keep: false };
        let refused = images.graph.reopen(vec![request]).await.unwrap_err();
        assert_eq!(refused.to_string(), "backing is missing for 'top'");
        // The other image has a writer, so it cannot become a backing file.
        other.reopen(options("read-only=off")).await.unwrap();
        let refused = images.refusal("top", "backing=other").await;
        assert!(
            refused.starts_with("Permission conflict on node 'other': permissions 'write"),
            "{refused}"
        );
        let below = images.node("top").unwrap().child(ChildIdx::BACKING).unwrap();
        assert_eq!(below.name(), "base");
        assert_eq!(byte(&top, 0).await, 1);
        write(&other, 0, 4).await.unwrap();
        // The old backing file is still protected.
        let base = images.node("base").unwrap();
        let taken = Permissions::sharing_all(Perm::WRITE);
        assert!(Attachment::new(&base, "a test", "root", taken).is_err());
        top.close().await.unwrap();
        other.close().await.unwrap();
    });
}

#[test]
fn two_images_of_a_chain_swap_places_in_one_reopen() {
    block_on(async {
        let images = Images::new();
        let (top, other) = chain(&images).await;
        images.reopen("base", "backing=other").await.unwrap();
        // `base` above `other` becomes `other` above `base`. If the changes were made one by one, the chain would form a
        // loop after the first change.
        let null = ReopenRequest {
            node: images.node("base").unwrap(),
            options: Options::from_json(r#"{"backing": null}"#).unwrap(),
            keep: true,
        };
        let requests = vec![
            images.request("top", "backing=other"),
            images.request("other", "backing=base"),
            null,
        ];
        images.graph.reopen(requests).await.unwrap();
        assert_eq!(byte(&top, 0).await, 2);
        assert!(images.node("base").is_some());
        top.close().await.unwrap();
        other.close().await.unwrap();
        assert!(images.graph.nodes().is_empty());
    });
}

#[test]
fn the_chain_of_a_writable_base_is_frozen_and_the_base_has_one_writer() {
    block_on(async {
        let images = Images::new();
        let (top, other) = chain(&images).await;
        let (node, base) = (images.node("top").unwrap(), images.node("base").unwrap());
        let writable = images.graph.write_base(&node, &base).await.unwrap();
        assert_eq!(
            images.refusal("top", "backing=other").await,
            "Cannot change frozen 'backing' link from 'top' to 'base'"
        );
        let second = images.graph.write_base(&node, &base).await.err().unwrap().to_string();
        assert!(
            second.starts_with("Permission conflict on node 'base': permissions 'write"),
            "{second}"
        );
        write(writable.backend(), 0, 7).await.unwrap();
        writable.close().await.unwrap();
        assert_eq!(byte(&top, 0).await, 7);
        assert!(base.is_read_only());
        images.reopen("top", "backing=other").await.unwrap();
        top.close().await.unwrap();
        other.close().await.unwrap();
    });
}

#[test]
fn a_failed_reopen_is_rolled_back_for_all_images() {
    block_on(async {
        let images = Images::new();
        let (top, other) = chain(&images).await;
        images.make("third", "", Some(3)).await;
        let third = images.open("third", "").await;
        let gone = images.path("third");
        for last in ["l2-cache-entry-size=3", "read-only=on", "colour=red", "file.filename=x"] {
            let requests = vec![
                images.request("top", "backing=other,cache.no-flush=on,l2-cache-size=4096"),
                images.request("third", last),
            ];
            images.graph.reopen(requests).await.unwrap_err();
            assert_eq!(byte(&top, 0).await, 1, "after {last}");
            let node = images.node("top").unwrap();
            assert_eq!(node.child(ChildIdx::BACKING).unwrap().name(), "base");
            assert!(!node.flags().no_flush && !third.is_read_only());
            write(&top, 2, 8).await.unwrap();
            write(&third, 2, 8).await.unwrap();
        }
        assert!(Path::new(&gone).exists());
        for disk in [&top, &other, &third] {
            disk.close().await.unwrap();
        }
        for name in ["top", "third"] {
            is_sound(&images, name).await;
        }
    });
}
