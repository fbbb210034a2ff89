//! `img info`: prints information on an image. [`oxblk::ImageInfo`] collects it.
//!
//! The command opens only the image itself and, with `--backing-chain`, its backing files. Other files that an image refers
//! to are only printed.

use oxblk::{ImageInfo, qemu_json};
use oxblk_core::{Graph, Options, Purpose, names};

use super::{Context, Step, graph, objects};
use crate::cache::CacheMode;
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;
use crate::program::out;
use crate::text::info as info_text;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('f', "format", true),
    long('J', "output", true),
    both('b', "backing-chain", false),
    long('O', "object", true),
    long('I', "image-opts", false),
    both('U', "force-share", false),
    both('t', "cache", true).in_full(),
    long('L', "limits", false).in_full(),
];

struct Arguments {
    format: Option<String>,
    image_options: bool,
    chain: bool,
    cache: CacheMode,
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

fn read(context: &Context, arguments: Vec<String>) -> Step<Arguments> {
    let mut parser = context.parser(arguments, OPTIONS);
    let mut cache = None;
    let mut read = Arguments {
        format: None,
        image_options: false,
        chain: false,
        cache: CacheMode::WRITEBACK,
        share: false,
        limits: false,
        json: false,
        filename: String::new(),
    };
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        match id {
            'f' => read.format = Some(value),
            'I' => read.image_options = true,
            'b' => read.chain = true,
            't' => cache = Some(value),
            'U' => read.share = true,
            'L' => read.limits = true,
            'J' => read.json = context.wants_json(&value)?,
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    if let Some(name) = cache {
        let unknown = || context.failed(format_args!("Invalid cache option: {name}"));
        read.cache = CacheMode::parse(&name).ok_or_else(unknown)?;
    }
    let operands = parser.operands();
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
    let mut image =
        Image { options: Options::new(), ..Image::read_only(name) }.format(format.as_deref());
    image = image.options_if(is_options).share_if(arguments.share).cache(arguments.cache);
    image.flags.no_backing = true;
    image.flags.no_io = true;
    let backend = image.open_or_say(&context.program, graph).await?;
    let info = ImageInfo::read(&backend).await;
    let closed = backend.close().await;
    let info = info.map_err(|error| context.error(&error))?;
    closed.map_err(|error| context.error(&error))?;
    Ok(info)
}

/// The name and format of the backing file, according to `info`.
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
