//! The queue of log lines that are not written to standard error yet.
//!
//! The queue is bounded. A line that does not fit is dropped. The output contains the number of dropped lines at the place
//! of these lines.

use std::collections::VecDeque;
use std::mem;

/// Maximum size of the queue in bytes. The size of a line is its length plus [`LINE_COST`].
const LIMIT: usize = 256 << 10;
/// Overhead of a line in bytes.
const LINE_COST: usize = 64;

/// Lines that are not written yet, the oldest first.
#[derive(Debug)]
pub(super) struct Queue {
    lines: VecDeque<Vec<u8>>,
    size: usize,
    /// Number of lines that were dropped after the newest line of the queue was added.
    dropped: u64,
}

impl Queue {
    pub(super) const fn new() -> Self {
        Self { lines: VecDeque::new(), size: 0, dropped: 0 }
    }

    /// Adds a line if it fits. A note about dropped lines that is added in front of the line may exceed the limit.
    pub(super) fn push(&mut self, line: Vec<u8>) {
        if self.size.saturating_add(cost(&line)) > LIMIT {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        if let Some(note) = self.take_note() {
            self.append(note);
        }
        self.append(line);
    }

    fn append(&mut self, line: Vec<u8>) {
        self.size = self.size.saturating_add(cost(&line));
        self.lines.push_back(line);
    }

    /// Removes and returns the oldest line. If the queue has no line, returns the note about dropped lines.
    pub(super) fn pop(&mut self) -> Option<Vec<u8>> {
        let Some(line) = self.lines.pop_front() else { return self.take_note() };
        self.size = self.size.saturating_sub(cost(&line));
        Some(line)
    }

    /// Whether [`pop`](Self::pop) would return nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.dropped == 0
    }

    fn take_note(&mut self) -> Option<Vec<u8>> {
        let lines = match mem::take(&mut self.dropped) {
            0 => return None,
            1 => "1 line was",
            count => &format!("{count} lines were"),
        };
        Some(format!("log: {lines} dropped: standard error was not read in time\n").into_bytes())
    }
}

fn cost(line: &[u8]) -> usize {
    line.len().saturating_add(LINE_COST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(queue: &mut Queue) -> Vec<String> {
        let pop = || queue.pop().map(|line| String::from_utf8(line).unwrap_or_default());
        std::iter::from_fn(pop).collect()
    }

    #[test]
    fn lines_are_returned_in_the_order_in_which_they_were_added() {
        let mut queue = Queue::new();
        ["a\n", "b\n"].into_iter().for_each(|line| queue.push(line.into()));
        assert_eq!(all(&mut queue), ["a\n", "b\n"]);
        assert_eq!(queue.size, 0);
    }

    #[test]
    fn a_note_replaces_dropped_lines() {
        let mut queue = Queue::new();
        let long = || vec![b'x'; LIMIT / 2 - LINE_COST];
        (0..4).for_each(|_| queue.push(long()));
        assert_eq!(queue.pop(), Some(long()));
        queue.push(b"after\n".to_vec());
        (0..3).for_each(|_| queue.push(vec![b'y'; LIMIT]));
        assert_eq!(queue.pop(), Some(long()));
        let note = |lines| format!("log: {lines} dropped: standard error was not read in time\n");
        assert_eq!(all(&mut queue), [note("2 lines were"), "after\n".into(), note("3 lines were")]);
        queue.push(vec![b'y'; LIMIT]);
        assert_eq!(all(&mut queue), [note("1 line was")]);
        assert_eq!(queue.size, 0);
    }
}
