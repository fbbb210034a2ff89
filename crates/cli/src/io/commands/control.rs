//! Commands that send no requests to the disk: `help`, `quit`, `close`, `sleep`, `sigraise`, `abort`.

use std::time::Duration;

use oxblk_core::{SizeError, parse_number};

use super::{Call, done_if};
use crate::io::Outcome;
use crate::io::numbers::bytes;
use crate::io::session::Session;
use crate::io::table::{COMMANDS, find};
use crate::log;
use crate::program::{err, flush_out, out};

/// `help`.
pub(in crate::io) async fn help(_session: &Session, call: Call<'_>) -> Outcome {
    let Some(name) = call.arguments.first() else {
        for command in COMMANDS {
            out(format_args!("{}\n", command.line()));
        }
        out(format_args!("\nUse 'help commandname' for extended help.\n"));
        return Outcome::Done;
    };
    let Some(command) = find(name) else {
        out(format_args!("command {name} not found\n"));
        return Outcome::Failed;
    };
    out(format_args!("{}\n", command.line()));
    let more = command.more();
    if !more.is_empty() {
        out(format_args!("\n{more}\n"));
    }
    Outcome::Done
}

/// `quit`.
pub(in crate::io) async fn quit(_session: &Session, _call: Call<'_>) -> Outcome {
    Outcome::Quit
}

/// `close`.
pub(in crate::io) async fn close(session: &Session, _call: Call<'_>) -> Outcome {
    done_if(session.close().await)
}

/// `sleep`.
pub(in crate::io) async fn sleep(_session: &Session, call: Call<'_>) -> Outcome {
    let text = call.arguments.first().copied().unwrap_or_default();
    match parse_number(text) {
        Ok(milliseconds) if !text.starts_with('-') => {
            oxblk_ring::sleep(Duration::from_millis(milliseconds)).await;
            Outcome::Done
        }
        // A number out of range is accepted, but the command does not sleep.
        Err(SizeError::OutOfRange) => Outcome::Done,
        _ => {
            out(format_args!("{text} is not a valid number\n"));
            Outcome::Failed
        }
    }
}

/// `sigraise`.
pub(in crate::io) async fn sigraise(_session: &Session, call: Call<'_>) -> Outcome {
    let text = call.arguments.first().copied().unwrap_or_default();
    let Some(signal) = bytes(text) else { return Outcome::Failed };
    let Ok(signal) = i32::try_from(signal) else {
        out(format_args!("signal argument '{text}' is too large to be a valid signal\n"));
        return Outcome::Failed;
    };
    flush_out();
    log::wait_until_written();
    // As with raise(3), an invalid signal number has no effect.
    drop(signal_hook::low_level::raise(signal));
    Outcome::Done
}

/// `abort`.
pub(in crate::io) async fn abort(_session: &Session, _call: Call<'_>) -> Outcome {
    err(format_args!(""));
    std::process::abort();
}
