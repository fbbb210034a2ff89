//! The served image: it is created if it does not exist, and then opened.

use super::Result;
use super::options::Options;
use crate::objects;
use oxblk_core::{
    Backend, Error, Graph, Node, OpenFlags, Options as NodeOptions, Perm, Permissions, names,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Size of the default disk, which is created if no image is named, in bytes.
const DEFAULT_SIZE: u64 = 10 << 30;

/// An open image.
pub(super) struct Disk {
    /// Its file name.
    pub(super) name: String,
    pub(super) format: &'static str,
    pub(super) backend: Backend,
    /// The image was created by this process.
    pub(super) is_new: bool,
}

/// Opens the image that the command line names, or the default image.
///
/// # Errors
/// A message that names the image and the reason.
pub(super) async fn open(options: &Options) -> Result<Disk> {
    for definition in &options.objects {
        objects::define(definition)?;
    }
    let graph = Graph::with_secrets(oxblk::drivers(), options.gate(), objects::secrets().clone());
    let flags = OpenFlags { read_only: options.read_only, unmap: true, ..OpenFlags::default() };
    if let (Some(text), true) = (&options.image, options.image_opts) {
        return open_by_options(&graph, text, flags).await;
    }
    let name = match &options.image {
        Some(name) => name.clone(),
        None => default_image()?,
    };
    let size = options.size.or(options.image.is_none().then_some(DEFAULT_SIZE));
    let is_path = !name.starts_with("json:") && !name.contains("://");
    let missing = is_path && !names::to_path(&name).exists();
    let mut format = options.format.clone();
    if missing {
        let size = size.ok_or_else(|| {
            format!("Could not open '{name}': No such file or directory (--size makes it)")
        })?;
        format.get_or_insert_with(|| format_of(&name).to_owned());
        create(&graph, &name, format.as_deref().unwrap_or("qcow2"), size).await?;
    }
    let mut node = NodeOptions::new();
    if let Some(format) = format {
        node.insert("driver", format);
    }
    let opened = graph.open_image(&name, node, flags).await;
    let backend = attach(&graph, &name, opened).await.map_err(|error| told(&error))?;
    disk(name, backend, missing)
}

/// Opens an image that is described by a list of options.
async fn open_by_options(graph: &Graph, text: &str, flags: OpenFlags) -> Result<Disk> {
    let given = NodeOptions::from_dotted(text, Some("file")).map_err(|error| told(&error))?;
    let opened = graph.open(given, flags).await;
    let backend = attach(graph, text, opened).await.map_err(|error| told(&error))?;
    let root = backend.node().map_err(|error| told(&error))?;
    let name = root.filename().unwrap_or_else(|| root.name().to_owned());
    disk(name, backend, false)
}

fn disk(name: String, backend: Backend, is_new: bool) -> Result<Disk> {
    let root = backend.node().map_err(|error| told(&error))?;
    let format = root.factory().name();
    Ok(Disk { name, format, backend, is_new })
}

/// An error with its hint.
fn told(error: &Error) -> String {
    match error.hint() {
        Some(hint) => format!("{error}\n{hint}"),
        None => error.to_string(),
    }
}

/// Attaches a backend to an image. If clients may write, no other user of the image may write.
async fn attach(
    graph: &Graph,
    name: &str,
    opened: oxblk_core::Result<Arc<Node>>,
) -> oxblk_core::Result<Backend> {
    let named = |error: Error| {
        let text = format!("Could not open '{name}'");
        if error.to_string().starts_with(&text) { error } else { error.prefix(text) }
    };
    let node = opened.map_err(named)?;
    let permissions = if node.is_read_only() {
        Permissions::sharing_all(Perm::CONSISTENT_READ)
    } else {
        Permissions {
            taken: Perm::CONSISTENT_READ | Perm::WRITE,
            shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        }
    };
    match Backend::new(graph, "", Arc::clone(&node), permissions) {
        Ok(backend) => Ok(backend),
        Err(error) => {
            let _ = graph.release(node).await;
            Err(named(error))
        }
    }
}

async fn create(graph: &Graph, name: &str, format: &str, size: u64) -> Result<()> {
    let mut options = NodeOptions::new();
    options.insert("size", size);
    let created = graph.create_image(name, format, &options).await;
    created.map_err(|error| format!("Could not create '{name}': {error}"))
}

/// The format of a new image, chosen by its file name.
fn format_of(name: &str) -> &'static str {
    match Path::new(name).extension().and_then(|extension| extension.to_str()) {
        Some("raw" | "img" | "bin" | "iso") => "raw",
        _ => "qcow2",
    }
}

/// The image that is served if none is named. Its directory is created.
fn default_image() -> Result<String> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let data = variable("XDG_DATA_HOME").filter(|path| path.is_absolute());
    let home = || variable("HOME").map(|home| home.join(".local/share"));
    let dir = data.or_else(home).ok_or("No image was named, and $HOME is not set")?.join("oxblk");
    std::fs::create_dir_all(&dir)
        .map_err(|error| format!("Cannot make the directory '{}': {error}", dir.display()))?;
    let path = dir.join("disk.qcow2");
    Ok(names::from_os(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_of_a_new_image_selects_its_format() {
        assert_eq!(format_of("a/disk.raw"), "raw");
        assert_eq!(format_of("disk.img"), "raw");
        assert_eq!(format_of("disk.qcow2"), "qcow2");
        assert_eq!(format_of("disk"), "qcow2");
    }
}
