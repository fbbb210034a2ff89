//! Opens nodes from options or a file name.
//!
//! The steps: generic options → driver (given by an option, or probed) → `file` child → the driver's own open → refusal
//! of unknown options → backing file → node. After a failure, all nodes that were opened are closed again.
//!
//! Images of a backing chain are opened from the top down and become nodes from the bottom up ([`super::chain`]). So
//! opening a long chain needs no nested calls.

use std::sync::Arc;

use serde_json::Value;

use super::chain::{Below, Layer};
use super::generic::{Generic, take_generic};
use super::opening::Opening;
use super::{Graph, Opened};
use crate::backend::no_medium;
use crate::control::run_to_completion;
use crate::driver::{BoxFuture, Driver, DriverFactory};
use crate::epoch::Epochs;
use crate::perm::{NodeAccess, Permissions};
use crate::{
    Backend, ChildIdx, ChildSpec, Children, Edge, Errno, Error, ErrorKind, MAX_LENGTH, Node,
    Options, Perm, Result,
};

/// The error for options that give a child both a node-name and further options.
pub(super) const PLAIN_AND_NESTED: &str =
    "Cannot reference an existing block device with additional options or a new filename";

const NO_FILE: &str = "A block device must be specified for \"file\"";

/// The flags with which a node is opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches, named as the options are")]
pub struct OpenFlags {
    /// Refuse writes.
    pub read_only: bool,
    /// Make the node read-only if writing is not possible.
    pub auto_read_only: bool,
    /// Bypass the host's page cache (`cache.direct`).
    pub direct: bool,
    /// Ignore flushes (`cache.no-flush`).
    pub no_flush: bool,
    /// The I/O method of files whose options do not choose one.
    pub aio: Option<oxblk_ring::Aio>,
    /// Pass discards to the host (`discard=unmap`).
    pub unmap: bool,
    /// Allow other processes everything (`force-share`). The file locks protect only the reads of the node.
    pub force_share: bool,
    /// Do not open the backing file of the image.
    pub no_backing: bool,
    /// Open for a check: tolerate faults that a check would report.
    pub check: bool,
    /// The format was probed; no option specified it.
    pub probed: bool,
    /// Copy-on-read: reads store data of the backing file in the image. The flag applies to this node only, not to the
    /// nodes below.
    pub copy_on_read: bool,
    /// Only metadata is used, no guest data (`info`). Drivers do not open a data file or ask for a key that is needed
    /// only for guest data.
    pub no_io: bool,
    /// Fail if the path of the file contains a symbolic link. The flag is set after a [`Gate`](crate::Gate) has checked
    /// the path.
    pub no_symlinks: bool,
}

/// The reference to the backing file that an image contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingFile {
    /// The name as stored in the image.
    pub filename: String,
    /// The format as stored in the image.
    pub format: Option<String>,
}

/// The input of a driver that opens a node.
pub struct OpenContext {
    /// The graph.
    pub graph: Graph,
    /// The node-name that the node will have.
    pub node_name: String,
    /// The options that are not generic. The driver removes its own options.
    pub options: Options,
    /// The open flags.
    pub flags: OpenFlags,
    /// The children. For formats and filters, `file` is set already.
    pub children: Arc<Children>,
    /// The file name by which the image was opened, if there is one.
    pub filename: Option<String>,
    /// The image's reference to its backing file. The driver sets this field.
    pub backing: Option<BackingFile>,
    /// The epochs in which the node's requests are counted.
    pub epochs: Arc<Epochs>,
    /// Nesting depth of the node; see [`Target::nesting`].
    pub(super) nesting: u32,
    /// The open to which this node belongs.
    pub(super) opening: Arc<Opening>,
}

impl OpenContext {
    /// The file name of the image. Relative names in the image are relative to the directory of this file.
    pub(super) fn image_filename(&self) -> Option<String> {
        self.filename.clone().or_else(|| self.file().ok()?.node().filename())
    }

    /// The edge to the primary child.
    ///
    /// # Errors
    /// `ENOMEDIUM` if there is no primary child.
    pub fn file(&self) -> Result<Arc<Edge>> {
        self.children.require(ChildIdx::FILE)
    }

    /// Called by a driver that cannot write: makes the node read-only if `auto-read-only` allows this.
    ///
    /// # Errors
    /// `EACCES` with `reason` if the node is not read-only and `auto-read-only` is off.
    pub fn fall_back_to_read_only(&mut self, reason: &str) -> Result<()> {
        if self.flags.read_only {
            return Ok(());
        }
        if !self.flags.auto_read_only {
            return Err(Error::new(ErrorKind::Denied, reason.to_owned()).errno(Errno::ACCES));
        }
        self.flags.read_only = true;
        Ok(())
    }
}

/// A description of the node to open.
#[derive(Clone, Default)]
pub(super) struct Target {
    pub(super) filename: Option<String>,
    pub(super) options: Options,
    pub(super) flags: OpenFlags,
    /// Open only the node of the protocol: the file is not probed for a format.
    pub(super) protocol: bool,
    /// The image is opened as a backing file, by a name or by `file` options.
    pub(super) named_above: bool,
    /// Number of images above this image.
    pub(super) depth: u32,
    /// Nesting depth: the number of nodes above this node that are connected to it by `file` edges.
    pub(super) nesting: u32,
    /// The open to which the node belongs.
    pub(super) opening: Arc<Opening>,
}

impl Graph {
    /// Opens a node from options, as `blockdev-add` does. If the returned future is dropped, nothing stays open.
    ///
    /// # Errors
    /// When an option is invalid, when no format is found for a probed file, or when the permissions conflict with
    /// those of another user; otherwise the errors of the driver. After an error, nothing stays open.
    pub async fn open(&self, options: Options, flags: OpenFlags) -> Result<Arc<Node>> {
        self.open_target(Target { options, flags, ..Target::default() }).await
    }

    /// Opens an image by its file name (a path, a URL, `json:{…}`). Without a `driver` option, the format is probed.
    ///
    /// # Errors
    /// The errors of [`Self::open`], with the file name as the path of the error. After an error, nothing stays open.
    pub async fn open_image(
        &self,
        name: &str,
        options: Options,
        flags: OpenFlags,
    ) -> Result<Arc<Node>> {
        let target =
            Target { filename: Some(name.to_owned()), options, flags, ..Target::default() };
        self.open_target(target).await
    }

    /// Opens only the protocol node of a file name: the bytes of the file, without interpreting a format.
    ///
    /// # Errors
    /// The errors of [`Self::open_image`].
    pub async fn open_protocol(
        &self,
        name: &str,
        options: Options,
        flags: OpenFlags,
    ) -> Result<Arc<Node>> {
        let filename = Some(name.to_owned());
        let target = Target { filename, options, flags, protocol: true, ..Target::default() };
        self.open_target(target).await
    }

    /// Opens an image and creates an unnamed backend whose root is the image. The backend takes read permission and,
    /// unless the node is read-only, write and resize permission. The backend shares all permissions, as tools do.
    ///
    /// # Errors
    /// The errors of [`Self::open_image`], and when the permissions conflict with those of another user.
    pub async fn open_backend(
        &self,
        name: Option<&str>,
        options: Options,
        flags: OpenFlags,
    ) -> Result<Backend> {
        let node = match name {
            Some(name) => self.open_image(name, options, flags).await?,
            None => self.open(options, flags).await?,
        };
        let mut taken = Perm::CONSISTENT_READ;
        if !node.is_read_only() {
            taken |= Perm::WRITE | Perm::RESIZE;
        }
        match Backend::new(self, "", Arc::clone(&node), Permissions::sharing_all(taken)) {
            Ok(backend) => Ok(backend),
            Err(error) => {
                self.release_after_failure(node).await;
                Err(error)
            }
        }
    }

    /// Opens a file that contains a part of an image (a data file, for example): the protocol node of a file name, or
    /// the node that options describe.
    pub(super) async fn open_storage(
        &self,
        opening: &Arc<Opening>,
        name: Option<&str>,
        options: Options,
        flags: OpenFlags,
    ) -> Result<Arc<Node>> {
        let target = Target {
            filename: name.map(str::to_owned),
            options,
            flags,
            protocol: true,
            opening: Arc::clone(opening),
            ..Target::default()
        };
        // The caller adds the name of the image to the error.
        let node = Box::pin(self.open_chain(target)).await?;
        node.follow_parent();
        Ok(node)
    }

    fn open_target(&self, target: Target) -> BoxFuture<'_, Result<Arc<Node>>> {
        Box::pin(async move {
            let shown = target.filename.clone();
            let graph = self.clone();
            // An image that is opened halfway must be closed. So the opening runs to its end even if the caller's
            // future is dropped. In this case the new node is closed.
            let opening = async move {
                let node = Some(graph.open_tree(&target).await?);
                Ok(Opened { graph, node })
            };
            let outcome = run_to_completion(opening).await;
            let outcome = outcome.and_then(|opened| opened.keep().ok_or_else(no_medium));
            // The name becomes the path of the error and is not added to the text, because tools print the path before
            // the text.
            outcome.map_err(|error| match shown {
                Some(name) => error.on_path(&name),
                None => error,
            })
        })
    }

    /// Opens an image and its storage, but not its backing file.
    pub(super) async fn open_layer(&self, mut target: Target) -> Result<(Layer, Below)> {
        if let Some(json) = target.filename.as_deref().and_then(|name| name.strip_prefix("json:")) {
            let mut options = Options::from_json(json).map_err(|error| {
                let is_json = error.to_string().starts_with("Invalid JSON object");
                if is_json { error } else { error.prefix("Could not parse the JSON options") }
            })?;
            target.opening.check_references(self, &options)?;
            options.overlay(&target.options);
            target.options = options;
            target.filename = None;
        }
        self.drop_scheme(&mut target);
        let mut generic = take_generic(&mut target.options, &target.flags)?;
        if target.protocol
            && target.filename.is_none()
            && generic.driver.is_none()
            && let Some(path) = target.options.get_str("filename")
        {
            // As in QEMU, the option `filename` is a path, and a scheme in it has no meaning.
            generic.driver = Some(self.protocol_for_path(path)?.name().to_owned());
        }
        self.open_with(target, generic).await
    }

    /// Replaces a file name with a scheme (`file:x`) by the path after the scheme, if the path alone selects the same
    /// protocol.
    fn drop_scheme(&self, target: &mut Target) {
        let Some(name) = target.filename.as_deref() else { return };
        let Ok((driver, options)) = self.protocol_for(name) else { return };
        let Some(path) = options.get_str("filename").filter(|path| *path != name) else { return };
        if self.protocol_for(path).is_ok_and(|(plain, _)| plain.name() == driver.name()) {
            target.filename = Some(path.to_owned());
        }
    }

    async fn open_with(&self, mut target: Target, mut generic: Generic) -> Result<(Layer, Below)> {
        let named = match &generic.driver {
            Some(name) => Some(self.driver(name)?),
            None => None,
        };
        if let Some(driver) = named
            && driver.opens_children()
            && !driver.is_protocol()
            && driver.children().iter().all(|spec| spec.child != ChildIdx::FILE)
            && target.options.contains("file")
        {
            return self.open_with_unknown_file(driver, target, generic).await;
        }
        let protocol = match (named, &target.filename) {
            (Some(driver), _) if driver.opens_children() => Some(driver),
            (None, Some(name)) if target.protocol => Some(self.protocol_for(name)?.0),
            (None, None) if target.protocol || !describes_file(&target.options) => {
                return Err(Error::invalid("Must specify either driver or file"));
            }
            _ => None,
        };
        if let Some(driver) = protocol {
            if let Some(name) = &target.filename {
                let parsed = driver.parse_filename(name)?;
                for (key, value) in parsed.iter() {
                    target.options.insert_default(key, value.clone());
                }
            }
            return self.open_driver(driver, target, generic, None).await;
        }
        let file = self.open_file_child(&mut target, &generic).await?;
        let driver = match named {
            Some(driver) => Ok(driver),
            None => {
                generic.flags.probed = true;
                self.probe_node(&file, target.filename.as_deref()).await
            }
        };
        match driver {
            Ok(driver) => self.open_driver(driver, target, generic, Some(file)).await,
            Err(error) => {
                target.opening.release_later(file);
                Err(error)
            }
        }
    }

    /// Opens a node of a driver that has no `file` child, although the options describe one. As in QEMU, the errors of the
    /// child and of the driver take precedence over the unknown option.
    async fn open_with_unknown_file(
        &self,
        driver: &'static dyn DriverFactory,
        mut target: Target,
        generic: Generic,
    ) -> Result<(Layer, Below)> {
        let file = self.open_file_child(&mut target, &generic).await?;
        target.opening.release_later(file);
        target.options.insert("file", "");
        self.open_driver(driver, target, generic, None).await
    }

    /// Opens the `file` child, from the `file` option or the file name.
    async fn open_file_child(&self, target: &mut Target, generic: &Generic) -> Result<Arc<Node>> {
        let mut flags = generic.flags.clone();
        flags.probed = false;
        flags.unmap = true;
        flags.copy_on_read = false;
        flags.no_backing = false;
        flags.no_io = false;
        let options = match target.options.take("file") {
            Some(Value::String(name)) => {
                return target.opening.node(self, &name);
            }
            // An object with only the empty key (`file.=x`) contains no reference to a node.
            Some(Value::Object(map)) if map.len() > 1 && map.contains_key("") => {
                return Err(Error::invalid(PLAIN_AND_NESTED));
            }
            Some(Value::Object(map)) => Options::from_map(map)?,
            Some(_) => return Err(Error::invalid(NO_FILE)),
            None => Options::new(),
        };
        let filename = if options.contains("driver") || options.contains("filename") {
            None
        } else {
            target.filename.clone()
        };
        if filename.is_none() && options.is_empty() {
            return Err(Error::invalid(NO_FILE));
        }
        let child = Target {
            filename,
            options,
            flags,
            protocol: true,
            named_above: false,
            depth: target.depth,
            nesting: target.nesting.saturating_add(1),
            opening: Arc::clone(&target.opening),
        };
        // The caller that opens the image adds the name to the error.
        let node = Box::pin(self.open_chain(child)).await?;
        node.follow_parent();
        Ok(node)
    }

    async fn open_driver(
        &self,
        driver: &'static dyn DriverFactory,
        target: Target,
        generic: Generic,
        file: Option<Arc<Node>>,
    ) -> Result<(Layer, Below)> {
        let children = Arc::new(Children::default());
        let opening = Arc::clone(&target.opening);
        match self.open_parts(driver, target, generic, file.clone(), &children).await {
            Ok(opened) => Ok(opened),
            Err(error) => {
                opening.release_children(&children, file);
                Err(error)
            }
        }
    }

    async fn open_parts(
        &self,
        driver: &'static dyn DriverFactory,
        target: Target,
        generic: Generic,
        file: Option<Arc<Node>>,
        children: &Arc<Children>,
    ) -> Result<(Layer, Below)> {
        if generic.flags.force_share && !generic.flags.read_only {
            return Err(Error::invalid("force-share=on can only be used with read-only images"));
        }
        let name = self.claim_name(generic.node_name.as_deref())?;
        let Target { filename, options, named_above, depth, nesting, opening, .. } = target;
        let mut context = OpenContext {
            graph: self.clone(),
            node_name: name.name.clone(),
            options,
            flags: generic.flags,
            children: Arc::clone(children),
            filename: filename.clone(),
            backing: None,
            epochs: Arc::clone(&opening.epochs),
            nesting,
            opening,
        };
        let backing_option = take_backing(driver, &mut context)?;
        let mut opened_with = context.options.clone();
        if driver.is_protocol() {
            driver.children().iter().for_each(|spec| drop(opened_with.take(spec.name)));
        }
        if let Some(file) = &file {
            context.flags.read_only |= file.is_read_only() && context.flags.auto_read_only;
            if file.is_read_only() && !context.flags.read_only {
                return Err(
                    Error::new(ErrorKind::Denied, "Block node is read-only").errno(Errno::ACCES)
                );
            }
            attach_file(driver, file, &context)?;
        }
        let opened = driver.open(&mut context).await?;
        let below = check_opened_length(&*opened)
            .and_then(|()| check_options(driver, &context))
            .and_then(|()| self.below(driver, &context, backing_option, depth, nesting));
        let below = match below {
            Ok(below) => below,
            Err(error) => {
                close_unused(&*opened).await;
                return Err(error);
            }
        };
        let layer = Layer {
            name,
            driver,
            opened,
            context,
            detect_zeroes: generic.detect_zeroes,
            given: generic.given,
            opened_with,
            file,
            filename,
            named_above,
        };
        Ok((layer, below))
    }
}

/// Whether options describe the `file` child of an image.
fn describes_file(options: &Options) -> bool {
    match options.get("file") {
        Some(Value::String(_)) => true,
        Some(Value::Object(map)) => !map.is_empty(),
        _ => false,
    }
}

/// Refuses an image that is longer than [`MAX_LENGTH`].
fn check_opened_length(opened: &dyn Driver) -> Result<()> {
    if opened.size() > MAX_LENGTH {
        return Err(Error::from_errno(Errno::FBIG).prefix("Could not refresh total sector count"));
    }
    Ok(())
}

/// Removes the `backing` option from the options and returns it. Refuses a backing file if the driver does not support
/// backing files.
fn take_backing(driver: &dyn DriverFactory, context: &mut OpenContext) -> Result<Option<Value>> {
    let (is_none, is_one) = match context.options.get("backing") {
        Some(Value::Null) => (true, false),
        Some(Value::String(name)) => (name.is_empty(), !name.is_empty()),
        Some(Value::Object(_)) => (false, true),
        _ => (false, false),
    };
    // `backing` with no value (null or an empty string) is accepted for every format.
    if is_none || driver.supports_backing() {
        return Ok(context.options.take("backing"));
    }
    if is_one && !context.flags.no_backing {
        return Err(Error::unsupported("Driver doesn't support backing files"));
    }
    Ok(None)
}

pub(super) fn unsupported_option(driver: &dyn DriverFactory, key: &str) -> Error {
    let (what, does_not) = match driver.is_protocol() {
        true => ("protocol", "doesn't"),
        false => ("format", "does not"),
    };
    let name = driver.name();
    Error::invalid(format!("Block {what} '{name}' {does_not} support the option '{key}'"))
}

/// Refuses options that the driver has not removed, and copy-on-read on a read-only node.
fn check_options(driver: &dyn DriverFactory, context: &OpenContext) -> Result<()> {
    if let Some(key) = context.options.first_key() {
        return Err(unsupported_option(driver, &key));
    }
    if context.flags.copy_on_read && context.flags.read_only {
        return Err(Error::invalid("Can't use copy-on-read on read-only device"));
    }
    Ok(())
}

pub(super) async fn close_unused(opened: &dyn Driver) {
    if let Some(request) = opened.close()
        && let Err(error) = request.await
    {
        tracing::warn!(%error, "cannot close an image that failed to open");
    }
}

/// Puts the `file` child into its slot, with the default permissions of a node without users.
fn attach_file(driver: &dyn DriverFactory, file: &Arc<Node>, context: &OpenContext) -> Result<()> {
    let OpenFlags { read_only, no_io, .. } = context.flags;
    let access = NodeAccess { writable: !read_only, no_io };
    let spec = driver.children().iter().find(|spec| spec.child == ChildIdx::FILE);
    let spec = spec.copied().unwrap_or(ChildSpec::IMAGE);
    let permissions = Permissions::for_child(spec.roles, Permissions::NONE, access);
    context.children.attach(&context.node_name, spec, file, permissions)
}
