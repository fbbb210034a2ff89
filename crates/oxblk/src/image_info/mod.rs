//! What an image is: size, format, files, snapshots. The contents of `img info`.
//!
//! | | |
//! |---|---|
//! | `name` | the name that opens a node again |
//! | `qapi` | all of it as QAPI's `ImageInfo` |
//! | `limits` | limits of requests as QAPI's `BlockLimitsInfo` |

mod limits;
mod name;
mod qapi;

use std::sync::Arc;

use oxblk_core::snapshot::{self, SnapshotInfo};
use oxblk_core::{Backend, ChildIdx, Limits, Node, Result, relative_to};
use serde_json::Value;

/// Sizes of disks are multiples of this many bytes.
const SECTOR: u64 = 512;

/// The backing file that an image names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// The name in the image.
    pub name: String,
    /// The name as seen from this process: a relative name means the folder of the image.
    pub full_name: String,
    /// The format in the image.
    pub format: Option<String>,
}

/// What an image is.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The name that opens it: a file name, or `json:{…}` if a file name does not suffice.
    pub name: String,
    /// The driver's name: `qcow2`, or `file` for the file below.
    pub format: String,
    /// Size of the disk in bytes, in whole sectors.
    pub virtual_size: u64,
    /// Bytes that it occupies on the host, if the host tells.
    pub actual_size: Option<u64>,
    /// Bytes of a cluster, if there are clusters.
    pub cluster_size: Option<u64>,
    /// The image was not closed. `None`: the format does not tell.
    pub is_dirty: Option<bool>,
    /// Guest data is encrypted.
    pub is_encrypted: bool,
    /// The backing file that it names.
    pub backing: Option<BackingName>,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// What only its driver knows, as QAPI's `ImageInfoSpecific`.
    pub specific: Option<Value>,
    /// What requests it takes.
    pub limits: Arc<Limits>,
    /// The nodes below, and what the node uses each for: `file`, `backing`, `data-file`.
    pub children: Vec<(&'static str, ImageInfo)>,
}

impl ImageInfo {
    /// Reads it from an image that is open, with its snapshots and those of the nodes below.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound) if the backend is closed.
    pub async fn read(backend: &Backend) -> Result<Self> {
        let root = backend.node()?;
        let mut info = Self::of_node(&root);
        let mut rest = vec![(root, &mut info)];
        while let Some((node, info)) = rest.pop() {
            // A format without snapshots has none to list.
            info.snapshots = snapshot::list(&node).await.unwrap_or_default();
            for (name, below) in &mut info.children {
                let mut children = node.children().iter();
                if let Some((_, edge)) = children.find(|(child, _)| child.name() == *name) {
                    rest.push((Arc::clone(edge.node()), below));
                }
            }
        }
        Ok(info)
    }

    fn of_node(node: &Node) -> Self {
        let driver = node.driver().info();
        let name = name::of_node(node);
        let clusters = has_own_info(node).then(|| clusters_of(node));
        let backing = driver.backing_filename.map(|backing| BackingName {
            full_name: relative_to(&name, &backing),
            name: backing,
            format: driver.backing_format,
        });
        let children = node.children();
        let child = |(child, edge): (ChildIdx, Arc<oxblk_core::Edge>)| {
            (child.name(), Self::of_node(edge.node()))
        };
        Self {
            format: node.factory().name().to_owned(),
            virtual_size: node.size().checked_next_multiple_of(SECTOR).unwrap_or(node.size()),
            actual_size: node.allocated_size(),
            cluster_size: clusters.map(|(size, _)| size).filter(|size| *size != 0),
            is_dirty: clusters.map(|(_, is_dirty)| is_dirty),
            is_encrypted: driver.is_encrypted,
            backing,
            snapshots: Vec::new(),
            specific: driver.specific,
            limits: node.limits(),
            children: children.iter().map(child).collect(),
            name,
        }
    }

    /// All of it as QAPI's `ImageInfo`; with its `limits` if `with_limits`.
    pub fn to_json(&self, with_limits: bool) -> Value {
        qapi::image_info(self, with_limits)
    }
}

/// Whether the driver, or a node that it passes on to, has more information on its image than the size.
pub fn has_own_info(node: &Node) -> bool {
    let knows = node.driver().info() != oxblk_core::ImageInfo::default();
    let passes_on = node.factory().passes_permissions();
    knows || passes_on && node.children().iter().any(|(_, edge)| has_own_info(edge.node()))
}

/// Cluster size and whether the image is dirty: the node's own, or those of the node that it passes on to.
fn clusters_of(node: &Node) -> (u64, bool) {
    let info = node.driver().info();
    match node.child(ChildIdx::FILE) {
        Some(file) if node.factory().passes_permissions() => clusters_of(&file),
        _ => (info.cluster_size, info.is_dirty),
    }
}
