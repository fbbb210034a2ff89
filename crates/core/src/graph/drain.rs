//! Draining: no request in flight in a part of the graph, and none that starts.

use std::sync::Arc;

use super::Graph;
use crate::{Backend, Node, backend::Quiesced};

/// The backends above a node are quiesced while this lives.
#[derive(Debug)]
pub struct Drained {
    _quiesced: Vec<Quiesced>,
}

impl Graph {
    /// Holds back the requests of every backend that can reach `node` and waits for those in flight.
    pub async fn drain(&self, node: &Arc<Node>) -> Drained {
        let mut quiesced = Vec::new();
        for backend in self.backends() {
            if reaches(&backend, node) {
                quiesced.push(backend.quiesce().await);
            }
        }
        Drained { _quiesced: quiesced }
    }
}

fn reaches(backend: &Backend, node: &Arc<Node>) -> bool {
    backend.node().is_ok_and(|root| is_below(&root, node))
}

/// Whether `node` is `top` or can be reached from it.
pub(super) fn is_below(top: &Arc<Node>, node: &Arc<Node>) -> bool {
    Arc::ptr_eq(top, node) || top.children().iter().any(|(_, edge)| is_below(edge.node(), node))
}
