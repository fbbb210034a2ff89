//! The limits of a throttle group, and the options that set them.

use oxblk_core::{Error, Options, Result, parse_number};
use serde_json::Value;

/// The largest limit.
const MAX: u64 = 1_000_000_000_000_000;

/// The kinds of limits, as the options name them. The order is the order of [`GroupLimits::buckets`].
pub const KINDS: [&str; 6] =
    ["iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write"];

/// The notation in which options were given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notation {
    /// `key=value,…`: numbers are text.
    KeyValue,
    /// JSON: numbers are JSON numbers.
    Json,
}

/// One limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketLimits {
    /// Units (requests or bytes) per second on average. 0: no limit.
    pub average: u64,
    /// Units per second during a burst. 0: no burst.
    pub burst: u64,
    /// Length of a burst in seconds.
    pub burst_length: u64,
}

impl Default for BucketLimits {
    fn default() -> Self {
        Self { average: 0, burst: 0, burst_length: 1 }
    }
}

/// All limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupLimits {
    /// The limits, in the order of [`KINDS`].
    pub buckets: [BucketLimits; 6],
    /// A request counts as one request for each `iops_size` bytes. 0: each request counts as one.
    pub iops_size: u64,
}

impl GroupLimits {
    /// Removes the limits from the properties of a throttle group object, and returns them. Limits are given as
    /// `limits.iops-total` or `x-iops-total`, for example; the second form has precedence.
    ///
    /// # Errors
    /// When a property is not a number, or is unknown, and when [`Self::check`] refuses the limits. The messages are those of
    /// QEMU.
    pub fn take(options: &mut Options, notation: Notation) -> Result<Self> {
        let mut limits = Self::default();
        if options.contains("limits")
            && options.get("limits").is_none_or(|value| !value.is_object())
        {
            return Err(Error::invalid("Invalid parameter type for 'limits', expected: object"));
        }
        let mut nested = options.take_options("limits").unwrap_or_default();
        limits.take_from(&mut nested, notation, "", "limits.")?;
        if let Some(key) = nested.first_key() {
            return Err(Error::invalid(format!("Parameter 'limits.{key}' is unexpected")));
        }
        limits.take_from(options, notation, "x-", "")?;
        limits.check()?;
        Ok(limits)
    }

    /// Takes the limits whose names have `prefix`. `shown` precedes the names in messages; it is empty for the second form.
    fn take_from(
        &mut self,
        options: &mut Options,
        notation: Notation,
        prefix: &str,
        shown: &str,
    ) -> Result<()> {
        let mut take = |name: &str, to: &mut u64| -> Result<()> {
            let key = format!("{prefix}{name}");
            if let Some(value) = options.take(&key) {
                let signed = number(&value, notation, &format!("{shown}{key}"))?;
                if signed < 0 && shown.is_empty() {
                    return Err(Error::invalid("Property values cannot be negative"));
                }
                if name.ends_with("-max-length") && signed > i64::from(u32::MAX) {
                    let text = format!("{key} value must be in the range [0, {}]", u32::MAX);
                    return Err(Error::invalid(text));
                }
                // QEMU checks negative numbers of the first form only after a conversion to unsigned numbers.
                *to = u64::try_from(signed).unwrap_or(u64::MAX);
            }
            Ok(())
        };
        for (kind, bucket) in KINDS.iter().zip(&mut self.buckets) {
            take(kind, &mut bucket.average)?;
            take(&format!("{kind}-max"), &mut bucket.burst)?;
            take(&format!("{kind}-max-length"), &mut bucket.burst_length)?;
        }
        take("iops-size", &mut self.iops_size)
    }

    /// Whether there is any limit.
    pub fn is_limited(&self) -> bool {
        self.buckets.iter().any(|bucket| bucket.average > 0)
    }

    /// Checks the limits.
    ///
    /// # Errors
    /// When a limit for all requests and a limit for reads or writes of the same kind are set; when `iops-size` is set without
    /// a limit of requests; when a number is out of range; when a burst has no average, is lower than the average, has no rate,
    /// or is too long.
    pub fn check(&self) -> Result<()> {
        let refused = |text: &'static str| Err(Error::invalid(text));
        for kinds in self.buckets.chunks(3) {
            if let [total, read, write] = kinds {
                let both = |a: u64, b: u64, c: u64| a > 0 && (b > 0 || c > 0);
                if both(total.average, read.average, write.average)
                    || both(total.burst, read.burst, write.burst)
                {
                    return refused(
                        "bps/iops/max total values and read/write values cannot be used at the same time",
                    );
                }
            }
        }
        if self.iops_size > 0 && self.buckets.iter().take(3).all(|bucket| bucket.average == 0) {
            return refused("iops size requires an iops value to be set");
        }
        for bucket in &self.buckets {
            if bucket.average > MAX || bucket.burst > MAX {
                return refused("bps/iops/max values must be within [0, 1000000000000000]");
            }
            if bucket.burst_length == 0 {
                return refused("the burst length cannot be 0");
            }
            if bucket.burst_length > 1 && bucket.burst == 0 {
                return refused("burst length set without burst rate");
            }
            if bucket.burst > 0 && bucket.burst_length > MAX / bucket.burst {
                return refused("burst length too high for this burst rate");
            }
            if bucket.burst > 0 && bucket.average == 0 {
                return refused("bps_max/iops_max require corresponding bps/iops values");
            }
            if bucket.burst > 0 && bucket.burst < bucket.average {
                return refused("bps_max/iops_max cannot be lower than bps/iops");
            }
        }
        Ok(())
    }
}

/// Reads a number from an option value.
fn number(value: &Value, notation: Notation, key: &str) -> Result<i64> {
    let refused = match (notation, value) {
        (Notation::Json, Value::Number(number)) if number.is_i64() => {
            return Ok(number.as_i64().unwrap_or_default());
        }
        (Notation::Json, _) => format!("Invalid parameter type for '{key}', expected: integer"),
        (Notation::KeyValue, Value::Object(_)) => format!("Parameters '{key}.*' are unexpected"),
        (Notation::KeyValue, value) => {
            if let Some(number) = value.as_str().and_then(parse_signed) {
                return Ok(number);
            }
            format!("Parameter '{key}' expects integer")
        }
    };
    Err(Error::invalid(refused))
}

/// Parses a signed number in C's notations: decimal, hexadecimal or octal.
fn parse_signed(text: &str) -> Option<i64> {
    let number = parse_number(text).ok()?;
    if text.trim_start().starts_with('-') {
        return 0_i64.checked_sub_unsigned(number.wrapping_neg());
    }
    i64::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<GroupLimits, String> {
        let mut options = Options::from_dotted(text, None).unwrap();
        GroupLimits::take(&mut options, Notation::KeyValue).map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_of_the_options_set_limits() {
        let limits =
            take("limits.iops-total=100,x-bps-read=5,x-bps-read-max=50,x-bps-read-max-length=3");
        let limits = limits.unwrap();
        assert_eq!(limits.buckets[0].average, 100);
        assert_eq!(limits.buckets[4], BucketLimits { average: 5, burst: 50, burst_length: 3 });
        assert!(limits.is_limited());
        assert_eq!(take("limits.iops-total=10,x-iops-total=20").unwrap().buckets[0].average, 20);
        assert!(!take("x-iops-total=0").unwrap().is_limited());
        assert_eq!(take("x-iops-total=0x10").unwrap().buckets[0].average, 16);
        assert_eq!(take("limits.iops-total=+010").unwrap().buckets[0].average, 8);
    }

    #[test]
    fn wrong_limits_get_the_messages_of_qemu() {
        for (text, message) in [
            ("limits.iops-total=-1", "bps/iops/max values must be within [0, 1000000000000000]"),
            ("x-iops-total=-1", "Property values cannot be negative"),
            ("limits.bps-total-max-length=-4", "burst length set without burst rate"),
            (
                "limits.bps-total=5,limits.bps-total-max=9,limits.bps-total-max-length=-4",
                "burst length too high for this burst rate",
            ),
            (
                "limits.bps-total=5,limits.bps-total-max-length=5000000000",
                "bps-total-max-length value must be in the range [0, 4294967295]",
            ),
            ("limits.iops-size=-1", "iops size requires an iops value to be set"),
            (
                "x-iops-total=100,x-iops-read=5",
                "bps/iops/max total values and read/write values cannot be used at the same time",
            ),
            ("x-iops-total-max=5", "bps_max/iops_max require corresponding bps/iops values"),
            (
                "x-iops-total=100,x-iops-total-max=50",
                "bps_max/iops_max cannot be lower than bps/iops",
            ),
            ("x-iops-total=100,x-iops-total-max-length=5", "burst length set without burst rate"),
            (
                "x-iops-total=100,x-iops-total-max=500,x-iops-total-max-length=0",
                "the burst length cannot be 0",
            ),
            (
                "x-bps-total=2000000000000000",
                "bps/iops/max values must be within [0, 1000000000000000]",
            ),
            ("x-iops-size=5", "iops size requires an iops value to be set"),
            (
                "x-bps-total=1000,x-bps-total-max=1000000,x-bps-total-max-length=4000000000",
                "burst length too high for this burst rate",
            ),
            ("x-iops-total=abc", "Parameter 'x-iops-total' expects integer"),
            ("x-iops-total=1k", "Parameter 'x-iops-total' expects integer"),
            ("x-iops-total=9223372036854775808", "Parameter 'x-iops-total' expects integer"),
            ("limits.iops-total.x=1", "Parameters 'limits.iops-total.*' are unexpected"),
            ("limits.foo=1", "Parameter 'limits.foo' is unexpected"),
            ("limits.iops-total=a", "Parameter 'limits.iops-total' expects integer"),
        ] {
            assert_eq!(take(text).unwrap_err(), message, "{text}");
        }
    }
}
