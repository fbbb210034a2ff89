//! Where the images of the disks are: on simulated disks, or in files.

use std::path::PathBuf;

use oxblk_core::{Backend, DriverTable, Graph, Node, OpenFlags, Options, Result};
use oxblk_filters::throttle::{Group, GroupLimits, Notation};
use oxblk_ring::sim;
use tempfile::TempDir;

use super::SIZE;
use super::refuser::RefuserFactory;
use crate::program::Program;
use crate::scratch;
use crate::sim_disk::{self, Pace};

use std::sync::{Arc, OnceLock};

/// The drivers of oxblk, and the filter of this test.
pub(super) fn drivers() -> DriverTable {
    static DRIVERS: OnceLock<&'static [&'static dyn oxblk_core::DriverFactory]> = OnceLock::new();
    static REFUSER: RefuserFactory = RefuserFactory;
    DRIVERS.get_or_init(|| {
        let mut all = oxblk::drivers().to_vec();
        all.push(&REFUSER);
        Vec::leak(all)
    })
}

/// Creates the files of images.
pub(super) struct Storage {
    place: Place,
    /// The bytes of an empty qcow2 image.
    template: Vec<u8>,
    count: u64,
}

enum Place {
    Simulated { seed: u64 },
    Files(TempDir),
}

fn template() -> Vec<u8> {
    static TEMPLATE: OnceLock<Vec<u8>> = OnceLock::new();
    let make = || {
        let directory = scratch::in_memory();
        let path = directory.path().join("empty.qcow2");
        let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"];
        Program::new("qemu-img").args(create).arg(&path).arg(SIZE.to_string()).succeed();
        std::fs::read(path).expect("the image that was made")
    };
    TEMPLATE.get_or_init(make).clone()
}

impl Storage {
    pub(super) fn simulated(seed: u64) -> Self {
        Self { place: Place::Simulated { seed }, template: template(), count: 0 }
    }

    pub(super) fn on_files() -> Self {
        Self { place: Place::Files(scratch::in_memory()), template: template(), count: 0 }
    }

    /// Whether the images are files of the host.
    pub(super) fn is_on_files(&self) -> bool {
        matches!(self.place, Place::Files(_))
    }

    fn next(&mut self) -> u64 {
        self.count += 1;
        self.count
    }

    /// A name for a new node.
    pub(super) fn name(&mut self) -> String {
        format!("n{}", self.next())
    }

    /// Opens a new empty image. `options` are the other options of the image.
    pub(super) async fn image(&mut self, graph: &Graph, options: &str) -> Result<Arc<Node>> {
        let number = self.next();
        let (file, node) = match &self.place {
            Place::Simulated { seed } => {
                let disk = sim::Disk::from_bytes(seed ^ number, &self.template);
                let name = format!("s{number}");
                let node = sim_disk::add(graph, &name, &disk, false, Pace::GivesWay)?;
                (format!("file={name}"), Some(node))
            }
            Place::Files(directory) => {
                let path: PathBuf = directory.path().join(format!("{number}.qcow2"));
                std::fs::write(&path, &self.template).expect("a new file");
                (format!("file.driver=file,file.filename={}", path.display()), None)
            }
        };
        let all = format!("driver=qcow2,node-name=i{number},{file}{options}");
        let opened = graph.open(Options::from_dotted(&all, None)?, flags()).await;
        if let (Err(_), Some(node)) = (&opened, node) {
            graph.release(node).await?;
        }
        opened
    }

    /// Opens a new node with these bytes.
    pub(super) async fn copy(&mut self, graph: &Graph, bytes: &[u8]) -> Result<Arc<Node>> {
        let number = self.next();
        let name = format!("c{number}");
        match &self.place {
            Place::Simulated { seed } => {
                let disk = sim::Disk::from_bytes(seed ^ number, bytes);
                sim_disk::add(graph, &name, &disk, false, Pace::GivesWay)
            }
            Place::Files(directory) => {
                let path = directory.path().join(format!("{number}.copy"));
                std::fs::write(&path, bytes).expect("a new file");
                let all = format!("driver=file,node-name={name},filename={}", path.display());
                graph.open(Options::from_dotted(&all, None)?, flags()).await
            }
        }
    }

    /// Opens a new disk.
    pub(super) async fn disk(&mut self, graph: &Graph) -> Backend {
        let image = self.image(graph, "").await.expect("a new image opens");
        let permissions = super::steps::writing();
        Backend::new(graph, "", image, permissions).expect("a disk")
    }
}

fn flags() -> OpenFlags {
    OpenFlags { unmap: true, ..OpenFlags::default() }
}

/// Adds the throttle groups that the filters use: one without limits and one with a limit.
pub(super) fn add_groups(graph: &Graph) {
    for (id, limits) in [("free", ""), ("limited", "x-iops-total=2000,x-iops-total-max=4000")] {
        let mut options = Options::from_dotted(limits, None).expect("limits");
        let limits = GroupLimits::take(&mut options, Notation::KeyValue).expect("limits");
        graph.objects().add(id, Group::new(id, limits)).expect("a new group");
    }
}
