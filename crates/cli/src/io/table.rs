//! The table of commands: names, arguments and help texts.

use oxblk_core::BoxFuture;

use super::Outcome;
use super::commands::{self, Call};
use super::session::Session;

/// Minimum and maximum number of arguments; `None`: no maximum.
type Count = (usize, Option<usize>);

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    /// A short name.
    pub(super) alias: Option<&'static str>,
    /// Arguments as the one-line help shows them.
    pub(super) arguments: &'static str,
    pub(super) about: &'static str,
    /// Further help.
    pub(super) more: &'static str,
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
        let Self { name, arguments, about, .. } = self;
        let space = if arguments.is_empty() { "" } else { " " };
        format!("{name}{space}{arguments} -- {about}")
    }
}

macro_rules! command {
    ($name:literal, $alias:expr, $arguments:literal, $about:literal, $count:expr, $needs:ident, $run:path, $more:literal) => {
        Command {
            name: $name,
            alias: $alias,
            arguments: $arguments,
            about: $about,
            more: $more,
            count: $count,
            needs: Needs::$needs,
            run: |session, call| Box::pin($run(session, call)),
        }
    };
}

/// All commands by name.
pub(super) static COMMANDS: &[Command] = &[
    command!(
        "abort",
        None,
        "",
        "simulate a program crash using abort(3)",
        (0, Some(0)),
        Nothing,
        commands::control::abort,
        ""
    ),
    command!(
        "aio_flush",
        None,
        "",
        "completes all outstanding aio requests",
        (0, Some(0)),
        Image,
        commands::aio::flush,
        ""
    ),
    command!(
        "aio_read",
        None,
        "[-Ciqrv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
        (2, None),
        Image,
        commands::aio::read,
        " Starts a read and goes on with the next command; aio_flush waits for it.
 Several lengths make a scattered read. Its failure does not count as one of the
 command.
 -C -- report numbers only
 -i -- only count the request, as an invalid one
 -P -- the data must be all this byte
 -q -- no report
 -r -- accepted; changes nothing
 -v -- show the data
"
    ),
    command!(
        "aio_write",
        None,
        "[-Cfiqruz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
        (2, None),
        WritableImage,
        commands::aio::write,
        " Starts a write and goes on with the next command; aio_flush waits for it.
 Several lengths make a gathered write. Its failure does not count as one of the
 command.
 -C -- report numbers only
 -f -- durable when it completes
 -i -- only count the request, as an invalid one
 -P -- the byte to write (0xcd)
 -q -- no report
 -r -- accepted; changes nothing
 -u -- with -z, space may be given back
 -z -- write zeroes
"
    ),
    command!(
        "alloc",
        Some("a"),
        "offset [count]",
        "checks if offset is allocated in the file",
        (1, Some(2)),
        Image,
        commands::status::alloc,
        ""
    ),
    command!(
        "close",
        Some("c"),
        "",
        "close the current open file",
        (0, Some(0)),
        Image,
        commands::control::close,
        ""
    ),
    command!(
        "discard",
        Some("d"),
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        (2, None),
        WritableImage,
        commands::write::discard,
        " -C -- report numbers only
 -q -- no report
"
    ),
    command!(
        "flush",
        Some("f"),
        "",
        "flush all in-core file state to disk",
        (0, Some(0)),
        Image,
        commands::write::flush,
        ""
    ),
    command!(
        "help",
        Some("?"),
        "[command]",
        "help for one or all commands",
        (0, Some(1)),
        Nothing,
        commands::control::help,
        ""
    ),
    command!(
        "info",
        Some("i"),
        "",
        "prints information about the current file",
        (0, Some(0)),
        Image,
        commands::status::info,
        ""
    ),
    command!(
        "length",
        Some("l"),
        "",
        "gets the length of the current file",
        (0, Some(0)),
        Image,
        commands::status::length,
        ""
    ),
    command!(
        "map",
        None,
        "",
        "prints the allocated areas of a file",
        (0, Some(0)),
        Image,
        commands::status::map,
        ""
    ),
    command!(
        "open",
        Some("o"),
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
        (1, None),
        Nothing,
        commands::open::open,
        " -d -- whether discards reach the host: unmap, ignore
 -i -- threads, native or io_uring
 -k -- the same as -i native
 -n -- the same as -t none
 -o -- driver options
 -r -- read-only
 -t -- cache mode
 -U -- do not mind that others write to it
"
    ),
    command!(
        "quit",
        Some("q"),
        "",
        "exit the program",
        (0, None),
        Nothing,
        commands::control::quit,
        ""
    ),
    command!(
        "read",
        Some("r"),
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
        (2, None),
        Image,
        commands::read::read,
        " -C -- report numbers only
 -l -- with -P, check so many bytes only
 -p -- accepted; changes nothing
 -P -- the data must be all this byte
 -q -- no report
 -r -- accepted; changes nothing
 -s -- with -P, begin checking there
 -v -- show the data
"
    ),
    command!(
        "readv",
        None,
        "[-Cqrv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
        (2, None),
        Image,
        commands::read::readv,
        " Several lengths make a scattered read.
 -C -- report numbers only
 -P -- the data must be all this byte
 -q -- no report
 -r -- accepted; changes nothing
 -v -- show the data
"
    ),
    command!(
        "reopen",
        None,
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
        (0, None),
        Image,
        commands::open::reopen,
        " -c -- cache mode
 -o -- driver options
 -r -- read-only
 -w -- writable
"
    ),
    command!(
        "sigraise",
        None,
        "signal",
        "raises a signal",
        (1, Some(1)),
        Nothing,
        commands::control::sigraise,
        " The signal is given by its number.\n"
    ),
    command!(
        "sleep",
        None,
        "",
        "waits for the given value in milliseconds",
        (1, Some(1)),
        Nothing,
        commands::control::sleep,
        ""
    ),
    command!(
        "truncate",
        Some("t"),
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
        (1, Some(3)),
        WritableImage,
        commands::write::truncate,
        ""
    ),
    command!(
        "write",
        Some("w"),
        "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
        (2, None),
        WritableImage,
        commands::write::write,
        " -c -- compressed
 -C -- report numbers only
 -f -- durable when it completes
 -n -- with -z, fail rather than write zeroes as data
 -p -- accepted; changes nothing
 -P -- the byte to write (0xcd)
 -q -- no report
 -r -- accepted; changes nothing
 -s -- a file whose bytes are written again and again
 -u -- with -z, space may be given back
 -z -- write zeroes
"
    ),
    command!(
        "writev",
        None,
        "[-Cfqr] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        (2, None),
        WritableImage,
        commands::write::writev,
        " Several lengths make a gathered write.
 -C -- report numbers only
 -f -- durable when it completes
 -P -- the byte to write (0xcd)
 -q -- no report
 -r -- accepted; changes nothing
"
    ),
];

/// The command with a name or alias.
pub(super) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name || command.alias == Some(name))
}
