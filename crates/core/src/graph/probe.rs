//! Probing: detects the format of an image from its first bytes.

use std::sync::Arc;

use oxblk_ring::IoBufMut;

use super::Graph;
use crate::driver::{DriverFactory, DriverKind};
use crate::{Error, Node, Result, request};

/// Number of bytes that probing reads.
pub(super) const PROBE_BYTES: usize = 2048;
impl Graph {
    /// The format driver with the highest probe score for `head`. `None` if no driver has a score above 0.
    pub fn probe(&self, head: &[u8], filename: Option<&str>) -> Option<&'static dyn DriverFactory> {
        let formats = self.drivers().iter().filter(|driver| driver.kind() == DriverKind::Format);
        let scored = formats.map(|driver| (driver.probe(head, filename), *driver));
        // If scores are equal, the first driver in the table is chosen.
        scored
            .filter(|(score, _)| *score > 0)
            .fold(None, |best: Option<(u32, _)>, (score, driver)| match best {
                Some((top, _)) if top >= score => best,
                _ => Some((score, driver)),
            })
            .map(|(_, driver)| driver)
    }

    pub(super) async fn probe_node(
        &self,
        file: &Arc<Node>,
        filename: Option<&str>,
    ) -> Result<&'static dyn DriverFactory> {
        let len = usize::try_from(file.size()).unwrap_or(usize::MAX).min(PROBE_BYTES);
        let head = request::read_padded(file, 0, IoBufMut::new(len))
            .await
            .map_err(|error| error.prefix("Could not read image for determining its format"))?;
        self.probe(&head, filename).ok_or_else(|| {
            Error::invalid("Could not determine image format: No compatible driver found")
        })
    }

    /// Makes a probed raw image refuse writes that would change its probed format. Otherwise a guest could choose the
    /// format with which its image is opened the next time. The driver of a probed raw image has a request alignment of
    /// 512 bytes, so that a guest cannot assemble a header from smaller writes.
    pub(super) fn guard_probed_raw(&self, node: &Node) {
        let graph = self.clone();
        node.set_write_guard(Box::new(move |offset, data| match graph.probe(data, None) {
            Some(driver) if offset == 0 && driver.name() != "raw" => Err(refused()),
            _ => Ok(()),
        }));
    }
}

fn refused() -> Error {
    Error::new(
        crate::ErrorKind::Denied,
        "Writing a format header into a probed raw image is refused",
    )
    .with_hint("Specify the 'raw' format explicitly to remove the restrictions.")
}
