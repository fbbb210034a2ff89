//! The commands of `io`: one function each, grouped by topic.

pub(super) mod aio;
pub(super) mod breakpoints;
pub(super) mod control;
mod letters;
pub(super) mod open;
pub(super) mod read;
pub(super) mod status;
pub(super) mod write;

use super::Outcome;
use super::session::Session;
use super::table::{Command, Needs, find};
use crate::flags::{self, Flag, Line, Stop};
use crate::program::{err, out};

/// A command with its arguments.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    command: &'static Command,
    /// The name that the user typed.
    name: &'a str,
    arguments: &'a [&'a str],
}

/// Commands of qemu-io that are not implemented (zones), with their aliases.
const ABSENT: &[&str] = &[
    "zone_append",
    "zone_close",
    "zone_finish",
    "zone_open",
    "zone_report",
    "zone_reset",
    "zap",
    "zc",
    "zf",
    "zo",
    "zrp",
    "zrs",
];

/// Runs the command of one line.
pub(super) async fn run(session: &Session, line: &str) -> Outcome {
    let words: Vec<&str> = line.split(' ').filter(|word| !word.is_empty()).collect();
    let Some((name, arguments)) = words.split_first() else { return Outcome::Done };
    let Some(command) = find(name) else {
        if ABSENT.contains(name) {
            session.program.error(format_args!("The command '{name}' is not supported yet"));
            return Outcome::Failed;
        }
        err(format_args!("command \"{name}\" not found\n"));
        return Outcome::Failed;
    };
    if command.needs != Needs::Nothing {
        let Some(open) = session.current() else {
            session.nothing_open();
            return Outcome::Failed;
        };
        if !count_fits(command, name, arguments.len()) {
            return Outcome::Failed;
        }
        if command.needs == Needs::WritableImage && open.backend.is_read_only() {
            session.program.error("Block node is read-only");
            return Outcome::Failed;
        }
    } else if !count_fits(command, name, arguments.len()) {
        return Outcome::Failed;
    }
    (command.run)(session, Call { command, name, arguments }).await
}

fn count_fits(command: &Command, name: &str, given: usize) -> bool {
    let (min, max) = command.count;
    if given >= min && max.is_none_or(|max| given <= max) {
        return true;
    }
    let expected = match max {
        None => format!("at least {min}"),
        Some(max) if max == min => format!("{min}"),
        Some(max) => format!("between {min} and {max}"),
    };
    err(format_args!("bad argument count {given} to {name}, expected {expected} arguments\n"));
    false
}

impl Call<'_> {
    /// Prints the usage of the command.
    fn misused(&self) -> Outcome {
        out(format_args!("{}\n", self.command.line()));
        Outcome::Failed
    }

    /// Stores the options in `into` and returns the operands. `None`: an option is invalid, and the error has been printed.
    fn parse<A>(&self, session: &Session, flags: &[Flag<A>], into: &mut A) -> Option<Vec<String>> {
        let words = self.arguments.iter().map(|&word| word.to_owned()).collect();
        let line = Line { letters_only: true, ..Line::new(self.name, words) };
        match flags::parse(line, flags, into) {
            Ok(operands) => return Some(operands),
            Err(Stop::Invalid(fault)) => {
                err(format_args!("{fault}\n"));
                self.misused();
            }
            Err(Stop::Refused(refusal, _)) => session.program.refuse(&refusal),
            Err(Stop::Help | Stop::Version) => {}
        }
        None
    }
}

/// `Outcome::Done` on success.
fn done_if(well: bool) -> Outcome {
    if well { Outcome::Done } else { Outcome::Failed }
}
