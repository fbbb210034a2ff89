//! `img snapshot`: internal snapshots.

use std::time::{SystemTime, UNIX_EPOCH};

use oxblk::{qapi, qemu_json};
use oxblk_core::snapshot::SnapshotInfo;
use oxblk_core::{Backend, ChildIdx, Errno, Error, names};

use super::{Context, Exit, Step, graph};
use crate::flags::page::{Example, Page};
use crate::flags::refusal::Refusal;
use crate::flags::spec::{Value, both};
use crate::flags::{Flag, Stored, shared};
use crate::image::{ImageName, reading, writing};
use crate::program::out;
use crate::text::snapshot;

/// Maximum length of a stored name, in bytes.
const MAX_NAME: usize = 255;

const FLAGS: &[Flag<Arguments>] = &[
    Flag::help(),
    Flag::ignored(both('q', "quiet").common(), None),
    shared::object(),
    shared::format(|a| &mut a.format),
    shared::image_opts(|a| &mut a.image_options),
    shared::force_share(|a| &mut a.share),
    shared::output_in_full(|a, text| shared::set_json(&mut a.json, &text)),
    Flag::switch_with(both('l', "list"), "list the snapshots (the default)", |a| {
        a.choose(Action::List)
    }),
    Flag::value(
        both('a', "apply"),
        Value::text("NAME"),
        "replace the contents of the disk by those of the snapshot with this id or name",
        |a, name| a.choose(Action::Apply(name)),
    ),
    Flag::value(
        both('c', "create"),
        Value::text("NAME"),
        "create a snapshot of the current contents",
        |a, name| a.choose(Action::Create(name)),
    ),
    Flag::value(both('d', "delete"), Value::text("NAME"), "delete the snapshot", |a, name| {
        a.choose(Action::Delete(name))
    }),
    shared::untrusted(),
];

/// The description of the command.
pub(super) static PAGE: Page = Page {
    path: "img snapshot",
    about: "list, create, apply and delete internal snapshots",
    usage: "[OPTIONS] [-l | -c NAME | -a NAME | -d NAME] FILENAME",
    operands: &[Value::FILENAME],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[
        Example { about: "create a snapshot", arguments: "-c before-update disk.qcow2" },
        Example { about: "go back to it", arguments: "-a before-update disk.qcow2" },
    ],
};

/// The action of the command.
enum Action {
    List,
    Create(String),
    Apply(String),
    Delete(String),
}

#[derive(Default)]
struct Arguments {
    format: Option<String>,
    image_options: bool,
    share: bool,
    /// Print the list as JSON.
    json: bool,
    /// `None`: list the snapshots.
    action: Option<Action>,
    filename: String,
}

impl Arguments {
    /// Stores the action. A second action is refused.
    fn choose(&mut self, action: Action) -> Stored {
        match self.action.replace(action) {
            None => Ok(()),
            Some(_) => Err(Refusal::misused("Cannot mix '-l', '-a', '-c', '-d'")),
        }
    }
}

/// Runs the command.
pub(super) fn run(context: &Context, arguments: Vec<String>) -> Step {
    let arguments = read(context, arguments)?;
    context.block_on(async {
        let name = &arguments.filename;
        let action = arguments.action.as_ref().unwrap_or(&Action::List);
        let options = match action {
            Action::List => reading(),
            _ => writing(),
        };
        let options = options.force_share(arguments.share);
        let image =
            ImageName::file(name, arguments.format.as_deref()).options_if(arguments.image_options);
        let backend = image.open_or_report(&context.program, &graph(), options).await?;
        let outcome = act(context, &arguments, action, image, &backend).await;
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

async fn act(
    context: &Context,
    arguments: &Arguments,
    action: &Action,
    image: ImageName<'_>,
    backend: &Backend,
) -> Step {
    let failed = |what: &str, name: &str, error: &Error| {
        context.failed(format_args!("Could not {what} snapshot '{name}': {error}"))
    };
    match action {
        Action::List => {
            // A format without snapshots has an empty list.
            let list = match backend.snapshot_node() {
                Ok(_) => backend.snapshots().await,
                Err(_) => Ok(Vec::new()),
            };
            let list = list.map_err(|error| {
                context.program.report_in("Could not list the snapshots: ", &error);
                Exit(1)
            })?;
            if arguments.json {
                let list = list.iter().map(qapi::snapshot_info).collect();
                out(format_args!("{}\n", qemu_json::pretty(&list)));
            } else if !list.is_empty() {
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

/// The first 255 bytes of the name. QEMU's tools store only these bytes.
fn shortened(name: &str) -> String {
    let bytes = names::to_bytes(name);
    names::to_text(bytes.get(..MAX_NAME).unwrap_or(&bytes))
}

async fn apply(backend: &Backend, image: ImageName<'_>, name: &str) -> Result<(), Error> {
    let Ok(node) = backend.snapshot_node() else {
        // QEMU's tools open the image a second time here, so they print the warning a second time.
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
