//! `img info`: prints the information that [`oxblk::ImageInfo`] collects on an image.
//!
//! The command opens only the image itself and, with `--backing-chain`, its backing files. The command prints the names
//! of other files to which an image refers, and does not open these files.

use oxblk::{Cache, ImageInfo, qemu_json};
use oxblk_core::{Graph, Purpose, names};

use super::{Context, Step, graph};
use crate::flags::page::{Example, Page};
use crate::flags::spec::{Value, both, long};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading};
use crate::program::out;
use crate::text::info as info_text;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::format(|a| &mut a.format),
    shared::output(|a, text| shared::set_json(&mut a.json, &text)),
    Flag::switch(both('b', "backing-chain"), "also print information on the backing files", |a| {
        &mut a.chain
    }),
    shared::object(),
    shared::image_opts(|a| &mut a.image_options),
    shared::force_share(|a| &mut a.share),
    Flag::text(
        both('t', "cache").in_full(),
        Value::CACHE.default("writeback"),
        "cache mode",
        |a| &mut a.cache_name,
    ),
    Flag::switch(long("limits").in_full(), "also print the limits on requests", |a| &mut a.limits),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img info",
    about: "print information on an image",
    usage: "[OPTIONS] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[Example {
        about: "print information on an image and its backing files as JSON",
        arguments: "--backing-chain --output json disk.qcow2",
    }],
};

#[derive(Default)]
struct Arguments {
    format: Option<String>,
    image_options: bool,
    chain: bool,
    cache_name: Option<String>,
    cache: Cache,
    share: bool,
    limits: bool,
    json: bool,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let graph = graph();
        let mut infos = Vec::new();
        let mut seen = Vec::new();
        let mut next = Some((arguments.filename.clone(), arguments.format.clone()));
        let mut is_options = arguments.image_options;
        while let Some((name, format)) = next.take() {
            // Compare canonical paths: in a loop of relative names, each name is longer than the previous one.
            let path = names::to_path(&name);
            let file = path.canonicalize().unwrap_or_else(|_| path.into_owned());
            if seen.contains(&file) {
                let message = format_args!("Backing file '{name}' creates an infinite loop.");
                return Err(context.failed(message));
            }
            let info = collect(context, &graph, &arguments, &name, format, is_options).await?;
            is_options = false;
            if arguments.chain {
                next = below(&info);
            }
            if let Some((name, _)) = &mut next {
                let admitted = graph.gate().admit(Purpose::Backing, name);
                *name = admitted.map_err(|error| context.error(&error))?.name;
            }
            seen.push(file);
            infos.push(info);
        }
        print(&infos, &arguments);
        Ok(())
    })
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments::default();
    let operands = context.parse(FLAGS, words, &mut read)?;
    read.cache = context.cache("cache", read.cache_name.as_deref())?;
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    read.filename.clone_from(filename);
    Ok(read)
}

async fn collect(
    context: &Context,
    graph: &Graph,
    arguments: &Arguments,
    name: &str,
    format: Option<String>,
    is_options: bool,
) -> Step<ImageInfo> {
    let image = ImageName::file(name, format.as_deref()).options_if(is_options);
    let options = reading()
        .force_share(arguments.share)
        .cache(arguments.cache)
        .backing(false)
        .metadata_only(true);
    let backend = image.open_or_report(&context.program, graph, options).await?;
    let info = ImageInfo::read(&backend).await;
    let closed = backend.close().await;
    let info = info.map_err(|error| context.error(&error))?;
    closed.map_err(|error| context.error(&error))?;
    Ok(info)
}

/// The name and the format of the backing file in `info`.
fn below(info: &ImageInfo) -> Option<(String, Option<String>)> {
    let backing = info.backing.as_ref()?;
    Some((backing.full_name.clone(), backing.format.clone()))
}

fn print(infos: &[ImageInfo], arguments: &Arguments) {
    if arguments.json {
        let json = |info: &ImageInfo| info.to_json(arguments.limits);
        let value = match infos {
            [info] if !arguments.chain => json(info),
            infos => infos.iter().map(json).collect(),
        };
        out(format_args!("{}\n", qemu_json::pretty(&value)));
        return;
    }
    let texts: Vec<_> = infos.iter().map(|info| info_text::whole(info, arguments.limits)).collect();
    out(format_args!("{}", texts.join("\n")));
}
