//! The report on a completed request: number of bytes, time and rate.

use std::time::Instant;

use crate::program::out;
use crate::text::size;

/// Measures the time of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timer(Instant);

impl Timer {
    /// Starts the measurement.
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    /// Prints the report on a request of `len` bytes at `offset`. With `for_machines`, the report is one line of
    /// numbers, separated by commas.
    pub(super) fn report(self, verb: &str, offset: u64, len: u64, for_machines: bool) {
        let seconds = self.0.elapsed().as_secs_f64();
        out(format_args!("{}", text(verb, offset, len, seconds, for_machines)));
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate is rounded anyway")]
fn text(verb: &str, offset: u64, len: u64, seconds: f64, for_machines: bool) -> String {
    let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
    let (bytes, operations) = (per_second(len as f64), per_second(1.0));
    if for_machines {
        return format!("{len},1,{},{bytes:.3},{operations:.3}\n", clock(seconds));
    }
    let time = if seconds < 60.0 { format!("{seconds:05.2} sec") } else { clock(seconds) };
    format!(
        "{verb} {len}/{len} bytes at offset {offset}\n{}, 1 ops; {time} ({}/sec and {operations:.4} ops/sec)\n",
        size::long_bytes(len),
        size::long(bytes)
    )
}

/// Formats a time as hours, minutes and seconds.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "times are small")]
fn clock(seconds: f64) -> String {
    let whole = seconds as u64;
    let rest = seconds % 60.0;
    format!("{}:{:02}:{rest:05.2}", whole / 3600, whole / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_amount_time_and_rates() {
        assert_eq!(
            text("wrote", 4096, 65536, 0.5, false),
            "wrote 65536/65536 bytes at offset 4096\n64 KiB, 1 ops; 00.50 sec (128 KiB/sec and 2.0000 ops/sec)\n"
        );
        assert_eq!(text("read", 0, 512, 0.25, true), "512,1,0:00:00.25,2048.000,4.000\n");
        assert_eq!(clock(3725.5), "1:02:05.50");
    }
}
