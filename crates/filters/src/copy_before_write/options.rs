//! The options of a copy-before-write node. The texts of errors are those of QEMU.

use std::time::Duration;

use oxblk_core::{Error, Options, Result, parse_number, parse_size};
use serde_json::Value;

/// What happens if old data cannot be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnError {
    /// The change of the disk fails. The snapshot stays valid.
    BreakGuestWrite,
    /// The disk changes. The snapshot becomes invalid.
    BreakSnapshot,
}

/// The options of a node.
#[derive(Debug)]
pub(super) struct CopyOptions {
    /// Describes the target, or refers to a node.
    pub(super) target: Value,
    /// The names of the node and the bitmap that select the clusters of the snapshot.
    pub(super) bitmap: Option<(String, String)>,
    pub(super) on_error: OnError,
    pub(super) timeout: Option<Duration>,
    /// A cluster has at least this number of bytes.
    pub(super) min_cluster: u64,
}

impl CopyOptions {
    /// Takes all options except for the child `file`.
    ///
    /// # Errors
    /// When an option is missing, not known or not valid.
    pub(super) fn take(options: &mut Options) -> Result<Self> {
        let Some(target) = options.take("target") else { return Err(missing("target")) };
        check_target(&target, "target")?;
        let bitmap = take_bitmap(options)?;
        let on_error = match options.take_str("on-cbw-error")?.as_deref() {
            None | Some("break-guest-write") => OnError::BreakGuestWrite,
            Some("break-snapshot") => OnError::BreakSnapshot,
            Some(other) => {
                let text = format!("Parameter 'on-cbw-error' does not accept value '{other}'");
                return Err(Error::invalid(text));
            }
        };
        let timeout = take_seconds(options, "cbw-timeout")?;
        let min_cluster = match options.take_str("min-cluster-size")? {
            None => 0,
            Some(text) => parse_size(&text)
                .map_err(|_| Error::invalid("Parameter 'min-cluster-size' expects size"))?,
        };
        if let Some(key) = options.first_key() {
            return Err(unexpected(&key));
        }
        Ok(Self { target, bitmap, on_error, timeout, min_cluster })
    }

    /// Bytes per cluster for a target with clusters of `target` bytes (0: without clusters).
    ///
    /// # Errors
    /// When the option `min-cluster-size` is not valid.
    pub(super) fn cluster(&self, target: u64) -> Result<u64> {
        let least = self.min_cluster;
        let refused =
            |text: String| Err(Error::invalid(text).prefix("Cannot create block-copy-state"));
        for most in [i64::MAX.unsigned_abs(), oxblk_core::bitmap::MAX_GRANULARITY] {
            if least > most {
                return refused(format!("min-cluster-size too large: {least} > {most}"));
            }
            if least != 0 && !least.is_power_of_two() {
                return refused("min-cluster-size needs to be a power of 2".to_owned());
            }
        }
        let target = target.checked_next_power_of_two().unwrap_or(DEFAULT_CLUSTER);
        Ok(DEFAULT_CLUSTER.max(target).max(least))
    }
}

const DEFAULT_CLUSTER: u64 = 64 << 10;

fn missing(key: &str) -> Error {
    Error::invalid(format!("Parameter '{key}' is missing"))
}

fn unexpected(key: &str) -> Error {
    Error::invalid(format!("Parameter '{key}' is unexpected"))
}

/// The options that describe the target must name the driver of the target and of the nodes below: no format is probed, because
/// the target is written.
fn check_target(target: &Value, path: &str) -> Result<()> {
    let Value::Object(map) = target else { return Ok(()) };
    if !map.contains_key("driver") {
        return Err(missing(&format!("{path}.driver")));
    }
    for (key, value) in map {
        if ["file", "backing", "data-file", "target"].contains(&key.as_str()) {
            check_target(value, &format!("{path}.{key}"))?;
        }
    }
    Ok(())
}

fn take_bitmap(options: &mut Options) -> Result<Option<(String, String)>> {
    match options.get("bitmap") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(_)) => {}
        Some(_) => {
            return Err(Error::invalid("Invalid parameter type for 'bitmap', expected: object"));
        }
    }
    let Some(mut bitmap) = options.take_options("bitmap") else { return Ok(None) };
    let node = bitmap.take_str("node")?.ok_or_else(|| missing("bitmap.node"))?;
    let name = bitmap.take_str("name")?.ok_or_else(|| missing("bitmap.name"))?;
    match bitmap.first_key() {
        Some(key) => Err(unexpected(&format!("bitmap.{key}"))),
        None => Ok(Some((node, name))),
    }
}

/// Takes a number of seconds. 0 means "no limit".
fn take_seconds(options: &mut Options, key: &str) -> Result<Option<Duration>> {
    let Some(text) = options.take_str(key)? else { return Ok(None) };
    let out_of_range = || Error::invalid(format!("Parameter '{key}' expects uint32_t"));
    if text.strip_prefix('-').is_some_and(|rest| parse_number(rest).is_ok()) {
        return Err(out_of_range());
    }
    let seconds = parse_number(&text)
        .map_err(|_| Error::invalid(format!("Parameter '{key}' expects integer")))?;
    let seconds = u32::try_from(seconds).map_err(|_| out_of_range())?;
    Ok((seconds != 0).then(|| Duration::from_secs(seconds.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(text: &str) -> Result<CopyOptions> {
        CopyOptions::take(&mut Options::from_dotted(text, None).unwrap())
    }

    fn refused(text: &str) -> String {
        take(text).unwrap_err().to_string()
    }

    #[test]
    fn options_have_defaults() {
        let options = take("target=t").unwrap();
        assert_eq!(options.on_error, OnError::BreakGuestWrite);
        assert_eq!((options.timeout, options.min_cluster, options.bitmap.clone()), (None, 0, None));
        assert_eq!(options.cluster(0).unwrap(), 65536);
        assert_eq!(options.cluster(4096).unwrap(), 65536);
        assert_eq!(options.cluster(2 << 20).unwrap(), 2 << 20);
        let options =
            take("target=t,min-cluster-size=128k,cbw-timeout=5,bitmap.node=n,bitmap.name=b");
        let options = options.unwrap();
        assert_eq!(options.cluster(0).unwrap(), 131_072);
        assert_eq!(options.timeout, Some(Duration::from_secs(5)));
        assert_eq!(options.bitmap, Some(("n".to_owned(), "b".to_owned())));
    }

    #[test]
    fn invalid_options_are_refused_with_the_texts_of_qemu() {
        for (text, message) in [
            ("on-cbw-error=break-snapshot", "Parameter 'target' is missing"),
            ("target.filename=x", "Parameter 'target.driver' is missing"),
            (
                "target.driver=qcow2,target.file.filename=x",
                "Parameter 'target.file.driver' is missing",
            ),
            ("target=t,on-cbw-error=x", "Parameter 'on-cbw-error' does not accept value 'x'"),
            ("target=t,cbw-timeout=-1", "Parameter 'cbw-timeout' expects uint32_t"),
            ("target=t,cbw-timeout=4294967296", "Parameter 'cbw-timeout' expects uint32_t"),
            ("target=t,cbw-timeout=1k", "Parameter 'cbw-timeout' expects integer"),
            ("target=t,min-cluster-size=-1", "Parameter 'min-cluster-size' expects size"),
            ("target=t,bitmap=b", "Invalid parameter type for 'bitmap', expected: object"),
            ("target=t,bitmap.name=b", "Parameter 'bitmap.node' is missing"),
            ("target=t,bitmap.node=n", "Parameter 'bitmap.name' is missing"),
            (
                "target=t,bitmap.node=n,bitmap.name=b,bitmap.x=1",
                "Parameter 'bitmap.x' is unexpected",
            ),
            ("target=t,foo=1", "Parameter 'foo' is unexpected"),
        ] {
            assert_eq!(refused(text), message);
        }
        for (size, message) in [
            ("3", "min-cluster-size needs to be a power of 2"),
            ("4G", "min-cluster-size too large: 4294967296 > 2147483648"),
            ("8E", "min-cluster-size too large: 9223372036854775808 > 9223372036854775807"),
        ] {
            let options = take(&format!("target=t,min-cluster-size={size}")).unwrap();
            let error = options.cluster(0).unwrap_err().to_string();
            assert_eq!(error, format!("Cannot create block-copy-state: {message}"));
        }
    }
}
