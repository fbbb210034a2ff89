//! Reading the command line of a command, and printing help and errors in the form of QEMU's tools.

use std::fmt::Display;

use super::text::supported_formats;
use super::{Flag, Line, Stop, parse, words};
use crate::program::{Program, err, out};
use crate::suggest;

/// Reads a command line: stores the options in `into` and returns the operands. `help` is the text of `--help`.
///
/// # Errors
/// The exit code of the command, after help, the version or an error has been printed.
pub(crate) fn parse_or_end<A>(
    program: &Program,
    line: Line<'_>,
    flags: &[Flag<A>],
    into: &mut A,
    help: impl FnOnce() -> String,
) -> Result<Vec<String>, u8> {
    let name = line.name;
    parse(line, flags, into).map_err(|stop| match stop {
        Stop::Help => {
            // Scripts read the version and the formats from the help of `qemu-img`.
            let as_qemu = name.rsplit('/').next() == Some("qemu-img");
            if as_qemu {
                program.print_version();
            }
            out(format_args!("{}", help()));
            if as_qemu {
                out(format_args!("{}", supported_formats()));
            }
            0
        }
        Stop::Version => {
            program.print_version();
            0
        }
        Stop::Invalid(fault) => {
            err(format_args!("{fault}\n"));
            if let Some(word) = &fault.unknown {
                let shown = |word: &str| format!("--{word}");
                suggest::print(program, word, words(flags).into_iter(), shown);
            }
            hint(name)
        }
        Stop::Refused(refusal, code) => {
            program.refuse(&refusal);
            if refusal.misused {
                hint(name);
            }
            code
        }
    })
}

/// Prints an error about the command line and a line that refers to `--help`, and returns the exit code. `name` is what the
/// user typed to run the command.
pub(crate) fn misused(program: &Program, name: &str, message: impl Display) -> u8 {
    program.error(message);
    hint(name)
}

/// Prints a line that refers to `--help` of a command, and returns the exit code.
pub(crate) fn hint(name: &str) -> u8 {
    err(format_args!("Try '{name} --help' for more info\n"));
    1
}
