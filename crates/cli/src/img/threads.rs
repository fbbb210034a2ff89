//! `--threads`: how many I/O threads a command uses.

use oxblk_ring::{Config, IoThread};

use super::Context;
use crate::flags::Stored;
use crate::text::number;

/// Largest value of `--threads`.
const MAX: u64 = 64;

/// Stores the value of `--threads`.
pub(super) fn set(threads: &mut usize, text: &str) -> Stored {
    let given = number::sized("thread count", text, 1, MAX)?;
    *threads = usize::try_from(given).unwrap_or(1);
    Ok(())
}

/// The default number of threads: one for each core.
pub(super) fn default() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}

/// Helper threads. Dropping this waits until they have ended and closed all files.
#[derive(Debug)]
pub(super) struct Helpers(Vec<IoThread>);

impl std::ops::Deref for Helpers {
    type Target = [IoThread];

    fn deref(&self) -> &[IoThread] {
        &self.0
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        for thread in self.0.drain(..) {
            thread.join();
        }
    }
}

/// Starts `threads - 1` helper threads for the calling thread, or fewer if the system cannot start more.
pub(super) fn helpers(context: &Context, threads: usize) -> Helpers {
    let mut helpers = Helpers(Vec::new());
    for index in 1..threads {
        match IoThread::start(&format!("copy-{index}"), Config::default()) {
            Ok(thread) => helpers.0.push(thread),
            Err(error) => {
                let message = format_args!("using {index} of {threads} threads: {error}");
                context.program.warn(message);
                break;
            }
        }
    }
    helpers
}

/// The default number of requests that a copy keeps in flight: a few on each thread.
pub(super) fn requests(helpers: &[IoThread]) -> usize {
    helpers.len().saturating_add(1).max(8)
}
