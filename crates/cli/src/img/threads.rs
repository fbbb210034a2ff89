//! `--threads`: how many I/O threads a command uses.

use oxblk::IoThreads;
use oxblk_ring::IoThread;

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

/// The default number of threads: one for each core, at most 16.
pub(super) fn default() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(16)
}

/// Starts `threads - 1` helper threads for the calling thread, or fewer if the system cannot start more. The command
/// joins these threads at its end, so all files are closed before the process ends.
pub(super) fn helpers(context: &Context, threads: usize) -> IoThreads {
    let (helpers, shortage) = IoThreads::start_up_to(threads.saturating_sub(1));
    if let Some(error) = shortage {
        let started = helpers.threads().len().saturating_add(1);
        context.program.warn(format_args!("using {started} of {threads} threads: {error}"));
    }
    helpers
}

/// The default number of requests in flight of a copy: one for each thread, and at least 8.
pub(super) fn requests(helpers: &[IoThread]) -> usize {
    helpers.len().saturating_add(1).max(8)
}
