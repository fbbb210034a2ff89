//! `img bitmap`: persistent dirty bitmaps.

use oxblk_core::bitmap::Checks;
use oxblk_core::{Backend, Error, Graph};

use super::{Context, Exit, Step, graph, objects};
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    long('O', "object", true),
    long('I', "image-opts", false),
    long('1', "add", false),
    long('2', "remove", false),
    long('7', "remove-all", false).in_full(),
    long('3', "clear", false),
    long('4', "enable", false),
    long('5', "disable", false),
    long('6', "merge", true),
    both('g', "granularity", true),
    both('b', "source-file", true),
    both('F', "source-format", true),
    both('f', "format", true).in_full(),
];

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

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let graph = graph();
        let mut image = Image::writable(&arguments.filename)
            .format(arguments.format.as_deref())
            .options_if(arguments.image_options);
        // The backing file is not read. It may be missing, or it may be the image whose bitmap is merged.
        image.flags.no_backing = true;
        let backend = image.open_or_say(&context.program, &graph).await?;
        let outcome = act_with_source(context, &arguments, &graph, &backend).await;
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
            'g' => read.granularity = Some(context.bytes("granularity", &value)?),
            '1' => read.actions.push(Action::Add),
            '2' => read.actions.push(Action::Remove),
            '7' => read.actions.push(Action::RemoveAll),
            '3' => read.actions.push(Action::Clear),
            '4' => read.actions.push(Action::Enable),
            '5' => read.actions.push(Action::Disable),
            '6' => read.actions.push(Action::Merge(value)),
            'b' => read.source = Some(value),
            'F' => read.source_format = Some(value),
            _ => objects::define(&value).map_err(|text| context.failed(text))?,
        }
    }
    check(context, &read)?;
    let of_one = read.actions.iter().any(|action| !matches!(action, Action::RemoveAll));
    let mut operands = parser.operands().into_iter();
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

/// Refuses options that exclude one another, in the order in which QEMU reports them.
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
    let mut image = Image::read_only(name).format(arguments.source_format.as_deref());
    image.flags.no_io = true;
    image.flags.no_backing = true;
    let source = image.open_or_say(&context.program, graph).await?;
    let outcome = act_all(context, arguments, backend, &source).await;
    // The source was only read, so an error on closing it is ignored.
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
