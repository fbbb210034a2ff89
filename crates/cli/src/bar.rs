//! The progress bar on the terminal.
//!
//! The bar leaves the last columns of its line free, because the terminal echoes `^C` behind the bar. Without free columns,
//! the terminal would wrap `^C` to the next line. The bar is hidden while a message is printed. Otherwise the message would
//! appear in the line of the bar.

use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, TermLike};

/// Columns that the bar leaves free.
const MARGIN: u16 = 2;

/// Maximum number of redraws per second.
const REFRESH_RATE: u8 = 20;

/// The bar that the terminal shows.
static SHOWN: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Creates the bar. [`hide_while`] hides this bar while a message is printed.
pub(crate) fn show() -> ProgressBar {
    let target = ProgressDrawTarget::term_like_with_hz(Box::new(Terminal), REFRESH_RATE);
    let bar = ProgressBar::with_draw_target(None, target);
    *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
    bar
}

/// Forgets the bar: [`hide_while`] does not draw it again.
pub(crate) fn forget() {
    *SHOWN.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// Hides the bar while `print` prints.
pub(crate) fn hide_while<T>(print: impl FnOnce() -> T) -> T {
    let shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match shown {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}

/// The number of columns of the terminal, 80 if the number cannot be determined.
pub(crate) fn columns() -> u16 {
    rustix::termios::tcgetwinsize(io::stdout()).map_or(80, |size| size.ws_col)
}

/// The terminal on standard output, without the columns that the bar leaves free.
#[derive(Debug)]
struct Terminal;

impl Terminal {
    /// Moves the cursor by `n` lines or columns with an ANSI sequence. `direction` is the last letter of the sequence.
    fn move_cursor(&self, n: usize, direction: char) -> io::Result<()> {
        // A terminal treats a count of 0 as 1.
        if n == 0 { Ok(()) } else { self.write_str(&format!("\x1b[{n}{direction}")) }
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        columns().saturating_sub(MARGIN)
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(&format!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        io::stdout().write_all(text.as_bytes())
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write_str("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        io::stdout().flush()
    }
}
