//! `img`: create, inspect, convert, compare and resize disk images, with qemu-img's options and output.
//!
//! Each command is a module with the declarations of its options (`FLAGS`), its description (`PAGE`) and a function
//! `run`. A command prints its own errors. Its error type [`Exit`] contains only the exit code. The commands contain
//! only options and text. The libraries do the work (copying, comparing, formats).

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compact;
mod compare;
mod convert;
mod create;
mod create_options;
mod dd;
mod info;
mod map;
mod measure;
mod rebase;
mod resize;
mod snapshot;
mod source_snapshot;
mod stopped;
mod threads;

use std::fmt::Display;
use std::future::Future;

use oxblk::Cache;
use oxblk_core::Graph;

use crate::flags::command::{hint, misused, parse_or_end};
use crate::flags::page::Page;
use crate::flags::spec::{Value, both};
use crate::flags::{Flag, Line, help, shared};
use crate::gate;
use crate::getopt::Operands;
use crate::image::Unopened;
use crate::objects;
use crate::program::Program;
use crate::suggest;
use crate::text::number;

/// The command ends with this exit code. All messages have been printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(pub(crate) u8);

impl Exit {
    /// A signal such as SIGINT ended the command.
    const INTERRUPTED: Exit = Exit(130);
}

impl From<Unopened> for Exit {
    fn from(_: Unopened) -> Self {
        Self(1)
    }
}

/// The result of a command or of a step of a command.
pub(crate) type Step<T = ()> = Result<T, Exit>;

/// A command of `img`.
struct Command {
    page: &'static Page,
    run: fn(&Context, Vec<String>) -> Step,
}

static COMMANDS: &[Command] = &[
    Command { page: &amend::PAGE, run: amend::run },
    Command { page: &bench::PAGE, run: bench::run },
    Command { page: &bitmap::PAGE, run: bitmap::run },
    Command { page: &check::PAGE, run: check::run },
    Command { page: &commit::PAGE, run: commit::run },
    Command { page: &compact::PAGE, run: compact::run },
    Command { page: &compare::PAGE, run: compare::run },
    Command { page: &convert::PAGE, run: convert::run },
    Command { page: &create::PAGE, run: create::run },
    Command { page: &dd::PAGE, run: dd::run },
    Command { page: &info::PAGE, run: info::run },
    Command { page: &map::PAGE, run: map::run },
    Command { page: &measure::PAGE, run: measure::run },
    Command { page: &rebase::PAGE, run: rebase::run },
    Command { page: &resize::PAGE, run: resize::run },
    Command { page: &snapshot::PAGE, run: snapshot::run },
];

/// The options before the command. The values of these options are not stored.
struct General;

const FLAGS: &[Flag<General>] = &[
    Flag::help(),
    Flag::version(),
    // RUST_LOG controls the log.
    Flag::ignored(both('T', "trace"), Some(Value::text("SPEC"))),
];

/// The description of `img`.
pub(crate) static PAGE: Page = Page {
    path: "img",
    about: "create, inspect, convert, compare and resize disk images",
    usage: "[OPTIONS] COMMAND [ARGUMENTS]",
    operands: &[],
    flags: &FLAGS,
    notes: &[],
    exit_codes: shared::EXIT_CODES,
    examples: &[],
};

/// The descriptions of all commands.
pub(crate) fn pages() -> Vec<&'static Page> {
    COMMANDS.iter().map(|command| command.page).collect()
}

/// The context of a command.
pub(crate) struct Context {
    pub(crate) program: Program,
    /// The description of the command.
    page: &'static Page,
}

/// Runs `img`.
pub(crate) fn run(program: Program, arguments: Vec<String>) -> u8 {
    let line = Line { operands: Operands::EndOptions, ..Line::new(program.called_as(), arguments) };
    let help = || help::text(&PAGE, program.name(), &pages());
    let mut operands = match parse_or_end(&program, line, FLAGS, &mut General, help) {
        Ok(operands) => operands.into_iter(),
        Err(code) => return code,
    };
    let Some(word) = operands.next() else {
        return misused(&program, program.called_as(), "Not enough arguments");
    };
    let Some(command) = COMMANDS.iter().find(|command| command.page.name() == word) else {
        program.error(format_args!("Command not found: {word}"));
        let names = COMMANDS.iter().map(|command| command.page.name());
        suggest::print(&program, &word, names, |name| format!("{} {name}", program.called_as()));
        return hint(program.called_as());
    };
    let context = Context { program, page: command.page };
    match (command.run)(&context, operands.collect()) {
        Ok(()) => 0,
        Err(Exit(code)) => code,
    }
}

/// Whether a command with this name exists.
pub(crate) fn has_command(name: &str) -> bool {
    COMMANDS.iter().any(|command| command.page.name() == name)
}

impl Context {
    /// Reads the command line: stores the options in `into` and returns the operands.
    fn parse<A>(&self, flags: &[Flag<A>], words: Vec<String>, into: &mut A) -> Step<Vec<String>> {
        let called_as = self.called_as();
        let help = || {
            let name = format!("{} {}", self.program.name(), self.page.name());
            help::text(self.page, &name, &[])
        };
        parse_or_end(&self.program, Line::new(&called_as, words), flags, into, help).map_err(Exit)
    }

    /// The text that the user typed to run the command.
    fn called_as(&self) -> String {
        format!("{} {}", self.program.called_as(), self.page.name())
    }

    /// Prints an error about the command line, and a line that refers to `--help`.
    fn misused(&self, message: impl Display) -> Exit {
        Exit(misused(&self.program, &self.called_as(), message))
    }

    /// Prints an error.
    fn failed(&self, message: impl Display) -> Exit {
        self.program.error(message);
        Exit(1)
    }

    /// Prints an error of the block layer.
    fn error(&self, error: &oxblk_core::Error) -> Exit {
        self.program.report(error);
        Exit(1)
    }

    /// Parses a number within bounds. If the number is invalid, prints an error and returns the exit code.
    fn sized(&self, what: &str, text: &str, min: u64, max: u64) -> Step<u64> {
        number::sized(what, text, min, max).map_err(|message| self.failed(message))
    }

    /// Parses a size or offset.
    fn bytes(&self, what: &str, text: &str) -> Step<u64> {
        number::bytes(what, text).map_err(|message| self.failed(message))
    }

    /// The cache mode with this name, or write-back without a name. `what` is the name of the option in the message.
    fn cache(&self, what: &str, name: Option<&str>) -> Step<Cache> {
        let Some(name) = name else { return Ok(Cache::Writeback) };
        let unknown = || self.failed(format_args!("Invalid {what} option: {name}"));
        Cache::parse(name).ok_or_else(unknown)
    }

    /// Runs the asynchronous part of the command on this thread.
    fn block_on(&self, work: impl Future<Output = Step>) -> Step {
        self.run_to_end(work).unwrap_or(Err(Exit(1)))
    }

    /// Runs `work` on this thread as an I/O thread. `None`: the I/O thread could not be started, and the error has been
    /// printed.
    fn run_to_end<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.program.run_to_end(work)
    }
}

/// A graph with all drivers, the objects of the command line, and the gate that the user chose.
pub(crate) fn graph() -> Graph {
    Graph::with_objects(oxblk::drivers(), gate::chosen(), objects::all().clone())
}
