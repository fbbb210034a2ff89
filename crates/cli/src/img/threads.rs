//! `--threads`: how many I/O threads a command uses.

use oxblk_ring::{Config, IoThread};

use super::{Context, Exit, Step};

/// Most threads that can be asked for.
const MAX: u64 = 64;

/// Reads the value of `--threads`.
pub(super) fn parse(context: &Context, text: &str) -> Step<usize> {
    let threads = context.sized("thread count", text, 1, MAX)?;
    usize::try_from(threads).map_err(|_| Exit(1))
}

/// The number of threads used when nothing is said: one a core.
pub(super) fn default() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}

/// I/O threads that have ended, and let go of every file, when this is dropped.
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

/// Starts the threads beside the one that calls, or as many of them as the system has room for.
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

/// How many requests a copy has in flight over all threads, where nothing is said: a few on each.
pub(super) fn requests(helpers: &[IoThread]) -> usize {
    helpers.len().saturating_add(1).max(8)
}
