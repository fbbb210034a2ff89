//! The command line of a small command: help and errors are printed here.

use super::page::Page;
use super::{Flag, Line, Stop, help, parse};
use crate::program::{Program, err, out};

/// Reads the command line of a command: stores the options in `into` and returns the operands.
///
/// # Errors
/// The exit code. Help, the version or the error has been printed.
pub(crate) fn parse_or_end<A>(
    program: &Program,
    page: &Page,
    flags: &[Flag<A>],
    words: Vec<String>,
    into: &mut A,
) -> Result<Vec<String>, u8> {
    parse(Line::new(program.called_as(), words), flags, into).map_err(|stop| match stop {
        Stop::Help => {
            out(format_args!("{}", help::text(page, program.name(), &[])));
            0
        }
        Stop::Version => {
            program.print_version();
            0
        }
        Stop::Invalid(fault) => {
            err(format_args!("{fault}\n"));
            hint(program)
        }
        Stop::Refused(refusal, code) => {
            program.refuse(&refusal);
            code
        }
    })
}

/// Prints an error in the command line with a hint to `--help`, and returns the exit code.
pub(crate) fn misused(program: &Program, message: impl std::fmt::Display) -> u8 {
    program.error(message);
    hint(program)
}

fn hint(program: &Program) -> u8 {
    err(format_args!("Try '{} --help' for more info\n", program.called_as()));
    1
}
