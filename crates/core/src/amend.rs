//! Changing the options of an image that exists.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::{Backend, Error, Node, Options, Result};

/// What is to be changed, and how.
pub struct AmendRequest {
    /// Options as [`crate::DriverFactory::amend_options`] lists them; what is not mentioned stays as it is.
    pub options: Options,
    /// Allow what may lock the user out.
    pub force: bool,
    /// Hears how many steps of how many are done.
    pub progress: Box<dyn Fn(u64, u64)>,
}

/// Offered by formats whose images can be changed so. Core has drained the node of other requests.
pub trait Amend: Send + Sync {
    /// Changes the image: all at once where the format can, else in steps of which each leaves a whole image. The node
    /// may refuse everything but to be closed afterwards: the image is then to be opened again.
    fn amend(&self, request: AmendRequest) -> BoxFuture<'_, Result<()>>;
}

impl Backend {
    /// Changes options of the image.
    ///
    /// # Errors
    /// `ENOTSUP` where the format has none that can be changed; when an option cannot have its value; as the image
    /// reports.
    pub async fn amend(&self, request: AmendRequest) -> Result<()> {
        let amend = |node: Arc<Node>| async move {
            let Some(amend) = node.driver().amend() else {
                let name = node.factory().name();
                let text = format!("Format driver '{name}' does not support option amendment");
                return Err(Error::unsupported(text));
            };
            let amended = amend.amend(request).await;
            // Also after a failure: it may have come late.
            node.set_size(node.driver().size());
            amended
        };
        self.graph().run_exclusive(&self.node()?, amend).await
    }
}
