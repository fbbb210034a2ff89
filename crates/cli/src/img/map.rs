//! `img map`.

use std::fmt::Write as _;
use std::sync::Arc;

use oxblk_core::{Backend, ChainStatus, Error, Node, StatusFlags, Want};

use super::{Context, Exit, Step, graph, objects};
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;
use crate::program::{flush_out, out};
use crate::text::number::in_sectors;

/// Longest range asked about at once, in bytes: an image may promise petabytes of nothing.
const STEP: u64 = 1 << 50;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('f', "format", true),
    long('J', "output", true),
    long('O', "object", true),
    long('I', "image-opts", false),
    both('U', "force-share", false),
    both('s', "start-offset", true),
    both('l', "max-length", true),
];

#[derive(Default)]
struct Arguments {
    format: Option<String>,
    image_options: bool,
    start: u64,
    length: Option<u64>,
    json: bool,
    share: bool,
    filename: String,
}

/// Bytes of output that are gathered before they are printed: an image may have millions of extents.
const GATHERED: usize = 32 << 10;

/// What is known of one extent.
#[derive(Debug, Clone, Default)]
struct Extent {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    /// Where it lies, and in which node.
    place: Option<(u64, Arc<Node>)>,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let backend = Image::read_only(&arguments.filename)
            .format(arguments.format.as_deref())
            .options_if(arguments.image_options)
            .share_if(arguments.share)
            .open_or_say(&context.program, &graph())
            .await?;
        let outcome = map(context, &arguments, &backend).await;
        let closed = backend.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    })
}

fn read(context: &Context, arguments: Vec<String>) -> Step<Arguments> {
    let mut parser = context.parser(arguments, OPTIONS);
    let mut read = Arguments::default();
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        match id {
            'f' => read.format = Some(value),
            'I' => read.image_options = true,
            's' => read.start = context.bytes("start offset", &value)?,
            'l' => read.length = Some(context.bytes("max length", &value)?),
            'J' => read.json = context.wants_json(&value)?,
            'U' => read.share = true,
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    let operands = parser.operands();
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    read.filename.clone_from(filename);
    Ok(read)
}

async fn map(context: &Context, arguments: &Arguments, backend: &Backend) -> Step {
    let mut output = Output { context, json: arguments.json, first: true, text: String::new() };
    output.begin();
    let outcome = map_extents(context, arguments, backend, &mut output).await;
    output.print();
    outcome
}

async fn map_extents(
    context: &Context,
    arguments: &Arguments,
    backend: &Backend,
    output: &mut Output<'_>,
) -> Step {
    let size = backend.size();
    let mut end = in_sectors(size);
    if let Some(length) = arguments.length {
        end = end.min(arguments.start.saturating_add(length));
    }
    let mut current = Extent { start: arguments.start, ..Extent::default() };
    let mut at = arguments.start;
    while at < end {
        let next = if at < size {
            let status = backend.block_status(at, STEP.min(end.min(size) - at), Want::Precise);
            let status = status.await.map_err(|error| {
                output.print();
                let error = Error::from_errno(error.raw_errno());
                context.failed(format_args!("Could not read file metadata: {error}"))
            })?;
            extent(at, &status)
        } else {
            rest_of_sector(at, end - at, &current)
        };
        at = at.saturating_add(next.length.max(1));
        if current.joins(&next) {
            current.length = current.length.saturating_add(next.length);
        } else {
            if current.length > 0 {
                output.extent(&current)?;
            }
            current = next;
        }
    }
    output.extent(&current)?;
    output.end();
    Ok(())
}

fn extent(start: u64, found: &ChainStatus) -> Extent {
    let mut flags = found.status.flags;
    if !flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
        // No layer knows anything of it.
        flags = StatusFlags::empty();
    }
    let place = match (flags.contains(StatusFlags::OFFSET_VALID), found.status.host) {
        (true, Some(host)) => {
            let holder = match found.status.child {
                Some(child) => found.node.child(child),
                None => Some(Arc::clone(&found.node)),
            };
            holder.map(|node| (host, node))
        }
        _ => None,
    };
    Extent {
        start,
        length: found.status.len,
        depth: found.depth,
        present: flags.contains(StatusFlags::ALLOCATED),
        zero: flags.contains(StatusFlags::ZERO),
        data: flags.contains(StatusFlags::DATA),
        compressed: flags.contains(StatusFlags::COMPRESSED),
        place,
    }
}

/// What fills the last sector behind the end of an image of odd size.
fn rest_of_sector(start: u64, length: u64, before: &Extent) -> Extent {
    let place = before
        .place
        .as_ref()
        .map(|(offset, node)| (offset.saturating_add(before.length), Arc::clone(node)));
    Extent { start, length, present: true, zero: true, place, ..Extent::default() }
}

impl Extent {
    /// Whether `next`, which follows it, is more of the same.
    fn joins(&self, next: &Self) -> bool {
        let place = match (&self.place, &next.place) {
            (None, None) => true,
            (Some((a, node)), Some((b, other))) => {
                a.checked_add(self.length) == Some(*b) && Arc::ptr_eq(node, other)
            }
            _ => false,
        };
        self.length > 0
            && place
            && (self.depth, self.present, self.zero, self.data, self.compressed)
                == (next.depth, next.present, next.zero, next.data, next.compressed)
    }
}

struct Output<'a> {
    context: &'a Context,
    json: bool,
    first: bool,
    /// What is to be printed.
    text: String,
}

impl Output<'_> {
    fn add(&mut self, text: std::fmt::Arguments<'_>) {
        // A string takes all that is written to it.
        let _ = self.text.write_fmt(text);
        if self.text.len() >= GATHERED {
            self.print();
        }
    }

    fn print(&mut self) {
        out(format_args!("{}", self.text));
        flush_out();
        self.text.clear();
    }

    fn begin(&mut self) {
        if self.json {
            self.add(format_args!("["));
        } else {
            self.add(format_args!(
                "{:<16}{:<16}{:<16}{}\n",
                "Offset", "Length", "Mapped to", "File"
            ));
        }
    }

    fn end(&mut self) {
        if self.json {
            self.add(format_args!("]\n"));
        }
    }

    fn extent(&mut self, extent: &Extent) -> Step {
        if self.json {
            self.object(extent);
            return Ok(());
        }
        if !extent.data || extent.zero {
            return Ok(());
        }
        match &extent.place {
            Some((offset, node)) if !extent.compressed => {
                let file = node.filename().unwrap_or_default();
                let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
                let (start, length) = (hex(extent.start), hex(extent.length));
                self.add(format_args!("{start:<16}{length:<16}{:<16}{file}\n", hex(*offset)));
                Ok(())
            }
            _ => {
                self.print();
                self.context
                    .program
                    .error("File contains external, encrypted or compressed clusters.");
                Err(Exit(1))
            }
        }
    }

    fn object(&mut self, extent: &Extent) {
        let separator = if self.first { "" } else { ",\n" };
        self.first = false;
        let Extent { start, length, depth, present, zero, data, compressed, .. } = extent;
        self.add(format_args!(
            "{separator}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        ));
        if let Some((offset, _)) = &extent.place {
            self.add(format_args!(", \"offset\": {offset}"));
        }
        self.add(format_args!("}}"));
    }
}
