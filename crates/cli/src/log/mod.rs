//! The log: events that the libraries report in addition to errors of requests, for example that an image was marked corrupt.
//!
//! `RUST_LOG` selects which events are logged. A separate thread writes them to standard error ([`stream`]).

mod queue;
mod stream;

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use stream::LogStream;
pub(crate) use stream::wait_until_written;

/// The time that a server waits for one log line to be written, before it prints a message and at its end.
const MAX_LINE_WAIT: Duration = Duration::from_secs(1);

/// Starts the log of a tool. Without a valid `RUST_LOG`, only errors are logged, without their level.
pub(crate) fn start_for_tool() {
    match EnvFilter::try_from_default_env() {
        Ok(filter) => start(filter, true),
        Err(_) => start(EnvFilter::new("error"), false),
    }
}

/// Starts the log of a server. Without a valid `RUST_LOG`, warnings and errors are logged. The server can end even if no
/// process reads its standard error.
pub(crate) fn start_for_server() {
    stream::start_writer(MAX_LINE_WAIT);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    start(filter, true);
}

/// Prints an error of a server, after all earlier log lines and without waiting.
pub(crate) fn print_error(text: impl Display) {
    // This write goes to the queue, so it cannot fail.
    drop(LogStream.write_all(format!("{text}\n").as_bytes()));
}

fn start(filter: EnvFilter, levels: bool) {
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogStream);
    // A line that cannot be written is dropped. The library would report this error on standard error too, and panic if
    // the report fails.
    let log = log.with_ansi(is_coloured()).log_internal_errors(false);
    // If a log has already been started, it stays in use.
    let _ = log.without_time().with_target(false).with_level(levels).try_init();
}

/// Whether to print escape codes: standard error is a terminal that understands escape codes, and `NO_COLOR` is not
/// set.
fn is_coloured() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    std::io::stderr().is_terminal() && !unwanted && !is_dumb
}
