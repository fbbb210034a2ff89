//! `img snapshot`: internal snapshots.

use std::time::{SystemTime, UNIX_EPOCH};

use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, ChildIdx, Errno, Error, names};

use super::{Context, Step, graph, objects};
use crate::getopt::{Found, Opt, both, long};
use crate::image::Image;
use crate::program::out;
use crate::text::snapshot;

/// Maximum length of a stored name, in bytes.
const MAX_NAME: usize = 255;

const OPTIONS: &[Opt] = &[
    both('h', "help", false),
    both('q', "quiet", false),
    long('O', "object", true),
    both('f', "format", true),
    long('I', "image-opts", false),
    both('U', "force-share", false),
    both('l', "list", false),
    both('a', "apply", true),
    both('c', "create", true),
    both('d', "delete", true),
];

/// The action of the command.
enum Action {
    List,
    Create(String),
    Apply(String),
    Delete(String),
}

struct Arguments {
    format: Option<String>,
    image_options: bool,
    share: bool,
    action: Action,
    filename: String,
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let name = &arguments.filename;
        let image = match &arguments.action {
            Action::List => Image::read_only(name),
            _ => Image::writable(name),
        };
        let image = image
            .format(arguments.format.as_deref())
            .options_if(arguments.image_options)
            .share_if(arguments.share);
        let backend = image.open_or_say(&context.program, &graph()).await?;
        let outcome = act(context, &arguments.action, &image, &backend).await;
        let closed = backend.close().await;
        outcome?;
        closed.map_err(|error| context.error(&error))
    })
}

fn read(context: &Context, arguments: Vec<String>) -> Step<Arguments> {
    let mut parser = context.parser(arguments, OPTIONS);
    let (mut format, mut image_options, mut share, mut action) = (None, false, false, None);
    while let Some(Found { id, value }) = context.next(&mut parser)? {
        let wanted = match id {
            'q' => continue,
            'f' => {
                format = Some(value);
                continue;
            }
            'I' => {
                image_options = true;
                continue;
            }
            'U' => {
                share = true;
                continue;
            }
            'l' => Action::List,
            'c' => Action::Create(value),
            'a' => Action::Apply(value),
            'd' => Action::Delete(value),
            _ => {
                objects::define(&value).map_err(|text| context.failed(text))?;
                continue;
            }
        };
        if action.replace(wanted).is_some() {
            return Err(context.misused("Cannot mix '-l', '-a', '-c', '-d'"));
        }
    }
    let operands = parser.operands();
    let [filename] = operands.as_slice() else {
        return Err(context.misused("Expecting one image file name"));
    };
    let action = action.unwrap_or(Action::List);
    Ok(Arguments { format, image_options, share, action, filename: filename.clone() })
}

async fn act(context: &Context, action: &Action, image: &Image<'_>, backend: &Backend) -> Step {
    let failed = |what: &str, name: &str, error: &Error| {
        context.failed(format_args!("Could not {what} snapshot '{name}': {error}"))
    };
    match action {
        Action::List => {
            // Treat an error as an empty list: the format may have no snapshots.
            let list = backend.snapshots().await.unwrap_or_default();
            if !list.is_empty() {
                out(format_args!("{}", snapshot::list(&list)));
            }
            Ok(())
        }
        Action::Create(name) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
            let name_stored = shortened(name);
            let new = SnapshotInfo { name: name_stored, date, ..SnapshotInfo::default() };
            let made = backend.create_snapshot(&new).await;
            made.map_err(|error| failed("create", name, &error))
        }
        Action::Apply(name) => {
            let applied = apply(backend, image, name).await;
            applied.map_err(|error| failed("apply", name, &error))
        }
        Action::Delete(name) => {
            let deleted = delete(backend, name).await;
            deleted.map_err(|error| failed("delete", name, &error))
        }
    }
}

/// The name as QEMU's tools store it: its first 255 bytes.
fn shortened(name: &str) -> String {
    let bytes = names::to_bytes(name);
    names::to_text(bytes.get(..MAX_NAME).unwrap_or(&bytes))
}

async fn apply(backend: &Backend, image: &Image<'_>, name: &str) -> Result<(), Error> {
    let Ok(node) = backend.snapshot_node() else {
        // QEMU's tools open the image a second time here, and so print the warning a second time.
        image.warn_of_probed_raw(backend);
        return Err(Error::unsupported("Block driver does not support snapshots"));
    };
    let has_data_file = node.child(ChildIdx::DATA).is_some();
    let name = name.to_owned();
    let choose = move |list: &[SnapshotInfo]| {
        let by_id = list.iter().find(|snapshot| snapshot.id == name);
        let found = by_id.or_else(|| list.iter().find(|snapshot| snapshot.name == name));
        found.map(|snapshot| snapshot.id.clone()).ok_or_else(|| {
            let errno = if has_data_file { Errno::OPNOTSUPP } else { Errno::NOENT };
            Error::from_errno(errno).prefix("Failed to load snapshot")
        })
    };
    backend.apply_snapshot_by(choose).await
}

async fn delete(backend: &Backend, name: &str) -> Result<(), Error> {
    let not_found = || Error::invalid("snapshot not found");
    // A format without snapshots has an empty list.
    backend.snapshot_node().map_err(|_| not_found())?;
    let name = name.to_owned();
    let choose = move |list: &[SnapshotInfo]| {
        let found = list.iter().find(|snapshot| snapshot.name == name);
        found.map(|snapshot| snapshot.id.clone()).ok_or_else(not_found)
    };
    backend.delete_snapshot_by(choose).await
}
