//! The name that the tool was called by, and how it speaks to the user.
//!
//! Errors go to standard error behind that name (`qemu-img: …`, `oxblk img: …`), one fault a line,
//! hints on lines of their own. Output goes through [`out`], so that a reader who hangs up (`| head`)
//! ends the tool quietly instead of with a panic.

use std::fmt::{Arguments, Display};
use std::io::Write;

use oxblk_ring::{Config, block_on_with};

/// A tool under the name it was called by.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    name: String,
    called_as: String,
}

impl Program {
    /// `name` stands before errors; `called_as` is what the user typed.
    pub(crate) fn new(name: impl Into<String>, called_as: impl Into<String>) -> Self {
        Self { name: name.into(), called_as: called_as.into() }
    }

    /// The name that stands before errors.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What the user typed to call it: stands before faults of the command line.
    pub(crate) fn called_as(&self) -> &str {
        &self.called_as
    }

    /// Prints an error.
    pub(crate) fn error(&self, message: impl Display) {
        err(format_args!("{}: {message}\n", self.name));
    }

    /// Runs `work` on this thread as an I/O thread, or says why that cannot be.
    pub(crate) fn run_to_end<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        block_on_with(Config::default(), work)
            .inspect_err(|error| self.error(format_args!("Cannot start an I/O thread: {error}")))
            .ok()
    }

    /// Prints a warning.
    pub(crate) fn warn(&self, message: impl Display) {
        err(format_args!("{}: warning: {message}\n", self.name));
    }

    /// Prints an error of the block layer with its hint.
    pub(crate) fn report(&self, error: &oxblk_core::Error) {
        self.error(error);
        if let Some(hint) = error.hint() {
            err(format_args!("{hint}\n"));
        }
    }

    /// Prints an error of the block layer behind a line of context.
    pub(crate) fn report_in(&self, context: impl Display, error: &oxblk_core::Error) {
        self.error(format_args!("{context}{error}"));
        if let Some(hint) = error.hint() {
            err(format_args!("{hint}\n"));
        }
    }
}

/// Prints to standard output. When nobody reads it any more, the process ends.
pub(crate) fn out(text: Arguments<'_>) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_fmt(text).is_err() {
        std::process::exit(1);
    }
}

/// Makes sure that everything printed has left the process.
pub(crate) fn flush_out() {
    if std::io::stdout().lock().flush().is_err() {
        std::process::exit(1);
    }
}

/// Prints to standard error.
pub(crate) fn err(text: Arguments<'_>) {
    flush_out();
    drop(std::io::stderr().lock().write_fmt(text));
}
