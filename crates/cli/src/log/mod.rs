//! What the layers below tell beside the errors that requests get: that an image was marked corrupt, say.
//!
//! `RUST_LOG` chooses how much of it; it goes to standard error.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::program::LogStream;

/// Starts it for a tool: errors alone unless `RUST_LOG` says otherwise, as bare lines.
pub(crate) fn start_for_tool() {
    match EnvFilter::try_from_default_env() {
        Ok(filter) => start(filter, true),
        Err(_) => start(EnvFilter::new("error"), false),
    }
}

/// Starts it for a server: warnings too unless `RUST_LOG` says otherwise.
pub(crate) fn start_for_server() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    start(filter, true);
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
