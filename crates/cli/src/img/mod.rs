//! `img`: create, inspect, convert, compare and resize disk images, with qemu-img's options and output.
//!
//! Each command is a module with a table of options and a function `run`. A command prints its own errors and returns
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
mod help;
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

use crate::gate;
use crate::getopt::{Fault, Found, Operands, Opt, Parser, both};
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
    name: &'static str,
    about: &'static str,
    run: fn(&Context, Vec<String>) -> Step,
}

const COMMANDS: &[Command] = &[
    Command { name: "amend", about: "change options of an image", run: amend::run },
    Command { name: "bench", about: "measure how fast an image is", run: bench::run },
    Command { name: "bitmap", about: "keep record of what changes in an image", run: bitmap::run },
    Command { name: "check", about: "check that an image is consistent", run: check::run },
    Command {
        name: "commit",
        about: "write what an overlay holds into its backing file",
        run: commit::run,
    },
    Command {
        name: "compact",
        about: "give space that an image does not use back to the host",
        run: compact::run,
    },
    Command { name: "compare", about: "tell whether two images hold the same", run: compare::run },
    Command { name: "convert", about: "copy images, also to another format", run: convert::run },
    Command { name: "create", about: "make a new image", run: create::run },
    Command { name: "dd", about: "copy a part of an image block by block", run: dd::run },
    Command { name: "info", about: "tell what an image is", run: info::run },
    Command { name: "map", about: "tell where an image's data lies", run: map::run },
    Command { name: "measure", about: "tell how large a new image would be", run: measure::run },
    Command { name: "rebase", about: "give an image another backing file", run: rebase::run },
    Command { name: "resize", about: "change the size of an image", run: resize::run },
    Command {
        name: "snapshot",
        about: "keep states of a disk inside its image",
        run: snapshot::run,
    },
];

const OPTIONS: &[Opt] =
    &[both('h', "help", false), both('V', "version", false), both('T', "trace", true)];

/// The context of a command.
pub(crate) struct Context {
    pub(crate) program: Program,
    /// The command's name.
    pub(crate) command: &'static str,
}

/// Runs `img`.
pub(crate) fn run(program: Program, arguments: Vec<String>) -> u8 {
    let mut parser = Parser::new(program.called_as(), arguments, OPTIONS, Operands::EndOptions);
    loop {
        match parser.next() {
            Ok(Some(Found { id: 'h', .. })) => {
                help::overview(&program);
                return 0;
            }
            Ok(Some(Found { id: 'V', .. })) => {
                out(format_args!(
                    "{} version {}\n",
                    program.name(),
                    crate::version_as(program.name())
                ));
                return 0;
            }
            // `--trace` has no effect: RUST_LOG controls the log.
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(Fault { text, .. }) => {
                err(format_args!("{text}\nTry '{} --help' for more info\n", program.called_as()));
                return 1;
            }
        }
    }
    let mut operands = parser.operands().into_iter();
    let Some(word) = operands.next() else {
        return top_level_error(&program, "Not enough arguments");
    };
    let Some(command) = COMMANDS.iter().find(|command| command.name == word) else {
        program.error(format_args!("Command not found: {word}"));
        let names = COMMANDS.iter().map(|command| command.name);
        suggest::print(&program, &word, names, |name| format!("{} {name}", program.called_as()));
        return hint_at_overview(&program);
    };
    let context = Context { program, command: command.name };
    match (command.run)(&context, operands.collect()) {
        Ok(()) => 0,
        Err(Exit(code)) => code,
    }
}

/// Whether a command has that name.
pub(crate) fn has_command(name: &str) -> bool {
    COMMANDS.iter().any(|command| command.name == name)
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
    /// A parser of this command's arguments.
    fn parser<'t>(&self, arguments: Vec<String>, table: &'t [Opt]) -> Parser<'t> {
        let name = format!("{} {}", self.program.called_as(), self.command);
        Parser::new(name, arguments, table, Operands::Anywhere).with_common(gate::OPTIONS)
    }

    /// The next option. This handles `--help` and `--untrusted` itself.
    fn next(&self, parser: &mut Parser<'_>) -> Step<Option<Found>> {
        match parser.next() {
            Ok(Some(Found { id: gate::UNTRUSTED, .. })) => {
                gate::distrust();
                self.next(parser)
            }
            Ok(Some(Found { id: 'h', .. })) => {
                help::command(&self.program, self.command);
                Err(Exit(0))
            }
            Ok(found) => Ok(found),
            Err(Fault { text, unknown }) => {
                err(format_args!("{text}\n"));
                if let Some(word) = unknown {
                    let shown = |word: &str| format!("--{word}");
                    suggest::print(&self.program, &word, parser.words(), shown);
                }
                Err(self.hint_at_help())
            }
        }
    }

    /// Prints an error in the command line, with a hint to `--help`.
    fn misused(&self, message: impl Display) -> Exit {
        self.program.error(message);
        self.hint_at_help()
    }

    fn hint_at_help(&self) -> Exit {
        let called_as = self.program.called_as();
        err(format_args!("Try '{called_as} {} --help' for more info\n", self.command));
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

    /// Parses a number without a suffix within bounds. If it is invalid, prints an error and returns the exit code.
    fn count(&self, what: &str, text: &str, min: u64, max: u64) -> Step<u64> {
        number::count(what, text, min, max).map_err(|message| self.failed(message))
    }

    /// Parses a size or offset.
    fn bytes(&self, what: &str, text: &str) -> Step<u64> {
        number::bytes(what, text).map_err(|message| self.failed(message))
    }

    /// Parses the value of `--output`: whether it is JSON.
    fn wants_json(&self, text: &str) -> Step<bool> {
        match text {
            "json" => Ok(true),
            "human" => Ok(false),
            other => {
                Err(self.misused(format_args!("--output expects 'human' or 'json' not '{other}'")))
            }
        }
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
