//! Opens a backing chain. Images are opened from the top down, because an image contains the name of its backing file.
//! Nodes are made from the bottom up.
//!
//! The opened images that wait for their backing file are kept in a list. So the stack depth does not grow with the
//! length of the chain.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use super::open::{OpenContext, OpenFlags, Target, close_unused};
use super::{ClaimedName, Graph};
use crate::bitmap::DirtyBitmap;
use crate::change::Change;
use crate::driver::{Driver, DriverFactory};
use crate::node::{NodeParts, Settings};
use crate::perm::{NodeAccess, Permissions, Roles};
use crate::{ChildIdx, ChildSpec, DetectZeroes, Error, ErrorKind, Node, Options, Perm, Result};

/// Maximum number of backing files in a chain. A longer chain is probably a loop, or an attack on memory and file
/// descriptors.
const MAX_DEPTH: u32 = 5000;
/// Maximum nesting of nodes through their `file` children. Each level is a nested call.
const MAX_NESTING: u32 = 32;
/// Maximum number of prefixes "Could not open backing file" in one error.
const MAX_PREFIXES: usize = 4;

/// Prefix of an error in a backing file.
pub(super) const BACKING: &str = "Could not open backing file";

/// The backing file of an image: none, an open node, or an image to open.
pub(super) enum Below {
    Nothing,
    Node(Arc<Node>),
    Target(Target),
}

/// An image whose driver is open. Its backing file is possibly not open yet.
pub(super) struct Layer {
    pub(super) name: ClaimedName,
    pub(super) driver: &'static dyn DriverFactory,
    pub(super) opened: Box<dyn Driver>,
    pub(super) context: OpenContext,
    pub(super) detect_zeroes: DetectZeroes,
    pub(super) given: Options,
    pub(super) opened_with: Options,
    pub(super) file: Option<Arc<Node>>,
    pub(super) filename: Option<String>,
    pub(super) named_above: bool,
}

impl Graph {
    /// Opens an image and its backing chain.
    pub(super) async fn open_chain(&self, target: Target) -> Result<Arc<Node>> {
        let mut layers = Vec::new();
        let mut backing = match self.open_layers(target, &mut layers).await {
            Ok(bottom) => bottom,
            Err(error) => return Err(self.close_layers(layers, error).await),
        };
        while let Some(layer) = layers.pop() {
            let named = Named::of(&layer);
            match self.finish_layer(layer, backing).await {
                Ok(node) if layers.is_empty() => return Ok(node),
                Ok(node) => {
                    node.follow_parent();
                    backing = Some(node);
                }
                Err(error) if layers.is_empty() => return Err(error),
                Err(error) => {
                    let error = Context::default().about(error, named);
                    return Err(self.close_layers(layers, error).await);
                }
            }
        }
        Err(Error::invalid("There is nothing to open"))
    }

    /// Opens the images from `target` down and appends them to `layers`. Returns the node below the last image, if that
    /// node was open before.
    async fn open_layers(
        &self,
        target: Target,
        layers: &mut Vec<Layer>,
    ) -> Result<Option<Arc<Node>>> {
        let mut next = target;
        let mut above = Above::default();
        loop {
            let named = Named { path: next.filename.clone(), above: next.named_above };
            let opened = match above.check(&next) {
                Ok(()) => self.open_layer(next).await,
                Err(error) => Err(error),
            };
            let (layer, below) = opened.map_err(|error| match layers.is_empty() {
                // The first image of the chain: the caller adds its name to the error.
                true => error,
                false => Context::default().about(error, named),
            })?;
            // If options describe an image, the file name of the image is known only after the image is open.
            let is_above = layer.named_above && above.has(&layer);
            above.push(&layer);
            layers.push(layer);
            if is_above {
                return Err(endless(
                    &layers.last().and_then(|layer| layer.context.image_filename()),
                ));
            }
            next = match below {
                Below::Nothing => return Ok(None),
                Below::Node(node) => return Ok(Some(node)),
                Below::Target(target) => target,
            };
        }
    }

    /// Closes the images above an image that failed to open. Adds the prefix [`BACKING`] to the error for each closed
    /// image that was itself opened as a backing file, up to [`MAX_PREFIXES`] prefixes in total.
    async fn close_layers(&self, mut layers: Vec<Layer>, mut error: Error) -> Error {
        // The caller has already added the first prefix.
        let mut context = Context { prefixes: 1 };
        while let Some(layer) = layers.pop() {
            if !layers.is_empty() {
                error = context.about(error, Named::of(&layer));
            }
            close_layer(layer).await;
        }
        error
    }

    /// Makes a node of an image with the backing file `backing`.
    async fn finish_layer(&self, layer: Layer, backing: Option<Arc<Node>>) -> Result<Arc<Node>> {
        let attached = match &backing {
            Some(backing) => attach_backing(backing, &layer.context),
            None => Ok(()),
        };
        // Bitmaps are loaded in the last step that can fail, because loading may write to the image.
        let loaded = match attached {
            Ok(()) => load_bitmaps(&*layer.opened, &layer.context.flags).await,
            Err(error) => Err(error),
        };
        let bitmaps = match loaded {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                let opening = Arc::clone(&layer.context.opening);
                close_layer(layer).await;
                if let Some(backing) = backing {
                    opening.release_later(backing);
                }
                return Err(error);
            }
        };
        let context = layer.context;
        let probed_raw = context.flags.probed && layer.driver.name() == "raw";
        let parts = NodeParts {
            name: context.node_name,
            factory: layer.driver,
            driver: layer.opened,
            children: context.children,
            epochs: context.epochs,
            settings: Settings {
                flags: context.flags,
                detect_zeroes: layer.detect_zeroes,
                options: layer.opened_with,
                given: layer.given,
            },
            filename: context.filename,
            change_lock: Arc::clone(self.change_lock()),
            events: self.events().clone(),
        };
        let node = self.insert(layer.name, parts);
        context.opening.has_opened(&node);
        node.adopt_bitmaps(&bitmaps)?;
        if node.children().has(ChildIdx::DATA) {
            // The driver needed more permissions on the data file while it opened the image.
            let mut change = Change::of(&node);
            change.refresh(&node);
            change.release();
        }
        if probed_raw {
            self.guard_probed_raw(&node);
        }
        Ok(node)
    }
}

/// Closes an image that does not become a node.
async fn close_layer(layer: Layer) {
    close_unused(&*layer.opened).await;
    layer.context.opening.release_children(&layer.context.children, layer.file);
}

/// The files of the images above the image that is being opened.
#[derive(Default)]
struct Above(HashSet<PathBuf>);

impl Above {
    fn has(&self, layer: &Layer) -> bool {
        let path = layer.context.image_filename().as_deref().and_then(real_path);
        path.is_some_and(|path| self.0.contains(&path))
    }

    fn push(&mut self, layer: &Layer) {
        self.0.extend(layer.context.image_filename().as_deref().and_then(real_path));
    }

    /// Refuses an endless chain: a chain that exceeds the limits, or a backing file that is one of the images above it.
    /// An image above is also found if the backing file is given by another path or through symbolic links, but not
    /// through hard links.
    fn check(&self, target: &Target) -> Result<()> {
        let refused = |message: String| Err(Error::new(ErrorKind::BackingChain, message));
        if target.depth > MAX_DEPTH || target.nesting > MAX_NESTING {
            return refused("The backing chain is too long".to_owned());
        }
        match target.filename.as_deref().filter(|_| target.named_above) {
            Some(name) if real_path(name).is_some_and(|path| self.0.contains(&path)) => {
                Err(endless(&Some(name.to_owned())))
            }
            _ => Ok(()),
        }
    }
}

fn endless(name: &Option<String>) -> Error {
    let name = name.as_deref().unwrap_or_default();
    let message = format!("{BACKING}: Backing file '{name}' creates an infinite loop.");
    Error::new(ErrorKind::BackingChain, message)
}

/// The canonical path of an existing file.
fn real_path(filename: &str) -> Option<PathBuf> {
    crate::names::to_path(filename.strip_prefix("file:").unwrap_or(filename)).canonicalize().ok()
}

/// The file name by which an image of the chain was opened, and whether the image was opened as a backing file.
struct Named {
    path: Option<String>,
    above: bool,
}

impl Named {
    fn of(layer: &Layer) -> Self {
        Self { path: layer.filename.clone(), above: layer.named_above }
    }
}

/// Counts the prefixes that were added to an error.
#[derive(Default)]
struct Context {
    prefixes: usize,
}

impl Context {
    /// Records in an error which image of the chain the error concerns. At most [`MAX_PREFIXES`] prefixes are added.
    fn about(&mut self, error: Error, named: Named) -> Error {
        let error = match named.path {
            Some(path) => error.on_path(&path),
            None => error,
        };
        // The error for an endless chain already has the prefix, and gets no prefix for the images above.
        let said = error.kind() == ErrorKind::BackingChain;
        if said || !named.above || self.prefixes >= MAX_PREFIXES {
            return error;
        }
        self.prefixes += 1;
        error.prefix(BACKING)
    }
}

/// Attaches the backing file to its slot.
fn attach_backing(backing: &Arc<Node>, context: &OpenContext) -> Result<()> {
    let parents = Permissions::sharing_all(Perm::CONSISTENT_READ);
    let access = NodeAccess { writable: false, no_io: false };
    let permissions = Permissions::for_child(Roles::COW, parents, access);
    context.children.attach(&context.node_name, ChildSpec::BACKING, backing, permissions)
}

/// Loads the bitmaps that the image stores. A check reads the bitmaps itself, so no bitmaps are loaded for a check.
async fn load_bitmaps(driver: &dyn Driver, flags: &OpenFlags) -> Result<Vec<Arc<DirtyBitmap>>> {
    match driver.persistent_bitmaps() {
        Some(persistent) if !flags.check => persistent.load().await,
        _ => Ok(Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(name: &str, depth: u32) -> Target {
        let filename = Some(name.to_owned());
        Target { filename, named_above: true, depth, ..Target::default() }
    }

    #[test]
    fn an_image_above_is_found_by_another_path_and_through_symbolic_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("a"), "").unwrap();
        std::fs::write(path("b"), "").unwrap();
        std::os::unix::fs::symlink("a", path("link")).unwrap();
        let above = Above(real_path(&path("a")).into_iter().collect());
        for name in [path("a"), path("./a"), path("link"), format!("file:{}", path("a"))] {
            assert!(above.check(&backing(&name, 1)).is_err(), "{name}");
        }
        for name in [path("b"), path("absent"), "nbd://h/".to_owned()] {
            assert!(above.check(&backing(&name, 1)).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_chain_longer_than_the_limit_is_refused() {
        assert!(Above::default().check(&backing("a", MAX_DEPTH)).is_ok());
        assert!(Above::default().check(&backing("a", MAX_DEPTH + 1)).is_err());
    }
}
