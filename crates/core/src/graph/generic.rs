//! Generic options: the options that the nodes of all drivers have.

use serde_json::Value;

use super::OpenFlags;
use crate::{DetectZeroes, Error, Options, Result};

/// The generic options of one node, removed from the node's options.
pub(super) struct Generic {
    pub(super) driver: Option<String>,
    pub(super) node_name: Option<String>,
    pub(super) flags: OpenFlags,
    pub(super) detect_zeroes: DetectZeroes,
    /// The options from the list `INHERITABLE`, as the user gave them. A reopen starts from these options.
    pub(super) given: Options,
}

const INHERITABLE: [&str; 6] =
    ["read-only", "auto-read-only", "force-share", "cache", "discard", "detect-zeroes"];

/// Removes the generic options from `options`. If the option for a flag is missing, the flag comes from `inherited`.
///
/// # Errors
/// When a value is not valid, or `detect-zeroes=unmap` is given and discards do not unmap.
pub(super) fn take_generic(options: &mut Options, inherited: &OpenFlags) -> Result<Generic> {
    let mut given = Options::new();
    for (key, value) in options.iter().filter(|(key, _)| INHERITABLE.contains(key)) {
        given.insert(key, value.clone());
    }
    let mut flags = inherited.clone();
    flags.probed = false;
    if let Some(on) = options.take_bool("read-only")? {
        flags.read_only = on;
    }
    if let Some(on) = options.take_bool("auto-read-only")? {
        flags.auto_read_only = on;
    }
    if let Some(on) = options.take_bool("force-share")? {
        flags.force_share = on;
    }
    if let Some(mut cache) = options.take_options("cache") {
        let mut take = |key: &str| {
            cache.take_bool(key).map_err(|_| {
                Error::invalid(format!("Parameter 'cache.{key}' expects 'on' or 'off'"))
            })
        };
        flags.direct = take("direct")?.unwrap_or(flags.direct);
        flags.no_flush = take("no-flush")?.unwrap_or(flags.no_flush);
        // The remaining options are refused as unknown when the driver has opened the node.
        if !cache.is_empty() {
            options.insert("cache", cache.to_json());
        }
    }
    match options.take_str("discard")?.as_deref() {
        None => {}
        Some("unmap" | "on") => flags.unmap = true,
        Some("ignore" | "off") => flags.unmap = false,
        Some(_) => return Err(Error::invalid("Invalid discard option")),
    }
    let detect_zeroes = match options.take_str("detect-zeroes")?.as_deref() {
        None | Some("off") => DetectZeroes::Off,
        Some("on") => DetectZeroes::On,
        Some("unmap") if flags.unmap => DetectZeroes::Unmap,
        Some("unmap") => {
            return Err(Error::invalid(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        Some(other) => {
            return Err(Error::invalid(format!("invalid parameter value: {other}")));
        }
    };
    Ok(Generic {
        driver: take_driver(options),
        node_name: options.take_str("node-name")?,
        flags,
        detect_zeroes,
        given,
    })
}

/// Removes the name of the driver from the options. A value that is not a string is ignored, as in QEMU.
fn take_driver(options: &mut Options) -> Option<String> {
    match options.take("driver") {
        Some(Value::String(name)) => Some(name),
        _ => None,
    }
}
