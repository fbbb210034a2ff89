//! [`FrozenChain`]: a part of a backing chain that must stay as it is while a job uses it.

use std::sync::{Arc, PoisonError};

use crate::{Edge, Error, Graph, Node, Result};

/// The links of a backing chain that no change may replace while this value exists. A link may be frozen several times.
#[derive(Debug)]
pub struct FrozenChain {
    links: Vec<Arc<Edge>>,
}

impl Graph {
    /// Freezes the links from `top` down to `base`, through backing files and filters. Without `base`, freezes all links below
    /// `top`.
    ///
    /// # Errors
    /// When `base` is not below `top`.
    pub fn freeze(&self, top: &Arc<Node>, base: Option<&Arc<Node>>) -> Result<FrozenChain> {
        let _changing = top.change_lock().lock().unwrap_or_else(PoisonError::into_inner);
        let mut links = Vec::new();
        let mut above = Arc::clone(top);
        while base.is_none_or(|base| !Arc::ptr_eq(base, &above)) {
            match (above.filter_or_cow_child(), base) {
                (Some(link), _) => {
                    above = Arc::clone(link.node());
                    links.push(link);
                }
                (None, None) => break,
                (None, Some(base)) => {
                    let (base, top) = (base.name(), top.name());
                    return Err(Error::invalid(format!("'{base}' is not in the chain of '{top}'")));
                }
            }
        }
        for link in &links {
            link.freeze();
        }
        Ok(FrozenChain { links })
    }
}

impl Drop for FrozenChain {
    fn drop(&mut self) {
        for link in &self.links {
            link.thaw();
        }
    }
}
