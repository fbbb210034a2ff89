//! Breakpoints: requests that are suspended at an event until the user resumes them.

use std::pin::pin;
use std::time::Duration;

use event_listener::Event;
use oxblk_core::driver::Drain;
use oxblk_core::{BoxFuture, Breakpoints, DebugEvent};

use super::rules::{ANY_STATE, Action, Inner, Rule, Rules};

/// A breakpoint.
#[derive(Debug, Clone)]
pub(super) struct Breakpoint {
    pub(super) tag: String,
    /// Reports to the user that the request is suspended or resumed.
    report: fn(&str),
}

/// The requests that are suspended. A request that has hit several breakpoints has several entries.
#[derive(Debug, Default)]
pub(super) struct Suspended {
    /// The number of the request, and the breakpoint.
    entries: Vec<(u64, Breakpoint)>,
    next: u64,
    changed: std::sync::Arc<Event>,
}

impl Suspended {
    /// The name of the request that has been suspended for the longest time.
    fn first(&self) -> Option<String> {
        self.entries.first().map(|(_, breakpoint)| breakpoint.tag.clone())
    }

    /// Removes the first entry with a name.
    fn resume(&mut self, tag: &str) -> bool {
        let Some(at) = self.entries.iter().position(|(_, breakpoint)| breakpoint.tag == tag) else {
            return false;
        };
        let (_, breakpoint) = self.entries.remove(at);
        (breakpoint.report)(&format!("blkdebug: Resuming request '{tag}'"));
        self.changed.notify(usize::MAX);
        true
    }
}

/// A suspended request. If its future is dropped, the request is no longer suspended.
struct Entry<'a> {
    rules: &'a Rules,
    request: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.rules.lock().suspended.entries.retain(|(request, _)| *request != self.request);
    }
}

impl Rules {
    /// Suspends the caller until all of these breakpoints are resumed.
    pub(super) async fn wait_for_resume(&self, hits: Vec<Breakpoint>) {
        if hits.is_empty() {
            return;
        }
        let request = self.suspend(hits);
        let entry = Entry { rules: self, request };
        self.until(|inner| inner.suspended.entries.iter().all(|(other, _)| *other != request))
            .await;
        drop(entry);
    }

    fn suspend(&self, hits: Vec<Breakpoint>) -> u64 {
        let suspended = &mut self.lock().suspended;
        let request = suspended.next;
        suspended.next = request.wrapping_add(1);
        for breakpoint in hits {
            (breakpoint.report)(&format!("blkdebug: Suspended request '{}'", breakpoint.tag));
            suspended.entries.push((request, breakpoint));
        }
        suspended.changed.notify(usize::MAX);
        request
    }

    /// Waits for a time, or until a drain begins.
    pub(super) async fn delay(&self, time: Duration) {
        let drained = pin!(self.until(|inner| inner.drains > 0));
        let _ = oxblk_ring::timeout(time, drained).await;
    }

    async fn until(&self, condition: impl Fn(&Inner) -> bool) {
        loop {
            let listener = {
                let inner = self.lock();
                if condition(&inner) {
                    return;
                }
                inner.suspended.changed.listen()
            };
            listener.await;
        }
    }
}

impl Drain for Rules {
    fn begin(&self) {
        let mut inner = self.lock();
        inner.drains = inner.drains.saturating_add(1);
        while let Some(tag) = inner.suspended.first() {
            inner.suspended.resume(&tag);
        }
        inner.suspended.changed.notify(usize::MAX);
    }

    fn end(&self) {
        let mut inner = self.lock();
        inner.drains = inner.drains.saturating_sub(1);
    }
}

impl Breakpoints for Rules {
    fn set(&self, event: DebugEvent, tag: &str, report: fn(&str)) {
        let breakpoint = Breakpoint { tag: tag.to_owned(), report };
        self.lock().add(Rule { event, state: ANY_STATE, action: Action::Suspend(breakpoint) });
    }

    fn remove(&self, tag: &str) -> bool {
        let mut inner = self.lock();
        let removed = inner.remove_breakpoints(tag);
        while inner.suspended.resume(tag) {}
        removed
    }

    fn resume(&self, tag: &str) -> bool {
        self.lock().suspended.resume(tag)
    }

    fn is_suspended(&self, tag: &str) -> bool {
        self.lock().suspended.entries.iter().any(|(_, breakpoint)| breakpoint.tag == tag)
    }

    fn wait<'a>(&'a self, tag: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(self.until(move |inner| {
            inner.suspended.entries.iter().any(|(_, breakpoint)| breakpoint.tag == tag)
        }))
    }
}
