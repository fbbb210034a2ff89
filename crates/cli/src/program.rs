//! The name under which the tool was started, and its output to the user.
//!
//! Errors go to standard error, after the name (`qemu-img: …`, `oxblk img: …`), one error per line, with hints on
//! separate lines. Results go to standard output through [`out`], other messages through [`note`]. A reader that closes
//! the pipe (`| head`) does not stop a command.

use std::fmt::{Arguments, Display};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use oxblk_core::{Error, names, strerror};
use oxblk_ring::{Config, block_on_with};

use crate::flags::refusal::Refusal;
use crate::{bar, log};

/// A tool, with the name under which it was started.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    name: String,
    called_as: String,
}

impl Program {
    /// `name` is printed before errors; `called_as` is the text that the user typed.
    pub(crate) fn new(name: impl Into<String>, called_as: impl Into<String>) -> Self {
        Self { name: name.into(), called_as: called_as.into() }
    }

    /// The name that is printed before errors.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The text that the user typed to start the tool. This text is printed before errors about the command line.
    pub(crate) fn called_as(&self) -> &str {
        &self.called_as
    }

    /// Prints an error.
    pub(crate) fn error(&self, message: impl Display) {
        err(format_args!("{}: {message}\n", self.name));
    }

    /// Runs `work` on this thread as an I/O thread. `None`: the I/O thread could not be started, and the error has been
    /// printed.
    pub(crate) fn run_to_end<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        block_on_with(Config::default(), work)
            .inspect_err(|error| self.error(format_args!("Cannot start an I/O thread: {error}")))
            .ok()
    }

    /// Prints a warning.
    pub(crate) fn warn(&self, message: impl Display) {
        err(format_args!("{}: warning: {message}\n", self.name));
    }

    /// Prints the version.
    pub(crate) fn print_version(&self) {
        out(format_args!("{} version {}\n", self.name, crate::version_as(&self.name)));
    }

    /// Prints the messages of a refusal.
    pub(crate) fn refuse(&self, refusal: &Refusal) {
        for message in &refusal.messages {
            self.error(message);
        }
        if let Some(hint) = &refusal.hint {
            err(format_args!("{hint}\n"));
        }
    }

    /// Makes the function [`warn`] print the name of this tool.
    pub(crate) fn set_running(&self) {
        RUNNING.get_or_init(|| self.clone());
    }

    /// Prints an error of the block layer with its hint.
    pub(crate) fn report(&self, error: &oxblk_core::Error) {
        self.error(error);
        if let Some(hint) = error.hint() {
            err(format_args!("{hint}\n"));
        }
    }

    /// Prints an error of the block layer with its hint, after the text `context`.
    pub(crate) fn report_in(&self, context: impl Display, error: &oxblk_core::Error) {
        self.error(format_args!("{context}{error}"));
        if let Some(hint) = error.hint() {
            err(format_args!("{hint}\n"));
        }
    }
}

/// The tool of this process.
static RUNNING: OnceLock<Program> = OnceLock::new();

/// Prints a warning after the name of the running tool.
pub(crate) fn warn(message: impl Display) {
    match RUNNING.get() {
        Some(program) => program.warn(message),
        None => err(format_args!("warning: {message}\n")),
    }
}

/// The error of the first failed write of a result to standard output.
static OUTPUT_LOST: Mutex<Option<io::Error>> = Mutex::new(None);

fn output_lost(error: io::Error) {
    OUTPUT_LOST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
}

/// Set while printed results may still be in the buffer of standard output.
static RESULT_PENDING: AtomicBool = AtomicBool::new(false);

/// Prints the result of a command to standard output. If the write fails, the command continues, because it must not
/// stop in the middle of a change. The exit code of [`finish`] is then a failure.
pub(crate) fn out(text: Arguments<'_>) {
    RESULT_PENDING.store(true, Ordering::Relaxed);
    if let Err(error) = write_all(&mut io::stdout().lock(), text) {
        output_lost(error);
    }
}

/// Prints a message about the work, such as progress, to standard output. A failed write is ignored.
pub(crate) fn note(text: Arguments<'_>) {
    flush_out();
    let mut stdout = std::io::stdout().lock();
    drop(write_all(&mut stdout, text).and_then(|()| stdout.flush()));
}

/// Flushes standard output. A failure is recorded only if results were pending, not for notes.
pub(crate) fn flush_out() {
    let flushed = io::stdout().lock().flush();
    if RESULT_PENDING.swap(false, Ordering::Relaxed)
        && let Err(error) = flushed
    {
        output_lost(error);
    }
}

/// Prints to standard error, after all earlier log lines. A failed write is ignored.
pub(crate) fn err(text: Arguments<'_>) {
    flush_out();
    log::wait_until_written();
    drop(bar::hide_while(|| write_all(&mut std::io::stderr().lock(), text)));
}

/// The exit code of the process: the exit code of the command, or failure if the result could not be printed.
pub(crate) fn finish(code: ExitCode) -> ExitCode {
    flush_out();
    log::wait_until_written();
    let lost = OUTPUT_LOST.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(error) = lost.filter(|_| code == ExitCode::SUCCESS) else { return code };
    // A reader that closes its end of a pipe needs no error message.
    if error.kind() != io::ErrorKind::BrokenPipe {
        let error = Error::from(error);
        err(format_args!("Could not write to standard output: {}\n", strerror(error.raw_errno())));
    }
    ExitCode::FAILURE
}

/// Writes text. Names inside the text are converted back to their original bytes.
fn write_all(stream: &mut impl Write, text: Arguments<'_>) -> std::io::Result<()> {
    match text.as_str() {
        Some(text) => stream.write_all(text.as_bytes()),
        None => stream.write_all(&names::to_bytes(&text.to_string())),
    }
}
