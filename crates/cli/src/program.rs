//! The name that the tool was called by, and how it speaks to the user.
//!
//! Errors go to standard error behind that name (`qemu-img: …`, `oxblk img: …`), one fault a line,
//! hints on lines of their own. Output goes through [`out`] and [`note`]: a reader that hangs up (`| head`) never
//! stops the work.

use std::fmt::{Arguments, Display};
use std::io::Write;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use oxblk_core::names;

use oxblk_ring::{Config, block_on_with};

use crate::log;

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

    /// Has [`warn`] speak under this name.
    pub(crate) fn be_the_one_that_runs(&self) {
        RUNNING.get_or_init(|| self.clone());
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

/// The tool that this process is.
static RUNNING: OnceLock<Program> = OnceLock::new();

/// Prints a warning under the name of the tool that runs.
pub(crate) fn warn(message: impl Display) {
    match RUNNING.get() {
        Some(program) => program.warn(message),
        None => err(format_args!("warning: {message}\n")),
    }
}

/// Standard output could not be written.
static OUTPUT_LOST: AtomicBool = AtomicBool::new(false);

/// Results have been printed that may not have left the process yet.
static RESULT_PENDING: AtomicBool = AtomicBool::new(false);

/// Prints the result of a command to standard output. If it cannot be written, the command goes on and
/// [`finish`] turns success into failure: stopping in the middle of a change would do harm.
pub(crate) fn out(text: Arguments<'_>) {
    RESULT_PENDING.store(true, Ordering::Relaxed);
    if write_all(&mut std::io::stdout().lock(), text).is_err() {
        OUTPUT_LOST.store(true, Ordering::Relaxed);
    }
}

/// Prints to standard output what only accompanies the work: progress, what is about to be done. Nobody needs
/// to read it.
pub(crate) fn note(text: Arguments<'_>) {
    flush_out();
    let mut stdout = std::io::stdout().lock();
    drop(write_all(&mut stdout, text).and_then(|()| stdout.flush()));
}

/// Makes sure that everything printed has left the process. What a note has left behind does not count.
pub(crate) fn flush_out() {
    let flushed = std::io::stdout().lock().flush();
    if RESULT_PENDING.swap(false, Ordering::Relaxed) && flushed.is_err() {
        OUTPUT_LOST.store(true, Ordering::Relaxed);
    }
}

/// Prints to standard error, after the log lines before it. Nothing depends on whether it can be written.
pub(crate) fn err(text: Arguments<'_>) {
    flush_out();
    log::settle();
    drop(write_all(&mut std::io::stderr().lock(), text));
}

/// The exit code of the process: that of the command, unless its result could not be printed.
pub(crate) fn finish(code: ExitCode) -> ExitCode {
    flush_out();
    log::settle();
    let lost = OUTPUT_LOST.load(Ordering::Relaxed);
    if lost && code == ExitCode::SUCCESS { ExitCode::FAILURE } else { code }
}

/// Writes text in which names are their bytes again.
fn write_all(stream: &mut impl Write, text: Arguments<'_>) -> std::io::Result<()> {
    match text.as_str() {
        Some(text) => stream.write_all(text.as_bytes()),
        None => stream.write_all(&names::to_bytes(&text.to_string())),
    }
}
