//! Information on an image: size, format, files, snapshots. `img info` prints it.
//!
//! | | |
//! |---|---|
//! | `name` | the file name, or `json:` name, with which a node can be opened again |
//! | `limits` | the limits of requests as QAPI's `BlockLimitsInfo` |

pub(crate) mod limits;
pub(crate) mod name;

use std::cmp::Reverse;
use std::sync::Arc;

use oxblk_core::snapshot::{self, SnapshotInfo};
use oxblk_core::{Backend, ChildIdx, Errno, Limits, Node, Result, relative_to};
use serde_json::Value;

use crate::in_sectors;

/// The reference to a backing file in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// The name as stored in the image.
    pub name: String,
    /// The name resolved for this process: a relative name is relative to the folder of the image.
    pub full_name: String,
    /// The format as stored in the image.
    pub format: Option<String>,
}

/// Information on an image.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The name with which the image can be opened: a file name, or `json:{…}` if a file name is not sufficient.
    pub name: String,
    /// The name of the driver: `qcow2`, or `file` for the protocol node below.
    pub format: String,
    /// Size of the disk in bytes, rounded up to a multiple of 512.
    pub virtual_size: u64,
    /// Bytes that the image occupies on the host, if known.
    pub actual_size: Option<u64>,
    /// Cluster size in bytes, if the format has clusters.
    pub cluster_size: Option<u64>,
    /// Whether the image was not closed after its last use. `None`: the driver knows only the size of the image.
    pub is_dirty: Option<bool>,
    /// Whether guest data is encrypted.
    pub is_encrypted: bool,
    /// The reference to the backing file.
    pub backing: Option<BackingName>,
    /// The internal snapshots of the image.
    pub snapshots: Vec<SnapshotInfo>,
    /// Information that is specific to the driver, as a JSON object of the QAPI type `ImageInfoSpecific`.
    pub specific: Option<Value>,
    /// The limits of requests.
    pub limits: Arc<Limits>,
    /// The children, each with its role: `file`, `backing`, `data-file`, `children.0`.
    pub children: Vec<(String, ImageInfo)>,
}

impl ImageInfo {
    /// Collects the information on an open image and on all nodes below it, with their snapshots.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound) if the backend is closed; the errors of the image if its snapshot table cannot
    /// be read. If the image was opened without its snapshots, the list of snapshots is empty.
    pub async fn read(backend: &Backend) -> Result<Self> {
        let root = backend.node()?.skip_implicit_filters();
        let mut info = Self::of_node(&root);
        let mut rest = vec![(root, &mut info)];
        while let Some((node, info)) = rest.pop() {
            info.snapshots = match snapshot::list(&node).await {
                // The format has no snapshots.
                Err(error) if error.raw_errno() == Errno::OPNOTSUPP => Vec::new(),
                // The open has reported why.
                Err(_) if snapshot::are_left_out(&node) => Vec::new(),
                list => list.map_err(|error| error.prefix("Can't list snapshots of device ''"))?,
            };
            for (name, below) in &mut info.children {
                let mut children = node.children().iter();
                if let Some((_, edge)) = children.find(|(_, edge)| edge.name() == *name) {
                    rest.push((edge.node().skip_implicit_filters(), below));
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
        let mut children: Vec<_> = node.children().iter().collect();
        children.sort_by_key(|(child, _)| display_order(*child));
        Self {
            format: node.factory().name().to_owned(),
            virtual_size: in_sectors(node.size()),
            actual_size: node.allocated_size(),
            cluster_size: clusters.map(|(size, _)| size).filter(|size| *size != 0),
            is_dirty: clusters.map(|(_, is_dirty)| is_dirty),
            is_encrypted: driver.is_encrypted,
            backing,
            snapshots: Vec::new(),
            specific: driver.specific,
            limits: node.limits(),
            children: children
                .into_iter()
                .map(|(_, edge)| {
                    (edge.name().to_owned(), Self::of_node(&edge.node().skip_implicit_filters()))
                })
                .collect(),
            name,
        }
    }

    /// The information as a JSON object of the QAPI type `BlockGraphInfo`. `with_limits` adds the key `limits`.
    pub fn to_json(&self, with_limits: bool) -> Value {
        crate::qapi::image_info(self, with_limits)
    }
}

/// Orders the children as QEMU shows them: the child that was opened last is the first.
fn display_order(child: ChildIdx) -> (u8, Reverse<ChildIdx>) {
    let slot = match child {
        ChildIdx::BACKING => 1,
        ChildIdx::DATA => 2,
        ChildIdx::FILE => 3,
        _ => 0,
    };
    (slot, Reverse(child))
}

/// Whether the driver has more information on its image than the size. If the driver passes requests on, this is also true if a
/// child has more information.
pub fn has_own_info(node: &Node) -> bool {
    let knows = node.driver().info() != oxblk_core::ImageInfo::default();
    let passes_on = node.factory().passes_permissions();
    knows || passes_on && node.child(ChildIdx::FILE).is_some_and(|file| has_own_info(&file))
}

/// The cluster size, and whether the image is dirty. If the node passes requests on, the values of its child are returned.
fn clusters_of(node: &Node) -> (u64, bool) {
    let info = node.driver().info();
    match node.child(ChildIdx::FILE) {
        Some(file) if node.factory().passes_permissions() => clusters_of(&file),
        _ => (info.cluster_size, info.is_dirty),
    }
}
