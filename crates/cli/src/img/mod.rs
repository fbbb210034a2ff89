//! `img`: create, inspect, convert, compare and resize disk images, with qemu-img's options and output.
//!
//! Each command is a module with the declarations of its options (`FLAGS`), its description (`PAGE`) and a function `run`. A command prints its own errors and returns
//! [`Exit`], which contains only the exit code, so that it can use `?`. The commands contain only options and text. The
//! libraries do the work (copying, comparing, formats).

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
mod threads;

use std::fmt::Display;
use std::future::Future;

use oxblk_core::Graph;

use crate::cache::CacheMode;
use crate::flags::page::Page;
use crate::flags::spec::{Value, both};
use crate::flags::{self, Flag, Line, Stop, help, shared};
use crate::gate;
use crate::getopt::Operands;
use crate::image::Unopened;
use crate::objects;
use crate::program::{Program, err, out};
use crate::suggest;
use crate::text::number;

/// The command ends with this exit code. All messages have been printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit(pub(crate) u8);

impl Exit {
    /// Ended by a signal such as SIGINT.
    const INTERRUPTED: Exit = Exit(130);
}

impl From<Unopened> for Exit {
    fn from(_: Unopened) -> Self {
        Self(1)
    }
}

/// The outcome of a command or of a step of it.
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

/// The arguments in front of the command. None of them has a value to keep.
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
    let mut operands = match flags::parse(line, FLAGS, &mut General) {
        Ok(operands) => operands.into_iter(),
        Err(Stop::Help) => {
            out(format_args!("{}", help::text(&PAGE, program.name(), &pages())));
            return 0;
        }
        Err(Stop::Version) => {
            program.print_version();
            return 0;
        }
        Err(Stop::Invalid(fault)) => {
            err(format_args!("{fault}\n"));
            return hint_at_overview(&program);
        }
        Err(Stop::Refused(refusal, code)) => {
            program.refuse(&refusal);
            return code;
        }
    };
    let Some(word) = operands.next() else {
        return top_level_error(&program, "Not enough arguments");
    };
    let Some(command) = COMMANDS.iter().find(|command| command.page.name() == word) else {
        program.error(format_args!("Command not found: {word}"));
        let names = COMMANDS.iter().map(|command| command.page.name());
        suggest::print(&program, &word, names, |name| format!("{} {name}", program.called_as()));
        return hint_at_overview(&program);
    };
    let context = Context { program, page: command.page };
    match (command.run)(&context, operands.collect()) {
        Ok(()) => 0,
        Err(Exit(code)) => code,
    }
}

/// Whether a command has that name.
pub(crate) fn has_command(name: &str) -> bool {
    COMMANDS.iter().any(|command| command.page.name() == name)
}

fn top_level_error(program: &Program, message: impl Display) -> u8 {
    program.error(message);
    hint_at_overview(program)
}

fn hint_at_overview(program: &Program) -> u8 {
    err(format_args!("Try '{} --help' for more info\n", program.called_as()));
    1
}

impl Context {
    /// Reads the command line: stores the options in `into` and returns the operands.
    fn parse<A>(&self, flags: &[Flag<A>], words: Vec<String>, into: &mut A) -> Step<Vec<String>> {
        let name = format!("{} {}", self.program.called_as(), self.page.name());
        flags::parse(Line::new(&name, words), flags, into).map_err(|stop| match stop {
            Stop::Help => {
                let name = format!("{} {}", self.program.name(), self.page.name());
                out(format_args!("{}", help::text(self.page, &name, &[])));
                Exit(0)
            }
            Stop::Version => {
                self.program.print_version();
                Exit(0)
            }
            Stop::Invalid(fault) => {
                err(format_args!("{fault}\n"));
                if let Some(word) = &fault.unknown {
                    let shown = |word: &str| format!("--{word}");
                    suggest::print(&self.program, word, flags::words(flags).into_iter(), shown);
                }
                self.hint_at_help()
            }
            Stop::Refused(refusal, code) => {
                self.program.refuse(&refusal);
                if refusal.misused {
                    self.hint_at_help();
                }
                Exit(code)
            }
        })
    }

    /// Prints an error in the command line, with a hint to `--help`.
    fn misused(&self, message: impl Display) -> Exit {
        self.program.error(message);
        self.hint_at_help()
    }

    fn hint_at_help(&self) -> Exit {
        let called_as = self.program.called_as();
        err(format_args!("Try '{called_as} {} --help' for more info\n", self.page.name()));
        Exit(1)
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

    /// Parses a number within bounds. If it is invalid, prints an error and returns the exit code.
    fn sized(&self, what: &str, text: &str, min: u64, max: u64) -> Step<u64> {
        number::sized(what, text, min, max).map_err(|message| self.failed(message))
    }

    /// Parses a size or offset.
    fn bytes(&self, what: &str, text: &str) -> Step<u64> {
        number::bytes(what, text).map_err(|message| self.failed(message))
    }

    /// The cache mode of that name, or write-back. `what` names the option in the message.
    fn cache(&self, what: &str, name: Option<&str>) -> Step<CacheMode> {
        let Some(name) = name else { return Ok(CacheMode::WRITEBACK) };
        let unknown = || self.failed(format_args!("Invalid {what} option: {name}"));
        CacheMode::parse(name).ok_or_else(unknown)
    }

    /// Runs the asynchronous part of the command on this thread.
    fn block_on(&self, work: impl Future<Output = Step>) -> Step {
        self.run_to_end(work).unwrap_or(Err(Exit(1)))
    }

    /// Runs `work` on this thread. `None`: that failed, and the error has been printed.
    fn run_to_end<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.program.run_to_end(work)
    }
}

/// A graph with all drivers, the secrets of the command line, and the gate that the user chose.
pub(crate) fn graph() -> Graph {
    Graph::with_secrets(oxblk::drivers(), gate::chosen(), objects::secrets().clone())
}
