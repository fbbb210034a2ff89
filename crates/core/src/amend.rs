//! The amend operation: changes the options of an existing image.

use std::sync::Arc;

use crate::driver::BoxFuture;
use crate::{Backend, Error, Node, Options, Result};

/// A request to change options of an image.
pub struct AmendRequest {
    /// The new values of options from the list [`crate::DriverFactory::amend_options`]. An option that is missing here
    /// stays unchanged.
    pub options: Options,
    /// Allows changes after which the user may be unable to open the image.
    pub force: bool,
    /// Receives the number of completed steps and the total number of steps.
    pub progress: Box<dyn Fn(u64, u64)>,
}

/// The interface of formats whose options can be changed. [`Backend::amend`] drains the node before each call.
pub trait Amend: Send + Sync {
    /// Changes the image atomically if the format can do so, otherwise in steps that each leave a valid image. After
    /// this call, the node may refuse all requests until the image is opened again.
    fn amend(&self, request: AmendRequest) -> BoxFuture<'_, Result<()>>;
}

impl Backend {
    /// Changes options of the image.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`](crate::ErrorKind::Denied) without write permission; `ENOTSUP` if the format has no options that
    /// can be changed; an error of the driver if a value is not valid for its option; `ENOMEDIUM` if the backend is closed;
    /// the errors of the image's driver.
    pub async fn amend(&self, request: AmendRequest) -> Result<()> {
        let amend = |node: Arc<Node>| async move {
            let Some(amend) = node.driver().amend() else {
                let name = node.factory().name();
                let text = format!("Format driver '{name}' does not support option amendment");
                return Err(Error::unsupported(text));
            };
            let amended = amend.amend(request).await;
            // Update the size after a failure too: the driver may have changed the size before it failed.
            node.set_size(node.driver().size());
            amended
        };
        self.graph().run_exclusive(&self.node()?, self.while_writer(amend)).await
    }
}
