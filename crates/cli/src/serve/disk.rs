//! The served image: creating the image if it does not exist, and opening the image.

use super::Result;
use super::options::Options;
use crate::objects;
use oxblk::{Disk as OpenDisk, OpenOptions, Sharing};
use oxblk_core::{Backend, Error, Graph, Options as NodeOptions, names};
use std::path::{Path, PathBuf};

/// Size in bytes of the default image. This image is created if the command line has no image and the default image does not
/// exist.
const DEFAULT_SIZE: u64 = 10 << 30;

/// An open image.
pub(super) struct Disk {
    /// The file name or, if the image has no file name, the node-name.
    pub(super) name: String,
    pub(super) format: &'static str,
    pub(super) backend: Backend,
    /// The image was created by this process.
    pub(super) is_new: bool,
}

/// Opens the image of the command line, or the default image.
///
/// # Errors
/// A message with the reason. If an image cannot be opened or created, the message also contains the name of the image.
pub(super) async fn open(options: &Options) -> Result<Disk> {
    for definition in &options.objects {
        objects::define(definition)?;
    }
    let graph = Graph::with_objects(oxblk::drivers(), options.gate(), objects::all().clone());
    // If clients may write, no other user of the image may write.
    let opening = OpenDisk::options()
        .graph(graph.clone())
        .read_only(options.read_only)
        .resizable(false)
        .sharing(Sharing::OneWriter);
    if let (Some(text), true) = (&options.image, options.image_opts) {
        return open_by_options(opening, text).await;
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
    let opening = match format {
        Some(format) => opening.option("driver", format),
        None => opening,
    };
    let opened = opening.open_backend(Some(&name)).await;
    let backend = opened.map_err(|error| message(&named(error, &name)))?;
    disk(name, backend, missing)
}

/// Opens an image that a list of options describes.
async fn open_by_options(opening: OpenOptions, text: &str) -> Result<Disk> {
    let given = NodeOptions::from_dotted(text, Some("file")).map_err(|error| message(&error))?;
    let opened = opening.options(&given).open_backend(None).await;
    let backend = opened.map_err(|error| message(&named(error, text)))?;
    let root = backend.node().map_err(|error| message(&error))?;
    let name = root.filename().unwrap_or_else(|| root.name().to_owned());
    disk(name, backend, false)
}

fn disk(name: String, backend: Backend, is_new: bool) -> Result<Disk> {
    let root = backend.node().map_err(|error| message(&error))?;
    let format = root.factory().name();
    Ok(Disk { name, format, backend, is_new })
}

/// An error with its hint.
fn message(error: &Error) -> String {
    match error.hint() {
        Some(hint) => format!("{error}\n{hint}"),
        None => error.to_string(),
    }
}

/// The name of the image, followed by the error.
fn named(error: Error, name: &str) -> Error {
    let text = format!("Could not open '{name}'");
    if error.to_string().starts_with(&text) { error } else { error.prefix(text) }
}

async fn create(graph: &Graph, name: &str, format: &str, size: u64) -> Result<()> {
    let mut options = NodeOptions::new();
    options.insert("size", size);
    let created = graph.create_image(name, format, &options).await;
    created.map(drop).map_err(|error| format!("Could not create '{name}': {error}"))
}

/// The format of a new image, chosen by its file name.
fn format_of(name: &str) -> &'static str {
    match Path::new(name).extension().and_then(|extension| extension.to_str()) {
        Some("raw" | "img" | "bin" | "iso") => "raw",
        _ => "qcow2",
    }
}

/// The name of the image that is served if the command line has no image. Creates the directory of this image.
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
