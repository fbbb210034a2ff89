//! What the layers below report beside the errors that requests get: that an image was marked corrupt, say.
//!
//! `RUST_LOG` chooses how much of it; it goes to standard error, from a thread of its own ([`stream`]).

mod queue;
mod stream;

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use stream::LogStream;
pub(crate) use stream::settle;

/// How long a server that ends waits for its log to be read.
const PATIENCE: Duration = Duration::from_secs(1);

/// Starts it for a tool: errors alone unless `RUST_LOG` says otherwise, as bare lines.
pub(crate) fn start_for_tool() {
    match EnvFilter::try_from_default_env() {
        Ok(filter) => start(filter, true),
        Err(_) => start(EnvFilter::new("error"), false),
    }
}

/// Starts it for a server: warnings too unless `RUST_LOG` says otherwise. The server ends also if nobody reads its log.
pub(crate) fn start_for_server() {
    stream::start_writer(PATIENCE);
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    start(filter, true);
}

/// Prints an error of a server, after the log lines before it and without waiting.
pub(crate) fn print_error(text: impl Display) {
    // It goes to the queue, which accepts everything.
    drop(LogStream.write_all(format!("{text}\n").as_bytes()));
}

fn start(filter: EnvFilter, levels: bool) {
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogStream);
    // A line that cannot be written is dropped. To report that, the library would write to standard error as well, and
    // panic if that fails.
    let log = log.with_ansi(is_coloured()).log_internal_errors(false);
    // One that was started before stays.
    let _ = log.without_time().with_target(false).with_level(levels).try_init();
}

/// Whether escape codes are wanted: on a terminal that knows them, unless `NO_COLOR` says no.
fn is_coloured() -> bool {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    std::io::stderr().is_terminal() && !unwanted && !is_dumb
}
