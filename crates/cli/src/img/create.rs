//! `img create`: creates an image, with a backing file if requested.
//!
//! The command checks the options and the backing file before it creates a file. It prints the resulting options as QEMU
//! does.

use oxblk::in_sectors;
use oxblk_core::create::Creation;
use oxblk_core::{Errno, Error, ErrorKind, Graph};

use super::create_options::{CreateOptions, append, asks_for_help};
use super::stopped::report_stop;
use super::{Context, Step, graph};
use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::{Alias, Value, both};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading};
use crate::program::{note, out};
use crate::signals::stop_flag;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::object(),
    Flag::text(both('f', "format"), Value::FORMAT.default("raw"), "format of the new image", |a| {
        &mut a.format
    }),
    Flag::text(
        both('b', "backing"),
        Value::file("FILE"),
        "backing file, which is read where the new image has no data",
        |a| &mut a.backing,
    ),
    Flag::text(
        both('F', "backing-format").aliases(&[Alias::Letter('B')]),
        Value::FORMAT,
        "format of the backing file",
        |a| &mut a.backing_format,
    ),
    Flag::switch(
        both('u', "backing-unsafe"),
        "do not check that the backing file can be opened",
        |a| &mut a.backing_unsafe,
    ),
    Flag::value(
        both('o', "options"),
        shared::OPTIONS,
        "options of the format (key=value,...); '-o help' lists them",
        |a, list| Ok(append(&mut a.options, &list)?),
    ),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img create",
    about: "create an image",
    usage: "[OPTIONS] FILENAME [SIZE]",
    operands: &[Value::FILENAME, Value::size("SIZE")],
    flags: &FLAGS,
    notes: &[Note::Text(
        "Without SIZE, the new image is as large as its backing file. With -u, SIZE is required.",
    )],
    exit_codes: shared::STOPPABLE_EXIT_CODES,
    examples: &[
        Example { about: "create a disk of 20 GiB", arguments: "-f qcow2 disk.qcow2 20G" },
        Example {
            about: "create an overlay of an image",
            arguments: "-f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
        },
    ],
};

#[derive(Default)]
struct Arguments {
    quiet: bool,
    format: Option<String>,
    options: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    backing_unsafe: bool,
    filename: String,
    size: Option<u64>,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let mut read = Arguments::default();
    let operands = context.parse(FLAGS, arguments, &mut read)?;
    // The options choose the gate of the graph.
    let graph = graph();
    if read.options.as_deref().is_some_and(asks_for_help) {
        // The operands after the file name are not read.
        let format = read.format.as_deref().unwrap_or("raw");
        return print_options(context, &graph, format, operands.first().map(String::as_str));
    }
    let arguments = with_operands(context, read, operands)?;
    context.block_on(async {
        let name = arguments.filename.as_str();
        match create(&graph, &arguments, name).await {
            Ok(Creation::Complete(_)) => Ok(()),
            Ok(Creation::Stopped(created)) => {
                Err(report_stop(context, &graph, "Interrupted", name, Some(created)).await)
            }
            Err(error) => {
                context.program.report_in(format_args!("{name}: "), &error);
                Err(super::Exit(1))
            }
        }
    })
}

/// Adds the operands to the options.
fn with_operands(context: &Context, mut read: Arguments, operands: Vec<String>) -> Step<Arguments> {
    let mut operands = operands.into_iter();
    match operands.next() {
        Some(filename) => read.filename = filename,
        None => return Err(context.misused("Expecting image file name")),
    }
    if let Some(size) = operands.next() {
        read.size = Some(context.bytes("image size", &size)?);
    }
    match operands.next() {
        Some(extra) => Err(context.misused(format_args!("Unexpected argument: {extra}"))),
        None => Ok(read),
    }
}

/// Prints the options that `-o` accepts.
pub(super) fn print_options(
    context: &Context,
    graph: &Graph,
    format: &str,
    filename: Option<&str>,
) -> Step {
    let known = graph.driver(format);
    let driver =
        known.map_err(|_| context.failed(format_args!("Unknown file format '{format}'")))?;
    let protocol = match filename {
        Some(name) => Some(graph.protocol_for(name).map_err(|e| context.error(&e))?.0),
        None => None,
    };
    let options = CreateOptions::new(driver, protocol).map_err(|e| context.error(&e))?;
    if filename.is_some() {
        out(format_args!("Supported options:\n{}", options.help()));
    } else {
        out(format_args!("Supported {format} options:\n{}", options.help()));
        out(format_args!(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n"
        ));
    }
    Ok(())
}

async fn create(graph: &Graph, arguments: &Arguments, name: &str) -> Result<Creation, Error> {
    let format = arguments.format.as_deref().unwrap_or("raw");
    let driver = graph
        .driver(format)
        .map_err(|_| Error::invalid(format!("Unknown file format '{format}'")))?;
    let protocol = graph.protocol_for(name)?.0;
    let mut options = CreateOptions::new(driver, Some(protocol))?;
    if let Some(list) = &arguments.options {
        options.parse(list)?;
    }
    take_size(&mut options, arguments.size)?;
    take_backing(&mut options, arguments, format)?;
    check_backing(graph, &mut options, arguments, name).await?;
    if matches!(options.number("size"), None | Some(NO_SIZE)) {
        return Err(Error::invalid("Image creation needs a size parameter"));
    }
    if !arguments.quiet {
        note(format_args!("Formatting '{name}', fmt={format}{}\n", options.shown()));
    }
    let cluster_hint = options.knows("cluster_size");
    graph
        .create_image_until(name, format, &options.to_options(), &stop_flag())
        .await
        .map_err(|error| too_large(error, format, cluster_hint))
}

fn take_size(options: &mut CreateOptions, size: Option<u64>) -> Result<(), Error> {
    match (options.number("size"), size) {
        (Some(_), Some(_)) => Err(Error::invalid("The image size must be specified only once")),
        (None, Some(size)) => {
            options.set_size(size);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn take_backing(
    options: &mut CreateOptions,
    arguments: &Arguments,
    format: &str,
) -> Result<(), Error> {
    let refuse = |what| {
        Error::unsupported(format!("Backing {what} not supported for file format '{format}'"))
    };
    if let Some(file) = &arguments.backing {
        if !options.knows("backing_file") {
            return Err(refuse("file"));
        }
        options.set("backing_file", file);
    }
    if let Some(backing_format) = &arguments.backing_format {
        if !options.knows("backing_fmt") {
            return Err(refuse("file format"));
        }
        options.set("backing_fmt", backing_format);
    }
    Ok(())
}

/// Checks the backing file, if the new image has one. The command line must give the format of the backing file. Without `-u`,
/// the backing file is also opened; this must succeed. If the command line has no size, the size of the opened backing file,
/// rounded up to sectors, becomes the size of the new image.
async fn check_backing(
    graph: &Graph,
    options: &mut CreateOptions,
    arguments: &Arguments,
    name: &str,
) -> Result<(), Error> {
    let Some(file) = options.text("backing_file").map(str::to_owned) else { return Ok(()) };
    let format = options.text("backing_fmt").map(str::to_owned);
    if file.is_empty() {
        return Err(Error::invalid("Expected backing file name, got empty string"));
    }
    if file == name {
        return Err(Error::invalid(
            "Error: Trying to create an image with the same filename as the backing file",
        ));
    }
    if name.is_empty() && !file.starts_with('/') && !file.contains(':') {
        return Err(Error::invalid(format!("Cannot use relative backing file names for '{name}'")));
    }
    if arguments.backing_unsafe {
        return match format {
            Some(_) => Ok(()),
            None => Err(Error::invalid("Backing file specified without backing format")),
        };
    }
    let path = oxblk_core::relative_to(name, &file);
    // Open the backing file without locks and without its key: a guest may use the file, and only the size is read.
    let image = ImageName::file(&path, format.as_deref());
    let opening = reading().force_share(true).metadata_only(true);
    let opened = image.open(graph, opening).await.map_err(|error| {
        let hint = match error.hint() {
            Some(hint) => format!("{hint}\nCould not open backing image."),
            None => "Could not open backing image.".to_owned(),
        };
        error.with_hint(hint)
    })?;
    let (size, found) = (opened.size(), opened.node().map(|node| node.factory().name()));
    opened.close().await?;
    if format.is_none() {
        let found = found.unwrap_or_default();
        return Err(Error::invalid("Backing file specified without backing format")
            .with_hint(format!("Detected format of {found}.")));
    }
    if options.number("size").is_none() {
        options.set_size(in_sectors(size));
    }
    Ok(())
}

/// Replaces the text of `EFBIG`, because the system's text does not contain the format.
fn too_large(error: Error, format: &str, cluster_hint: bool) -> Error {
    if error.raw_errno() != Errno::FBIG {
        return error;
    }
    let hint = if cluster_hint { " (try using a larger cluster size)" } else { "" };
    Error::new(
        ErrorKind::Invalid,
        format!("The image size is too large for file format '{format}'{hint}"),
    )
}

/// The value with which QEMU's tools mark a missing size.
const NO_SIZE: u64 = u64::MAX;
