//! `img bitmap`: persistent dirty bitmaps.

use oxblk_core::bitmap::Checks;
use oxblk_core::{Backend, Error, Graph};

use super::{Context, Exit, Step, graph};
use crate::flags::page::{Example, Note, Page};
use crate::flags::spec::{Value, both, long};
use crate::flags::{Flag, Stored, shared};
use crate::image::{ImageName, reading, writing};
use crate::text::number;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    shared::object(),
    shared::image_opts(|a| &mut a.image_options),
    Flag::switch_with(long("add"), "create the bitmap; it records writes from now on", |a| {
        a.act(Action::Add)
    }),
    Flag::switch_with(long("remove"), "remove the bitmap from the image, also a broken one", |a| {
        a.act(Action::Remove)
    }),
    Flag::switch_with(
        long("remove-all").in_full(),
        "remove all bitmaps from the image; BITMAP is not needed then",
        |a| a.act(Action::RemoveAll),
    ),
    Flag::switch_with(long("clear"), "clear all bits of the bitmap", |a| a.act(Action::Clear)),
    Flag::switch_with(long("enable"), "start recording writes", |a| a.act(Action::Enable)),
    Flag::switch_with(long("disable"), "stop recording writes", |a| a.act(Action::Disable)),
    Flag::value(
        long("merge"),
        Value::text("NAME"),
        "set the bits that are set in the bitmap NAME",
        |a, name| a.act(Action::Merge(name)),
    ),
    Flag::value(
        both('g', "granularity"),
        Value::size("SIZE"),
        "number of bytes per bit of the new bitmap, with --add",
        |a, text| {
            a.granularity = Some(number::bytes("granularity", &text)?);
            Ok(())
        },
    ),
    Flag::text(
        both('b', "source-file"),
        Value::file("FILE"),
        "another image, which has the bitmap of --merge",
        |a| &mut a.source,
    ),
    Flag::text(both('F', "source-format"), Value::FORMAT, "format of that image", |a| {
        &mut a.source_format
    }),
    Flag::text(both('f', "format").in_full(), Value::FORMAT, shared::FORMAT, |a| &mut a.format),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img bitmap",
    about: "create, change and remove persistent dirty bitmaps",
    usage: "[OPTIONS] ACTION... FILENAME [BITMAP]",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[Note::Text(
        "An ACTION is one of --add, --remove, --remove-all, --clear, --enable, --disable and --merge. \
         The actions are executed in the order of the command line.",
    )],
    exit_codes: shared::EXIT_CODES,
    examples: &[
        Example {
            about: "record writes in a new bitmap",
            arguments: "--add -f qcow2 disk.qcow2 since-monday",
        },
        Example {
            about: "add the contents of the bitmap 'tuesday' to the bitmap 'week'",
            arguments: "--merge tuesday -f qcow2 disk.qcow2 week",
        },
    ],
};

/// An action on the bitmap.
enum Action {
    Add,
    Remove,
    /// Removes every bitmap of the image.
    RemoveAll,
    Clear,
    Enable,
    Disable,
    /// Adds the dirty ranges of this bitmap.
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::RemoveAll => "remove-all",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

#[derive(Default)]
struct Arguments {
    format: Option<String>,
    image_options: bool,
    /// Bytes per bit.
    granularity: Option<u64>,
    source: Option<String>,
    source_format: Option<String>,
    /// The actions in the order of the command line.
    actions: Vec<Action>,
    filename: String,
    /// The name of the bitmap; empty if no action concerns a single bitmap.
    bitmap: String,
}

impl Arguments {
    fn act(&mut self, action: Action) -> Stored {
        self.actions.push(action);
        Ok(())
    }
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let graph = graph();
        let image = ImageName::file(&arguments.filename, arguments.format.as_deref())
            .options_if(arguments.image_options);
        // The backing file is not opened. The backing file may be missing, or it may be the image whose bitmap is
        // merged.
        let options = writing().backing(false);
        let backend = image.open_or_report(&context.program, &graph, options).await?;
        let outcome = act_with_source(context, &arguments, &graph, &backend).await;
        let closed = backend.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    })
}

fn read(context: &Context, words: Vec<String>) -> Step<Arguments> {
    let mut read = Arguments::default();
    let operands = context.parse(FLAGS, words, &mut read)?;
    check(context, &read)?;
    let of_one = read.actions.iter().any(|action| !matches!(action, Action::RemoveAll));
    let mut operands = operands.into_iter();
    let found = (operands.next(), operands.next(), operands.next());
    (read.filename, read.bitmap) = match found {
        (Some(filename), Some(bitmap), None) if of_one || read.actions.is_empty() => {
            (filename, bitmap)
        }
        (Some(filename), None, None) if !of_one && !read.actions.is_empty() => {
            (filename, String::new())
        }
        _ if !of_one && !read.actions.is_empty() => {
            return Err(context.failed("Expecting filename"));
        }
        _ => return Err(context.failed("Expecting filename and bitmap name")),
    };
    // 0 means the default granularity.
    read.granularity = read.granularity.filter(|granularity| *granularity > 0);
    Ok(read)
}

/// Refuses options that cannot be combined, in the order in which QEMU reports them.
fn check(context: &Context, read: &Arguments) -> Step {
    let clash = |message: &str| Err(context.failed(message));
    let adds = read.actions.iter().any(|action| matches!(action, Action::Add));
    let merges = read.actions.iter().any(|action| matches!(action, Action::Merge(_)));
    if read.actions.is_empty() {
        return clash(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        );
    }
    if read.granularity.is_some_and(|granularity| granularity > 0) && !adds {
        return clash("granularity only supported with --add");
    }
    if read.source_format.is_some() && read.source.is_none() {
        return clash("-F only supported with -b");
    }
    if read.source.is_some() && !merges {
        return clash("Merge bitmap source file only supported with --merge");
    }
    Ok(())
}

async fn act_with_source(
    context: &Context,
    arguments: &Arguments,
    graph: &Graph,
    backend: &Backend,
) -> Step {
    let Some(name) = &arguments.source else {
        return act_all(context, arguments, backend, backend).await;
    };
    let image = ImageName::file(name, arguments.source_format.as_deref());
    let options = reading().metadata_only(true).backing(false);
    let source = image.open_or_report(&context.program, graph, options).await?;
    let outcome = act_all(context, arguments, backend, &source).await;
    // The source was opened read-only, so an error of the close is ignored.
    drop(source.close().await);
    outcome
}

async fn act_all(
    context: &Context,
    arguments: &Arguments,
    backend: &Backend,
    source: &Backend,
) -> Step {
    for action in &arguments.actions {
        let acted = act(action, arguments, backend, source).await;
        acted.map_err(|error| {
            let (what, name) = (action.name(), &arguments.bitmap);
            let text = match matches!(action, Action::RemoveAll) {
                true => format!("Operation {what} failed: "),
                false => format!("Operation {what} on bitmap {name} failed: "),
            };
            context.program.report_in(text, &error);
            Exit(1)
        })?;
    }
    Ok(())
}

async fn act(
    action: &Action,
    arguments: &Arguments,
    backend: &Backend,
    source: &Backend,
) -> Result<(), Error> {
    let node = backend.node()?;
    let (graph, name) = (backend.graph(), &arguments.bitmap);
    if let Action::Add = action {
        return graph.add_persistent_bitmap(&node, name, arguments.granularity).await.map(drop);
    }
    if let Action::RemoveAll = action {
        for bitmap in node.bitmaps().snapshot().iter() {
            graph.delete_bitmap(&node, bitmap).await?;
        }
        return Ok(());
    }
    match action {
        Action::Add | Action::RemoveAll => {}
        Action::Remove => {
            let bitmap = node.bitmaps().find(name)?;
            graph.delete_bitmap(&node, &bitmap).await?;
        }
        Action::Clear => drop(graph.clear_bitmap(&node, name).await?),
        Action::Enable => graph.enable_bitmap(&node, name, true).await?,
        Action::Disable => graph.enable_bitmap(&node, name, false).await?,
        Action::Merge(from) => {
            node.bitmaps().find(name)?.check(Checks::CHANGE)?;
            let from = source.node()?.bitmaps().find(from)?;
            from.check(Checks::READ)?;
            graph.merge_bitmap(&node, name, from.everything()?).await?;
        }
    }
    Ok(())
}
