//! Images of any kind on simulated disks, and their contents.

use std::collections::BTreeMap;
use std::sync::Arc;

use oxblk_core::{
    Backend, DriverTable, Graph, OpenFlags, Options, Perm, Permissions, Result, Secrets,
};
use oxblk_crypto::secret::Secret;
use oxblk_formats::qcow2::QCOW2;
use oxblk_ring::IoBufMut;
use oxblk_ring::sim::Disk;
use oxblk_tests::program::Program;
use oxblk_tests::scratch;
use oxblk_tests::sim_disk::{self, Pace, SimFactory};
use oxblk_tests::sim_image::check_sound;

static DRIVERS: DriverTable = &[QCOW2, &SimFactory];

/// Size of the disk before any change, in bytes. The disk ends within a cluster.
pub(in super::super) const OLD: u64 = 588 * 512;
/// Size of the backing file, in bytes.
const BACKING: usize = 2 << 20;

/// A kind of image.
#[derive(Clone, Copy)]
pub(in super::super) struct Kind {
    pub(in super::super) name: &'static str,
    /// Options of `qemu-img create`.
    pub(in super::super) create: &'static str,
    /// Command lines that change the new image. Each command line is a program and its arguments.
    pub(in super::super) steps: &'static [&'static [&'static str]],
    /// Whether the image has a backing file that is longer than the image.
    pub(in super::super) backing: bool,
}

const WRITE: &[&str] =
    &["qemu-io", "-c", "write -P 0xa1 0 200k", "-c", "write -P 0xa2 256000 45056"];
const SECRET: &str = "secret,id=key,data=abc";
const NAMED: &str = "driver=qcow2,encrypt.key-secret=key,file.filename=image";

impl Kind {
    pub(in super::super) const fn new(name: &'static str, create: &'static str) -> Self {
        Self { name, create, steps: &[], backing: false }
    }

    pub(in super::super) const fn over_backing(self) -> Self {
        Self { backing: true, ..self }
    }

    pub(in super::super) const fn with(self, steps: &'static [&'static [&'static str]]) -> Self {
        Self { steps, ..self }
    }

    /// Creates an image of this kind.
    pub(in super::super) fn make(&self) -> Set {
        let directory = scratch::in_memory();
        let encrypted = self.create.contains("encrypt");
        let run = |words: &[&str]| {
            let (tool, args) = words.split_first().unwrap();
            Program::new(tool).args(args).directory(directory.path()).succeed();
        };
        let size = OLD.to_string();
        let mut create = vec!["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-o", self.create];
        if encrypted {
            create.extend(["--object", SECRET]);
        }
        if self.backing {
            create.extend(["-b", "back", "-F", "raw"]);
            std::fs::write(directory.path().join("back"), vec![0xbb; BACKING]).unwrap();
        }
        create.extend(["image", &size]);
        run(&create);
        for words in [WRITE].iter().chain(self.steps) {
            let is_io = words.first() == Some(&"qemu-io");
            let image: &[&str] = match (encrypted, is_io) {
                (true, true) => &["--object", SECRET, "--image-opts", NAMED],
                _ if is_io => &["image"],
                _ => &[],
            };
            run(&[words, image].concat());
        }
        let read = |name: &str| std::fs::read(directory.path().join(name)).ok();
        Set {
            disk: Disk::from_bytes(1, &read("image").unwrap()),
            data: read("data").map(|bytes| Disk::from_bytes(2, &bytes)),
            backing: read("back").map(|bytes| Disk::from_bytes(3, &bytes)),
            encrypted,
        }
    }
}

/// An image and its disks.
#[derive(Clone)]
pub(in super::super) struct Set {
    pub(in super::super) disk: Disk,
    pub(in super::super) data: Option<Disk>,
    backing: Option<Disk>,
    encrypted: bool,
}

impl Set {
    /// Returns a copy of the image; `of` makes the copies of its disk and of the disk of its data file.
    pub(in super::super) fn map(&self, of: impl Fn(&Disk) -> Disk) -> Self {
        Self { disk: of(&self.disk), data: self.data.as_ref().map(of), ..self.clone() }
    }

    pub(in super::super) fn copy(&self) -> Self {
        self.map(|disk| Disk::from_bytes(7, &disk.bytes()))
    }

    /// Returns the same image on other disks: first the disk of the image, then the disk of the data file.
    pub(in super::super) fn on(&self, disks: &[Disk]) -> Self {
        Self { disk: disks[0].clone(), data: disks.get(1).cloned(), ..self.clone() }
    }

    pub(in super::super) fn disks(&self) -> Vec<&Disk> {
        std::iter::once(&self.disk).chain(&self.data).collect()
    }

    async fn open_as(&self, flags: OpenFlags) -> Result<Backend> {
        let secrets = Secrets::default();
        secrets.add("key", Secret::from_slice(b"abc"))?;
        let graph = Graph::with_secrets(DRIVERS, oxblk_core::Gate::Anything, secrets);
        let mut options = "driver=qcow2,file=disk".to_owned();
        graph.keep_open(sim_disk::add(&graph, "disk", &self.disk, false, Pace::AtOnce)?)?;
        if let Some(data) = &self.data {
            graph.keep_open(sim_disk::add(&graph, "data", data, false, Pace::AtOnce)?)?;
            options.push_str(",data-file=data");
        }
        if let Some(backing) = &self.backing {
            graph.keep_open(sim_disk::add(&graph, "back", backing, true, Pace::AtOnce)?)?;
            options.push_str(",backing=back");
        }
        if self.encrypted {
            options.push_str(",encrypt.key-secret=key");
        }
        let options = Options::from_dotted(&options, None)?;
        let node = graph.open(options, flags).await?;
        let taken = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        Backend::new(&graph, "", Arc::clone(&node), Permissions::sharing_all(taken))
    }

    pub(in super::super) async fn open(&self) -> Result<Backend> {
        self.open_as(OpenFlags { unmap: true, ..OpenFlags::default() }).await
    }

    /// Opens the image for a check only.
    pub(in super::super) async fn open_for_check(&self) -> Result<Backend> {
        self.open_as(OpenFlags { check: true, ..OpenFlags::default() }).await
    }

    /// Asserts that the driver's check finds no corruption, and no leaks unless `leaks` is set.
    pub(in super::super) async fn assert_sound(&self, leaks: bool, what: &str) {
        let backend = self.open_for_check().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        check_sound(&backend, leaks, what).await;
        backend.close().await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    /// Returns the exit code of `qemu-img check` and its output.
    pub(in super::super) fn check_by_qemu(&self) -> (i32, String) {
        let directory = scratch::in_memory();
        std::fs::write(directory.path().join("image"), self.disk.bytes()).unwrap();
        // The backing file of the image does not exist on the host.
        let name =
            r#"json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"image"}}"#;
        let reply = Program::new("qemu-img").args(["check", name]);
        let reply = reply.directory(directory.path()).run();
        (reply.code(), format!("{}{}", reply.out(), reply.err()))
    }
}

/// The contents of an image.
#[derive(Clone, PartialEq)]
pub(in super::super) struct Held {
    pub(in super::super) active: Vec<u8>,
    pub(in super::super) snapshots: Vec<(String, Vec<u8>)>,
    /// The offsets of the dirty granules of each bitmap that is not inconsistent.
    pub(in super::super) bitmaps: BTreeMap<String, Vec<u64>>,
    /// The options that can be amended.
    pub(in super::super) info: String,
}

/// Reads all guest data.
pub(in super::super) async fn contents(disk: &Backend) -> Result<Vec<u8>> {
    let len = usize::try_from(disk.size()).unwrap();
    Ok(disk.read(0, IoBufMut::new(len)).await?.to_vec())
}

/// Returns the offsets of the dirty granules of each bitmap that is not inconsistent.
pub(in super::super) fn bitmaps(disk: &Backend) -> BTreeMap<String, Vec<u64>> {
    let mut found = BTreeMap::new();
    for bitmap in disk.node().unwrap().bitmaps().snapshot().iter() {
        if bitmap.is_inconsistent() {
            continue;
        }
        let map = bitmap.map();
        assert_eq!(map.size(), disk.size(), "bitmap {} does not fit the disk", bitmap.name());
        let granules = (0..map.granules()).map(|granule| granule * map.granularity());
        found.insert(bitmap.name().to_owned(), granules.filter(|at| map.get(*at)).collect());
    }
    found
}

impl Held {
    /// Opens a copy of the image for writing, and returns its contents.
    pub(in super::super) async fn by(image: &Set, what: &str) -> Self {
        Self::of(image).await.unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// Does the same as [`Held::by`], but returns an error if the image cannot be opened.
    pub(in super::super) async fn of(image: &Set) -> Result<Self> {
        let copy = image.copy();
        let backend = copy.open().await?;
        let active = contents(&backend).await?;
        let bitmaps = bitmaps(&backend);
        let info = backend.node().unwrap().driver().info();
        let said = info.specific.unwrap();
        let info = format!("{} {} {}", said["compat"], said["data"], backend.size());
        let mut snapshots = Vec::new();
        if image.data.is_none() {
            for snapshot in backend.snapshots().await? {
                backend.apply_snapshot(&snapshot.id).await?;
                snapshots.push((snapshot.name, contents(&backend).await?));
            }
        }
        backend.close().await?;
        Ok(Self { active, snapshots, bitmaps, info })
    }
}
