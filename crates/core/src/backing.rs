//! Backing files: changing the name that an image stores, emptying an overlay, and finding a node in a backing chain.

use std::path::PathBuf;
use std::sync::Arc;

use crate::driver::Backing;
use crate::keeper::keeper;
use crate::{Backend, ChildIdx, Errno, Error, Node, Operations, Result, names, relative_to};

fn of(node: &Node) -> Result<&dyn Backing> {
    node.driver().backing().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

impl Backend {
    /// Changes the backing file name and the backing format that the image stores. The image may be below filters. A
    /// `filename` of `None` removes the reference to the backing file. After this call, the change and all earlier writes
    /// are on stable storage. The node continues to read unallocated ranges from the backing file that is open, until the
    /// image is opened again.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) without write permission; `ENOTSUP` if the format has no backing
    /// files; `EINVAL` if the name is longer than the format allows; `ENOSPC` if the name does not fit into the image; the
    /// errors of the image's driver.
    pub async fn change_backing_file(
        &self,
        filename: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        let (filename, format) = (filename.map(str::to_owned), format.map(str::to_owned));
        let change = move |node: Arc<Node>| async move {
            of(&node)?.change(filename.as_deref(), format.as_deref()).await
        };
        let (image, above) = keeper(self.node()?, |driver| driver.backing().is_some())?;
        self.graph()
            .run_exclusive_below(
                above,
                &image,
                self.while_writer(self.unless_blocked(Operations::BACKING, change)),
            )
            .await
    }

    /// Discards all guest data that the image itself stores. After this call, reads return the data of the backing
    /// file. The caller guarantees that the backing file already has the same contents. Therefore the visible contents
    /// and the dirty bitmaps do not change.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) without write permission; `ENOTSUP` if the format cannot do this;
    /// the errors of the image's driver.
    pub async fn make_empty(&self) -> Result<()> {
        let make_empty = |node: Arc<Node>| async move { of(&node)?.make_empty().await };
        self.graph()
            .run_exclusive(
                &self.node()?,
                self.while_writer(self.unless_blocked(Operations::BACKING, make_empty)),
            )
            .await
    }
}

impl Node {
    /// Finds a node by `name` in the backing chain below this node. The node is no filter. `name` is either the backing file
    /// name that an image of the chain stores, or the path of the backing file. A relative path is relative to the directory
    /// of the image that uses the backing file.
    pub fn find_backing(self: &Arc<Self>, name: &str) -> Option<Arc<Self>> {
        let mut over = self.skip_filters();
        while let Some(below) = over.child(ChildIdx::BACKING).map(|below| below.skip_filters()) {
            let named = over.driver().info().backing_filename;
            if named.as_deref() == Some(name) || is_file(&over, &below, name) {
                return Some(below);
            }
            over = below;
        }
        None
    }
}

/// Whether `name`, as the backing file name of `over`, refers to the file of `below`.
fn is_file(over: &Node, below: &Node, name: &str) -> bool {
    let Some(file) = below.filename() else { return false };
    let meant = over.filename().map_or_else(|| name.to_owned(), |base| relative_to(&base, name));
    match (real_path(&meant), real_path(&file)) {
        (Some(meant), Some(file)) => meant == file,
        _ => meant == file,
    }
}

fn real_path(name: &str) -> Option<PathBuf> {
    names::to_path(name.strip_prefix("file:").unwrap_or(name)).canonicalize().ok()
}
