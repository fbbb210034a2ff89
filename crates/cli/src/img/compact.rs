//! `img compact`: releases the unused space of an image to the host.

use std::sync::atomic::Ordering::Relaxed;

use oxblk_core::compact::Compacted;
use serde_json::json;

use super::{Context, Exit, Step, graph};
use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::Value;
use crate::flags::{Flag, shared};
use crate::image::{ImageName, writing};
use crate::program::out;
use crate::signals::stop_flag;
use crate::text::progress::{Progress, step};
use crate::text::size;
use oxblk::qemu_json;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::quiet(|a| &mut a.quiet),
    shared::progress(|a| &mut a.progress),
    shared::format(|a| &mut a.format),
    shared::image_opts(|a| &mut a.image_options),
    shared::output(|a, text| shared::set_json(&mut a.json, &text)),
    shared::object(),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img compact",
    about: "release unused space of an image to the host",
    usage: "[OPTIONS] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[Note::Text(
        "Clusters from the end of the file are moved into free space in front of them. Then the file is \
         truncated behind the last cluster in use, and holes are punched for free clusters. The contents of the \
         disk and of its snapshots stay the same.",
    )],
    exit_codes: shared::STOPPABLE_EXIT_CODES,
    examples: &[Example { about: "make an image file shorter", arguments: "-p disk.qcow2" }],
};

/// Maximum number of bytes that are moved between two progress reports, unless one metadata structure is longer.
const AT_ONCE: u64 = 256 << 20;

#[derive(Default)]
struct Arguments {
    quiet: bool,
    progress: bool,
    format: Option<String>,
    image_options: bool,
    json: bool,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    let progress =
        Progress::start(arguments.progress && !arguments.quiet && !arguments.json, step::USUAL);
    let mut result = (Compacted::default(), "");
    let outcome = context.block_on(async {
        result = compact(context, &arguments, &progress).await?;
        Ok(())
    });
    if outcome.is_ok() {
        progress.complete();
    }
    progress.end();
    outcome?;
    let (compacted, format) = result;
    if arguments.json {
        let value = to_json(&compacted, &arguments.filename, format);
        out(format_args!("{}\n", qemu_json::pretty(&value)));
    } else if !arguments.quiet {
        out(format_args!("{}", human(&compacted)));
    }
    Ok(())
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments::default();
    let operands = context.parse(FLAGS, words, &mut read)?;
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    read.filename.clone_from(filename);
    Ok(read)
}

async fn compact(
    context: &Context,
    arguments: &Arguments,
    progress: &Progress,
) -> Step<(Compacted, &'static str)> {
    let image = ImageName::file(&arguments.filename, arguments.format.as_deref())
        .options_if(arguments.image_options);
    let options = writing().discard(true);
    let backend = image.open_or_report(&context.program, &graph(), options).await?;
    let node = backend.node().map_err(|error| context.error(&error))?;
    let format = node.factory().name();
    let can = node.driver().compact().is_some();
    drop(node);
    let stop = stop_flag();
    let go_on = |done: u64, left: u64| {
        progress.set(done, done.saturating_add(left));
        !stop.load(Relaxed)
    };
    let outcome = if can {
        backend.compact(AT_ONCE, &go_on).await.map_err(|error| context.error(&error))
    } else {
        Err(context.failed(format_args!("Images of format '{format}' cannot be compacted")))
    };
    let closed = backend.close().await;
    let compacted = outcome?;
    closed.map_err(|error| context.error(&error))?;
    if stop.load(Relaxed) {
        return Err(Exit::INTERRUPTED);
    }
    Ok((compacted, format))
}

fn given_back((before, after): (u64, u64)) -> u64 {
    before.saturating_sub(after)
}

fn human(done: &Compacted) -> String {
    let (before, after) = done.length;
    let back = match done.stored {
        Some(stored) => size::both(given_back(stored)),
        None => "unknown".to_owned(),
    };
    let mut text = format!(
        "Image compacted.\ngiven back: {back}\nmoved: {}\nfile length: {} -> {}\n",
        size::both(done.moved),
        size::both(before),
        size::both(after),
    );
    if let Some(obstacle) = done.obstacle {
        text.push_str(&format!("stays at the end of the file: {obstacle}\n"));
    }
    text
}

fn to_json(done: &Compacted, filename: &str, format: &str) -> serde_json::Value {
    let mut value = json!({
        "filename": filename,
        "format": format,
        "moved": done.moved,
        "file-length-before": done.length.0,
        "file-length": done.length.1,
    });
    if let Some(stored) = done.stored {
        value["given-back"] = given_back(stored).into();
        value["actual-size-before"] = stored.0.into();
        value["actual-size"] = stored.1.into();
    }
    if let Some(obstacle) = done.obstacle {
        value["obstacle"] = obstacle.into();
    }
    value
}
