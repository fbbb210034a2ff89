//! The table of commands: names, arguments and help texts.

use oxblk_core::BoxFuture;

use super::Outcome;
use super::commands::{self, Call};
use super::session::Session;
use crate::flags::page::{Note, Page};
use crate::flags::{Flag, help};

/// Minimum and maximum number of arguments; `None`: no maximum.
type Count = (usize, Option<usize>);

/// A command.
pub(super) struct Command {
    /// The description. Its path is the name of the command; its usage contains the arguments in the form of the
    /// one-line help.
    pub(super) page: Page,
    /// A short name.
    pub(super) alias: Option<&'static str>,
    pub(super) count: Count,
    pub(super) needs: Needs,
    pub(super) run: for<'a> fn(&'a Session, Call<'a>) -> BoxFuture<'a, Outcome>,
}

/// The kind of image that a command needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    Image,
    WritableImage,
}

impl Command {
    /// The one-line help.
    pub(super) fn line(&self) -> String {
        let Page { path, usage, about, .. } = self.page;
        let space = if usage.is_empty() { "" } else { " " };
        format!("{path}{space}{usage} -- {about}")
    }

    /// The help after the one-line help. Empty if the command has only the one-line help.
    pub(super) fn more(&self) -> String {
        let mut more = String::new();
        for note in self.page.notes {
            if let Note::Text(text) = note {
                more.push_str(&help::indented(text, 1));
            }
        }
        for spec in self.page.flags.specs() {
            let letter = spec.names.short.unwrap_or_default();
            more.push_str(&format!(" -{letter} -- {}\n", spec.help()));
        }
        more
    }
}

/// The empty table of a command without options.
const NO_FLAGS: &[Flag<()>] = &[];

macro_rules! command {
    (
        $name:literal,
        $alias:expr,
        $usage:literal,
        $about:literal,
        $count:expr,
        $needs:ident,
        $run:path,
        $flags:path,
        $notes:expr
    ) => {
        Command {
            page: Page {
                path: $name,
                about: $about,
                usage: $usage,
                operands: &[],
                flags: &$flags,
                notes: $notes,
                exit_codes: &[],
                examples: &[],
            },
            alias: $alias,
            count: $count,
            needs: Needs::$needs,
            run: |session, call| Box::pin($run(session, call)),
        }
    };
}

/// All commands, sorted by name.
pub(super) static COMMANDS: &[Command] = &[
    command!(
        "abort",
        None,
        "",
        "simulate a program crash using abort(3)",
        (0, Some(0)),
        Nothing,
        commands::control::abort,
        NO_FLAGS,
        &[]
    ),
    command!(
        "aio_flush",
        None,
        "",
        "completes all outstanding aio requests",
        (0, Some(0)),
        Image,
        commands::aio::flush,
        NO_FLAGS,
        &[]
    ),
    command!(
        "aio_read",
        None,
        "[-Ciqrv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
        (2, None),
        Image,
        commands::aio::read,
        commands::aio::READ,
        &[
            Note::Text(
                "Starts a read and continues with the next command; aio_flush waits for the read."
            ),
            Note::Text(
                "Several lengths make a scattered read. An error of the request is not an error of the command."
            ),
        ]
    ),
    command!(
        "aio_write",
        None,
        "[-Cfiqruz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
        (2, None),
        WritableImage,
        commands::aio::write,
        commands::aio::WRITE,
        &[
            Note::Text(
                "Starts a write and continues with the next command; aio_flush waits for the write."
            ),
            Note::Text(
                "Several lengths make a gathered write. An error of the request is not an error of the command."
            ),
        ]
    ),
    command!(
        "alloc",
        Some("a"),
        "offset [count]",
        "checks if offset is allocated in the file",
        (1, Some(2)),
        Image,
        commands::status::alloc,
        NO_FLAGS,
        &[]
    ),
    command!(
        "break",
        None,
        "event tag",
        "sets a breakpoint on event and tags the stopped request as tag",
        (2, Some(2)),
        Image,
        commands::breakpoints::set,
        NO_FLAGS,
        &[]
    ),
    command!(
        "close",
        Some("c"),
        "",
        "close the current open file",
        (0, Some(0)),
        Image,
        commands::control::close,
        NO_FLAGS,
        &[]
    ),
    command!(
        "discard",
        Some("d"),
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        (2, None),
        WritableImage,
        commands::write::discard,
        commands::write::DISCARD,
        &[]
    ),
    command!(
        "flush",
        Some("f"),
        "",
        "flush all in-core file state to disk",
        (0, Some(0)),
        Image,
        commands::write::flush,
        NO_FLAGS,
        &[]
    ),
    command!(
        "help",
        Some("?"),
        "[command]",
        "help for one or all commands",
        (0, Some(1)),
        Nothing,
        commands::control::help,
        NO_FLAGS,
        &[]
    ),
    command!(
        "info",
        Some("i"),
        "",
        "prints information about the current file",
        (0, Some(0)),
        Image,
        commands::status::info,
        NO_FLAGS,
        &[]
    ),
    command!(
        "length",
        Some("l"),
        "",
        "gets the length of the current file",
        (0, Some(0)),
        Image,
        commands::status::length,
        NO_FLAGS,
        &[]
    ),
    command!(
        "map",
        None,
        "",
        "prints the allocated areas of a file",
        (0, Some(0)),
        Image,
        commands::status::map,
        NO_FLAGS,
        &[]
    ),
    command!(
        "open",
        Some("o"),
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
        (1, None),
        Nothing,
        commands::open::open,
        commands::open::OPEN,
        &[]
    ),
    command!(
        "quit",
        Some("q"),
        "",
        "exit the program",
        (0, None),
        Nothing,
        commands::control::quit,
        NO_FLAGS,
        &[]
    ),
    command!(
        "read",
        Some("r"),
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
        (2, None),
        Image,
        commands::read::read,
        commands::read::READ,
        &[]
    ),
    command!(
        "readv",
        None,
        "[-Cqrv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
        (2, None),
        Image,
        commands::read::readv,
        commands::read::READV,
        &[Note::Text("Several lengths make a scattered read."),]
    ),
    command!(
        "remove_break",
        None,
        "tag",
        "remove a breakpoint by tag",
        (1, Some(1)),
        Image,
        commands::breakpoints::remove,
        NO_FLAGS,
        &[]
    ),
    command!(
        "reopen",
        None,
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
        (0, None),
        Image,
        commands::open::reopen,
        commands::open::REOPEN,
        &[]
    ),
    command!(
        "resume",
        None,
        "tag",
        "resumes the request tagged as tag",
        (1, Some(1)),
        Image,
        commands::breakpoints::resume,
        NO_FLAGS,
        &[]
    ),
    command!(
        "sigraise",
        None,
        "signal",
        "raises a signal",
        (1, Some(1)),
        Nothing,
        commands::control::sigraise,
        NO_FLAGS,
        &[Note::Text("The signal is a number."),]
    ),
    command!(
        "sleep",
        None,
        "",
        "waits for the given value in milliseconds",
        (1, Some(1)),
        Nothing,
        commands::control::sleep,
        NO_FLAGS,
        &[]
    ),
    command!(
        "truncate",
        Some("t"),
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
        (1, Some(3)),
        WritableImage,
        commands::write::truncate,
        commands::write::TRUNCATE,
        &[]
    ),
    command!(
        "wait_break",
        None,
        "tag",
        "waits for the suspension of a request",
        (1, Some(1)),
        Image,
        commands::breakpoints::wait,
        NO_FLAGS,
        &[]
    ),
    command!(
        "write",
        Some("w"),
        "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
        (2, None),
        WritableImage,
        commands::write::write,
        commands::write::WRITE,
        &[]
    ),
    command!(
        "writev",
        None,
        "[-Cfqr] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        (2, None),
        WritableImage,
        commands::write::writev,
        commands::write::WRITEV,
        &[Note::Text("Several lengths make a gathered write."),]
    ),
];

/// The command with a name or alias.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.page.path == name || command.alias == Some(name))
}
