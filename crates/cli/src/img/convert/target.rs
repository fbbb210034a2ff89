//! The target of `img convert`. This module creates the target (unless `-n` is given), opens the target, and determines its
//! properties before the copy.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use oxblk_core::create::{Created, Creation};
use oxblk_core::{
    Backend, ChildIdx, DriverFactory, Error, Gate, Graph, Options, Purpose, relative_to,
};

use super::super::create_options::CreateOptions;
use super::super::{Context, Exit, Step};
use super::arguments::Arguments;
use super::bitmaps;
use crate::image::{ImageName, writing};

/// The open target.
pub(super) struct Target {
    pub(super) backend: Backend,
    /// The target reads as zeroes everywhere.
    pub(super) is_zero: bool,
    /// The size in bytes of the target's backing file, if the copy leaves out data that this file contains. `u64::MAX` if the
    /// size is unknown.
    pub(super) backing: Option<u64>,
    /// The target's files, if this run has created the target.
    pub(super) created: Option<Created>,
}

/// The copy cannot begin.
pub(super) enum Unprepared {
    /// A failure, which has been reported.
    Failed(Exit),
    /// A signal has stopped the creation of the target.
    Stopped(Created),
}

impl From<Exit> for Unprepared {
    fn from(exit: Exit) -> Self {
        Self::Failed(exit)
    }
}

/// Creates the target, unless `-n` was given, and opens it. Setting `stop` stops the creation.
pub(super) async fn prepare(
    context: &Context,
    arguments: &Arguments,
    graph: &Graph,
    sources: &[Backend],
    stop: &Arc<AtomicBool>,
) -> Result<Target, Unprepared> {
    let size = sources.iter().fold(0_u64, |sum, source| {
        // The size of a target is a multiple of the sector size.
        sum.saturating_add(oxblk::in_sectors(source.size()))
    });
    let made = if arguments.create {
        create(context, arguments, graph, sources, size, stop).await?
    } else {
        // An existing target keeps its backing file: `-B` and `-F` do not change the image.
        if arguments.backing.is_some() {
            check_relied_on(context, arguments, sources)?;
        }
        bitmaps::check_sources(context, arguments, sources)?;
        let has_backing = arguments.backing.is_some();
        Made { has_backing, opening: Ok(Options::default()), created: None }
    };
    let Made { has_backing, opening, created } = made;
    let opened = async {
        let opening = opening.map_err(|error| context.error(&error))?;
        let backend = open(context, arguments, graph, opening).await?;
        match describe(context, arguments, &backend, size, has_backing) {
            Ok((is_zero, backing)) => Ok((backend, is_zero, backing)),
            Err(exit) => {
                drop(backend.close().await);
                Err(exit)
            }
        }
    };
    match opened.await {
        Ok((backend, is_zero, backing)) => Ok(Target { backend, is_zero, backing, created }),
        Err(exit) => {
            // Remove the new image, because the copy into it cannot start.
            if let Some(created) = created {
                created.remove_incomplete(graph).await;
            }
            Err(exit.into())
        }
    }
}

fn check_backing(
    context: &Context,
    arguments: &Arguments,
    sources: &[Backend],
    file: Option<&str>,
    format: Option<&str>,
) -> Step {
    let Some(file) = file else { return Ok(()) };
    check_relied_on(context, arguments, sources)?;
    if format.is_none() {
        return Err(context.failed("Use of backing file requires explicit backing format"));
    }
    if relative_to(&arguments.target, file) == arguments.target {
        return Err(context.failed(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    Ok(())
}

/// Refuses options that cannot be combined with a backing file of the target.
fn check_relied_on(context: &Context, arguments: &Arguments, sources: &[Backend]) -> Step {
    if sources.len() > 1 {
        return Err(context.failed("Having a backing file for the target makes no sense when concatenating multiple input images"));
    }
    if arguments.target_is_zero {
        context
            .program
            .error("Cannot use --target-is-zero when the destination image has a backing file");
        return Err(Exit(0));
    }
    Ok(())
}

/// Properties of the target that [`prepare`] knows before the target is open.
struct Made {
    /// The copy relies on a backing file: the new target has one, or `-B` was given with `-n`.
    has_backing: bool,
    /// The options needed to open the target.
    opening: Result<Options, Error>,
    /// The files, if this run has created them.
    created: Option<Created>,
}

/// Creates the target.
async fn create(
    context: &Context,
    arguments: &Arguments,
    graph: &Graph,
    sources: &[Backend],
    size: u64,
    stop: &Arc<AtomicBool>,
) -> Result<Made, Unprepared> {
    let format = arguments.new_format();
    let driver = graph
        .driver(format)
        .map_err(|_| context.failed(format_args!("Unknown file format '{format}'")))?;
    let protocol = graph.protocol_for(&arguments.target).map_err(|e| context.error(&e))?.0;
    let mut options =
        CreateOptions::new(driver, Some(protocol)).map_err(|error| context.error(&error))?;
    if let Some(list) = &arguments.options {
        options.parse(list).map_err(|error| context.error(&error))?;
    }
    // The target has the size of the sources. A size in `-o` is ignored.
    options.set_size(size);
    set_backing(context, arguments, &mut options, driver)?;
    let backing = options.text("backing_file").map(str::to_owned);
    let backing_format = options.text("backing_fmt");
    check_backing(context, arguments, sources, backing.as_deref(), backing_format)?;
    if arguments.compress {
        if options.is_encrypted() {
            let message = "Compression and encryption not supported at the same time";
            return Err(context.failed(message).into());
        }
        // Every format that can write compressed clusters has this option.
        if !options.knows("compression_type") {
            return Err(context.failed("Compression not supported for this file format").into());
        }
        if options.text("preallocation").is_some_and(|mode| mode != "off") {
            let message = "Compression and preallocation not supported at the same time";
            return Err(context.failed(message).into());
        }
    }
    bitmaps::check_sources(context, arguments, sources)?;
    let target = &arguments.target;
    let made = graph.create_image_until(target, format, &options.to_options(), stop).await;
    let creation = made.map_err(|error| {
        context
            .program
            .report_in(format_args!("{target}: error while converting {format}: "), &error);
        Exit(1)
    })?;
    match creation {
        Creation::Complete(created) => Ok(Made {
            has_backing: backing.is_some(),
            opening: opening(arguments, graph, &options),
            created: Some(created),
        }),
        Creation::Stopped(created) => Err(Unprepared::Stopped(created)),
    }
}

/// The options needed to open the new image: its secrets and, with `--untrusted`, the backing file and the data file of
/// the command line.
fn opening(
    arguments: &Arguments,
    graph: &Graph,
    options: &CreateOptions,
) -> Result<Options, Error> {
    let mut opening = options.key_secrets();
    if *graph.gate() == Gate::Anything {
        return Ok(opening);
    }
    if let Some(backing) = options.text("backing_file") {
        let path = relative_to(&arguments.target, backing);
        let described = graph.described(&path, options.text("backing_fmt"))?;
        opening.insert("backing", described.to_json());
    }
    if let Some(data_file) = options.text("data_file") {
        let path = Gate::AnyFile.admit(Purpose::Data, data_file)?.name;
        let (protocol, mut described) = graph.protocol_for(&path)?;
        described.insert("driver", protocol.name());
        opening.insert("data-file", described.to_json());
    }
    Ok(opening)
}

fn set_backing(
    context: &Context,
    arguments: &Arguments,
    options: &mut CreateOptions,
    driver: &dyn DriverFactory,
) -> Step {
    let given = [
        ("backing_file", &arguments.backing, "file"),
        ("backing_fmt", &arguments.backing_format, "file format"),
    ];
    for (name, value, what) in given {
        let Some(value) = value else { continue };
        if !options.knows(name) {
            return Err(context.failed(format_args!(
                "Backing {what} not supported for file format '{}'",
                driver.name()
            )));
        }
        options.set(name, value);
    }
    Ok(())
}

async fn open(
    context: &Context,
    arguments: &Arguments,
    graph: &Graph,
    options: Options,
) -> Step<Backend> {
    let Some(mode) = arguments.target_mode() else {
        let name = arguments.target_cache.as_deref().unwrap_or_default();
        return Err(context.failed(format_args!("Invalid cache option: {name}")));
    };
    let options = writing().options(&options).cache(mode).discard(true);
    let format = match arguments.target_options {
        true => arguments.target_format.as_deref(),
        false => Some(arguments.new_format()),
    };
    let image = ImageName::file(&arguments.target, format).options_if(arguments.target_options);
    Ok(image.open_or_report(&context.program, graph, options).await?)
}

/// Whether the target reads as zeroes, and the size of its backing file if the copy relies on that file.
fn describe(
    context: &Context,
    arguments: &Arguments,
    backend: &Backend,
    size: u64,
    has_backing: bool,
) -> Step<(bool, Option<u64>)> {
    let node = backend.node().map_err(|error| context.error(&error))?;
    if arguments.compress && node.driver().compress().is_none() {
        return Err(context.failed("Compression not supported for this file format"));
    }
    if backend.size() < size && !(arguments.create && arguments.options.is_some()) {
        return Err(context.failed("output file is smaller than input file"));
    }
    let below = node.child(ChildIdx::BACKING);
    let backing = match (has_backing, below) {
        (true, Some(below)) => Some(below.size()),
        // The size of the backing file is unknown, so all zeroes are written.
        (true, None) => Some(u64::MAX),
        (false, _) => None,
    };
    let fresh = arguments.create && node.limits().has_zero_init;
    let is_zero = backing.is_none() && (arguments.target_is_zero || fresh);
    Ok((is_zero, backing))
}
