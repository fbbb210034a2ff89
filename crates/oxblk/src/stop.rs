//! Stopping an operation on request.
//!
//! A stop is requested with a flag that any thread may set, for example a signal handler. The flag wakes nobody. So [`unless_stopped`]
//! looks at the flag at short intervals, also while the operation waits for a request: a request may wait for hours in a
//! throttle group, and a slow device may take minutes.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use futures_util::future::{Either, select};

/// The interval at which the flag is read.
const INTERVAL: Duration = Duration::from_millis(20);

/// Runs `work` to its end. If `stop` is set earlier, drops `work` and returns `None`. Writes that `work` has begun run to
/// completion, and the close of their image waits for them.
pub(crate) async fn unless_stopped<T>(
    stop: &AtomicBool,
    work: impl Future<Output = T>,
) -> Option<T> {
    let requested = async {
        while !stop.load(Relaxed) {
            oxblk_ring::sleep(INTERVAL).await;
        }
    };
    match select(pin!(work), pin!(requested)).await {
        Either::Left((output, _)) => Some(output),
        Either::Right(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_waits_is_dropped_after_a_stop() {
        let (begin, end) = oxblk_ring::sim::run(1, async {
            let stop = AtomicBool::new(false);
            assert_eq!(unless_stopped(&stop, async { 5 }).await, Some(5));
            let request = async {
                oxblk_ring::sleep(Duration::from_secs(1)).await;
                stop.store(true, Relaxed);
                std::future::pending::<()>().await;
            };
            let begin = oxblk_ring::now();
            assert_eq!(unless_stopped(&stop, request).await, None);
            (begin, oxblk_ring::now())
        });
        assert!(end - begin <= Duration::from_secs(1) + INTERVAL);
    }
}
