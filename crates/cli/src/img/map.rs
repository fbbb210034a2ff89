//! `img map`: prints where the data of an image is stored. [`oxblk::Extents`] finds the extents.

use std::fmt::Write as _;
use std::sync::Arc;

use oxblk::{Extent, Extents};
use oxblk_core::{Backend, Error, Node};

use super::{Context, Exit, Step, graph};
use crate::flags::page::{Example, Page};
use crate::flags::spec::{Value, both};
use crate::flags::{Flag, shared};
use crate::image::{ImageName, reading};
use crate::program::{flush_out, out};
use crate::text::number;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::format(|a| &mut a.format),
    shared::output(|a, text| shared::set_json(&mut a.json, &text)),
    shared::object(),
    shared::image_opts(|a| &mut a.image_options),
    shared::force_share(|a| &mut a.share),
    Flag::value(
        both('s', "start-offset"),
        Value::size("OFFSET").default("0"),
        "offset of the first extent",
        |a, text| {
            a.start = number::bytes("start offset", &text)?;
            Ok(())
        },
    ),
    Flag::value(
        both('l', "max-length"),
        Value::size("LENGTH").default("up to the end"),
        "length of the range to print",
        |a, text| {
            a.length = Some(number::bytes("max length", &text)?);
            Ok(())
        },
    ),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img map",
    about: "print where the data of an image is stored",
    usage: "[OPTIONS] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[Example {
        about: "list data, zeroes and holes as JSON",
        arguments: "--output json disk.qcow2",
    }],
};

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

/// Output is collected until it has this number of bytes, and then printed, because an image may have millions of
/// extents.
const MAX_COLLECTED: usize = 32 << 10;

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let backend = ImageName::file(&arguments.filename, arguments.format.as_deref())
            .options_if(arguments.image_options)
            .open_or_report(&context.program, &graph(), reading().force_share(arguments.share))
            .await?;
        let outcome = map(context, &arguments, &backend).await;
        let closed = backend.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    })
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

async fn map(context: &Context, arguments: &Arguments, backend: &Backend) -> Step {
    let mut output =
        Output { context, json: arguments.json, first: true, file: None, text: String::new() };
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
    let mut extents = Extents::new(backend, arguments.start, arguments.length);
    let mut any = false;
    loop {
        let next = extents.next().await.map_err(|error| {
            output.print();
            let error = Error::from_errno(error.raw_errno());
            context.failed(format_args!("Could not read file metadata: {error}"))
        })?;
        let Some(extent) = next else { break };
        output.extent(&extent)?;
        any = true;
    }
    if !any {
        output.extent(&Extent { offset: arguments.start, ..Extent::default() })?;
    }
    output.end();
    Ok(())
}

struct Output<'a> {
    context: &'a Context,
    json: bool,
    first: bool,
    /// The node of the last extent, and the name of its file. Most extents lie in the same file as the extent before.
    file: Option<(Arc<Node>, String)>,
    /// Output that is not printed yet.
    text: String,
}

impl Output<'_> {
    fn add(&mut self, text: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.text.write_fmt(text);
        if self.text.len() >= MAX_COLLECTED {
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
                let file = match self.file.take() {
                    Some((last, name)) if Arc::ptr_eq(&last, node) => name,
                    _ => oxblk::name_of_node(node),
                };
                let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
                let (start, length) = (hex(extent.offset), hex(extent.len));
                self.add(format_args!("{start:<16}{length:<16}{:<16}{file}\n", hex(*offset)));
                self.file = Some((Arc::clone(node), file));
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
        let Extent { offset: start, len: length, depth, present, zero, data, compressed, .. } =
            extent;
        self.add(format_args!(
            "{separator}{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}"
        ));
        if let Some((offset, _)) = &extent.place {
            self.add(format_args!(", \"offset\": {offset}"));
        }
        self.add(format_args!("}}"));
    }
}
