//! Backing files: which one an image names, and overlays that give up what they hold.

use std::path::PathBuf;
use std::sync::Arc;

use crate::driver::Backing;
use crate::{Backend, ChildIdx, Errno, Error, Node, Result, names, relative_to};

fn of(node: &Node) -> Result<&dyn Backing> {
    node.driver().backing().ok_or_else(|| Error::from_errno(Errno::OPNOTSUPP))
}

impl Backend {
    /// Has the image name another backing file, or none. Everything written before is durable then. What this node
    /// reads its unallocated parts from stays as it is until the image is opened again.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has no backing files; `ENOSPC` where the name does not fit into the image; as the
    /// image reports.
    pub async fn change_backing_file(
        &self,
        filename: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        let (filename, format) = (filename.map(str::to_owned), format.map(str::to_owned));
        let change = move |node: Arc<Node>| async move {
            of(&node)?.change(filename.as_deref(), format.as_deref()).await
        };
        self.graph().run_exclusive(&self.node()?, change).await
    }

    /// Gives up all that the image holds itself: it reads as its backing file does from then on. The backing file holds
    /// the same by now, so that what the image shows does not change, and its dirty bitmaps stay as they are.
    ///
    /// # Errors
    /// `ENOTSUP` where the format cannot; as the image reports.
    pub async fn make_empty(&self) -> Result<()> {
        let make_empty = |node: Arc<Node>| async move { of(&node)?.make_empty().await };
        self.graph().run_exclusive(&self.node()?, make_empty).await
    }
}

impl Node {
    /// The node of the backing chain below this one that `name` means: a name as an image of the chain has it, or the
    /// path of the file, taken from the directory of the image above it where it is relative.
    pub fn find_backing(self: &Arc<Self>, name: &str) -> Option<Arc<Self>> {
        let mut over = Arc::clone(self);
        while let Some(below) = over.child(ChildIdx::BACKING) {
            let named = over.driver().info().backing_filename;
            if named.as_deref() == Some(name) || is_file(&over, &below, name) {
                return Some(below);
            }
            over = below;
        }
        None
    }
}

/// Whether `name`, said of the backing file of `over`, is the file of `below`.
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
