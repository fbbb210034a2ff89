//! Showing the progress of long commands, with `-p` or on SIGUSR1.
//!
//! With `-p` on a terminal that can move its cursor, a bar shows the rate and the remaining time. With `-p` and any other
//! output, for example a pipe, the percentage is printed in QEMU's format at 0 %, each time it has grown by more than a step,
//! and at 100 %. Each SIGUSR1 prints the percentage once on standard error, with or without `-p`.
//!
//! Any thread may report progress ([`Progress::set`]).

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::SIGUSR1;

use crate::bar;
use crate::program::{err, note};

/// Percentage points between two prints, as in QEMU.
pub(crate) mod step {
    /// The step of most commands.
    pub(crate) const USUAL: f64 = 1.0;
    /// The step of `compare` and `rebase`.
    pub(crate) const WIDE: f64 = 2.0;
}

/// How progress is shown.
enum Shown {
    /// Only on SIGUSR1.
    OnRequest,
    /// As text.
    Text {
        /// Percentage points between two prints.
        step: f64,
        /// The last percentage printed.
        last: Mutex<f64>,
    },
    /// As a bar on a terminal.
    Bar {
        bar: ProgressBar,
        /// The width of the terminal for which the bar was laid out, in columns.
        width: AtomicU16,
    },
}

/// Progress of one command.
pub(crate) struct Progress {
    shown: Shown,
    done: AtomicU64,
    total: AtomicU64,
    ended: AtomicBool,
}

impl Progress {
    /// Starts at 0 %. `wanted`: `-p` was given. `step`: percentage points between two prints.
    pub(crate) fn start(wanted: bool, step: f64) -> Arc<Self> {
        let shown = if !wanted {
            Shown::OnRequest
        } else if std::io::stdout().is_terminal() && !is_dumb() {
            let bar = bar::show();
            let width = bar::columns();
            bar.set_style(style_for(width));
            Shown::Bar { bar, width: width.into() }
        } else {
            print(0.0);
            Shown::Text { step, last: Mutex::new(0.0) }
        };
        let progress = Arc::new(Self {
            shown,
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        answer_requests(&progress);
        progress
    }

    /// Records that `done` of `total` bytes have been processed.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.total.store(total, Relaxed);
        self.done.store(done, Relaxed);
        match &self.shown {
            Shown::OnRequest => {}
            Shown::Text { step, last } => {
                let percent = self.percent();
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if percent > *last + step || (percent >= 100.0 && *last < 100.0) {
                    *last = percent;
                    print(percent);
                }
            }
            Shown::Bar { bar, width } => {
                let now = bar::columns();
                if width.swap(now, Relaxed) != now {
                    bar.set_style(style_for(now));
                }
                bar.set_length(total);
                bar.set_position(done);
            }
        }
    }

    /// Whether the percentage is shown continuously. In this case, commands determine the exact total before they
    /// begin.
    pub(crate) fn is_shown(&self) -> bool {
        !matches!(self.shown, Shown::OnRequest)
    }

    /// Prints 100 % at the end of a command, if the progress is shown as text.
    pub(crate) fn complete(&self) {
        if let Shown::Text { .. } = self.shown {
            print(100.0);
        }
    }

    /// Ends the line of the progress, if it has not ended yet.
    pub(crate) fn end(&self) {
        if self.ended.swap(true, Relaxed) {
            return;
        }
        match &self.shown {
            Shown::OnRequest => return,
            Shown::Text { .. } => {}
            Shown::Bar { bar, .. } => {
                bar.abandon();
                bar::forget();
            }
        }
        note(format_args!("\n"));
    }

    /// The processed part in percent.
    pub(crate) fn percent(&self) -> f64 {
        let (done, total) = (self.done.load(Relaxed), self.total.load(Relaxed));
        if total == 0 {
            return 0.0;
        }
        #[expect(clippy::cast_precision_loss, reason = "two decimals are printed")]
        let percent = done as f64 * 100.0 / total as f64;
        percent.min(100.0)
    }
}

/// Whether the terminal cannot move its cursor, or its type is unknown.
fn is_dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb")
}

/// A bar that fits into one line. A terminal cannot redraw a line that wraps.
fn style_for(columns: u16) -> ProgressStyle {
    let template = match columns {
        72.. => "{wide_bar} {percent:>3} %  {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        36..72 => "{wide_bar} {percent:>3} %  {bytes_per_sec}  {eta}",
        _ => "{percent:>3} %",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn print(percent: f64) {
    note(format_args!("    ({percent:.2}/100%)\r"));
}

/// Prints the percentage on SIGUSR1 until the progress is dropped.
fn answer_requests(progress: &Arc<Progress>) {
    let Ok(mut signals) = signal_hook::iterator::Signals::new([SIGUSR1]) else { return };
    let progress = Arc::downgrade(progress);
    let answer = move || {
        for _ in signals.forever() {
            let Some(progress) = progress.upgrade() else { return };
            err(format_args!("    ({:.2}/100%)\n", progress.percent()));
        }
    };
    drop(std::thread::Builder::new().name("progress".to_owned()).spawn(answer));
}
