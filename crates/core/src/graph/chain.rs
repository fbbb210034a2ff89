//! Opening a chain of backing files: from the top down, since each image names the next; nodes are made from the bottom up.
//!
//! The images that wait for what is below them are a list. What one of them takes does not depend on how many there are.

use std::sync::Arc;

use super::Graph;
use super::open::{OpenContext, OpenFlags, Target, close_unused};
use crate::bitmap::DirtyBitmap;
use crate::driver::{Driver, DriverFactory};
use crate::node::{NodeParts, Settings};
use crate::perm::{Permissions, Role};
use crate::{ChildIdx, DetectZeroes, Edge, Error, Node, Options, Perm, Result};

/// Longest backing chain: more is a loop, or meant to exhaust memory and descriptors.
const MAX_DEPTH: u32 = 5000;
/// Most nodes that are each other's `file` child: each is a call within a call.
const MAX_NESTING: u32 = 32;
/// How often an error says that it is about a backing file.
const MAX_PREFIXES: usize = 4;

const BACKING: &str = "Could not open backing file";

/// What is below an image.
pub(super) enum Below {
    Nothing,
    Node(Arc<Node>),
    Target(Target),
}

/// An image whose driver is open, while what is below it need not be.
pub(super) struct Layer {
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
    /// Opens an image and what is below it.
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

    /// Opens the images from `target` down into `layers`. Gives the node below the last of them, where that was open
    /// before.
    async fn open_layers(
        &self,
        target: Target,
        layers: &mut Vec<Layer>,
    ) -> Result<Option<Arc<Node>>> {
        let mut next = target;
        loop {
            let named = Named { path: next.filename.clone(), above: next.named_above };
            let opened = match check(&next, layers) {
                Ok(()) => self.open_layer(next).await,
                Err(error) => Err(error),
            };
            let (layer, below) = opened.map_err(|error| match layers.is_empty() {
                // The name of the image that was asked for is the caller's to add.
                true => error,
                false => Context::default().about(error, named),
            })?;
            layers.push(layer);
            next = match below {
                Below::Nothing => return Ok(None),
                Below::Node(node) => return Ok(Some(node)),
                Below::Target(target) => target,
            };
        }
    }

    /// Closes images above one that failed. Gives its error as the topmost image has it.
    async fn close_layers(&self, mut layers: Vec<Layer>, mut error: Error) -> Error {
        // The failure itself has been said to be about a backing file once.
        let mut context = Context { prefixes: 1 };
        while let Some(layer) = layers.pop() {
            if !layers.is_empty() {
                error = context.about(error, Named::of(&layer));
            }
            self.close_layer(layer).await;
        }
        error
    }

    /// Makes a node of an image above `backing`.
    async fn finish_layer(&self, layer: Layer, backing: Option<Arc<Node>>) -> Result<Arc<Node>> {
        let attached = match &backing {
            Some(backing) => attach_backing(layer.driver, backing, &layer.context),
            None => Ok(()),
        };
        // The last thing that can fail: it may write to the image.
        let loaded = match attached {
            Ok(()) => load_bitmaps(&*layer.opened, &layer.context.flags).await,
            Err(error) => Err(error),
        };
        let bitmaps = match loaded {
            Ok(bitmaps) => bitmaps,
            Err(error) => {
                self.close_layer(layer).await;
                if let Some(backing) = backing {
                    self.release_after_failure(backing).await;
                }
                return Err(error);
            }
        };
        let context = layer.context;
        let probed_raw = context.flags.probed && layer.driver.name() == "raw";
        let node = self.insert(NodeParts {
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
        });
        node.adopt_bitmaps(bitmaps)?;
        if probed_raw {
            self.guard_probed_raw(&node);
        }
        Ok(node)
    }

    /// Closes an image that does not become a node.
    async fn close_layer(&self, layer: Layer) {
        close_unused(&*layer.opened).await;
        self.release_children(&layer.context.children, layer.file).await;
    }
}

/// Refuses what would not end. An image that names itself, or one above it, is a loop.
fn check(target: &Target, layers: &[Layer]) -> Result<()> {
    let is_above = |name: &String| layers.iter().any(|layer| layer.filename.as_ref() == Some(name));
    let loops = target.named_above && target.filename.as_ref().is_some_and(is_above);
    if loops || target.depth > MAX_DEPTH || target.nesting > MAX_NESTING {
        return Err(Error::invalid("The backing chain is too long, or a loop"));
    }
    Ok(())
}

/// How an image of the chain came to be opened.
struct Named {
    path: Option<String>,
    above: bool,
}

impl Named {
    fn of(layer: &Layer) -> Self {
        Self { path: layer.filename.clone(), above: layer.named_above }
    }
}

/// What has been put before an error.
#[derive(Default)]
struct Context {
    prefixes: usize,
}

impl Context {
    /// Says which image of the chain an error is about. Far down, once more would tell nothing.
    fn about(&mut self, error: Error, named: Named) -> Error {
        let error = match named.path {
            Some(path) => error.on_path(&path),
            None => error,
        };
        if !named.above || self.prefixes >= MAX_PREFIXES {
            return error;
        }
        self.prefixes += 1;
        error.prefix(BACKING)
    }
}

/// Puts the backing file into its slot.
fn attach_backing(
    driver: &dyn DriverFactory,
    backing: &Arc<Node>,
    context: &OpenContext,
) -> Result<()> {
    let parents = Permissions::sharing_all(Perm::CONSISTENT_READ);
    let permissions = Permissions::for_child(driver.kind(), Role::Backing, parents, false);
    let user = format!("node '{}'", context.node_name);
    let edge = Edge::attach(Arc::clone(backing), user, ChildIdx::BACKING.name(), permissions)?;
    context.children.set(ChildIdx::BACKING, Some(edge));
    Ok(())
}

/// The bitmaps that the image holds; a check looks at them on disk.
async fn load_bitmaps(driver: &dyn Driver, flags: &OpenFlags) -> Result<Vec<Arc<DirtyBitmap>>> {
    match driver.persistent_bitmaps() {
        Some(persistent) if !flags.check => persistent.load().await,
        _ => Ok(Vec::new()),
    }
}
