//! Creating images by file name and format, as `img create` and `convert` do.

use std::sync::Arc;

use serde_json::Value;

use super::Graph;
use crate::create::{CreateOption, CreateRequest, CreateTarget};
use crate::driver::{DriverFactory, DriverKind};
use crate::perm::{Perm, Permissions};
use crate::{ChildIdx, Edge, Error, OpenFlags, Options, Result};

impl Graph {
    /// Creates the image `filename` of `format`. Options that the format does not know are passed to the protocol.
    ///
    /// # Errors
    /// When an option is unknown to both; otherwise the errors of the drivers.
    pub async fn create_image(
        &self,
        filename: &str,
        format: &str,
        options: &Options,
    ) -> Result<()> {
        let driver = self.driver(format)?;
        let (protocol, _) = self.protocol_for(filename)?;
        let (own, below) = split_options(driver, protocol, options)?;
        if driver.kind() == DriverKind::Protocol {
            let request =
                CreateRequest { target: CreateTarget::Filename(filename.to_owned()), options: own };
            return run(driver, self, request).await;
        }
        driver.check_create(self, &own)?;
        let request =
            CreateRequest { target: CreateTarget::Filename(filename.to_owned()), options: below };
        run(protocol, self, request).await?;
        let node = self
            .open_protocol(
                filename,
                Options::new(),
                OpenFlags { unmap: true, ..OpenFlags::default() },
            )
            .await?;
        // A format without metadata in the file only sets the size, so other users may write meanwhile.
        let alone =
            if driver.passes_permissions() { Perm::RESIZE } else { Perm::WRITE | Perm::RESIZE };
        let permissions = Permissions {
            taken: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            shared: Perm::all() - alone,
        };
        let user = format!("creation of '{filename}'");
        let created =
            match Edge::attach(Arc::clone(&node), user, ChildIdx::FILE.name(), permissions) {
                Ok(edge) => {
                    let target = CreateTarget::File(Arc::clone(&edge));
                    let created = run(driver, self, CreateRequest { target, options: own }).await;
                    edge.detach();
                    created
                }
                Err(error) => Err(error),
            };
        let created = created.and(self.release(node).await);
        // A partly created image of a format is useless and is removed. A partly created raw image is a usable file.
        if created.is_err() && !driver.passes_permissions() {
            protocol.remove_created(filename);
        }
        created
    }
}

async fn run(driver: &dyn DriverFactory, graph: &Graph, request: CreateRequest) -> Result<()> {
    match driver.create(graph, request) {
        Some(created) => created.await,
        None => {
            let what = if driver.kind() == DriverKind::Protocol { "Protocol" } else { "Format" };
            Err(Error::unsupported(format!(
                "{what} driver '{}' does not support image creation",
                driver.name()
            )))
        }
    }
}

/// Splits the options between format and protocol. `size` goes to the format; the protocol creates an empty file.
fn split_options(
    driver: &dyn DriverFactory,
    protocol: &dyn DriverFactory,
    options: &Options,
) -> Result<(Options, Options)> {
    // Options with dotted names may be nested (`encrypt.format`). Then their first component is compared.
    let knows = |list: &[CreateOption], key: &str| {
        let nested = options.get(key).is_some_and(Value::is_object);
        let first = |name: &'static str| name.split('.').next().unwrap_or_default();
        list.iter().any(|option| option.name == key || nested && first(option.name) == key)
    };
    let (mut own, mut below) = (Options::new(), Options::new());
    for (key, value) in options.iter() {
        if knows(driver.create_options(), key) {
            own.insert(key, value.clone());
        } else if driver.kind() != DriverKind::Protocol && knows(protocol.create_options(), key) {
            // The protocol creates an empty file, and the format resizes it. Both need the preallocation mode: the
            // protocol refuses a mode that it does not support, and the format uses the mode for the resize.
            if key == "preallocation" {
                own.insert(key, value.clone());
            }
            below.insert(key, value.clone());
        } else {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
    }
    below.insert("size", 0_u64);
    Ok((own, below))
}
