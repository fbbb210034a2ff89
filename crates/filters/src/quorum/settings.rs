//! The options of a quorum node, without those of its children.

use oxblk_core::{Error, Options, Result};
use serde_json::Value;

/// How a quorum node reads, and how many children must agree.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    /// `vote-threshold`: the number of children that must agree.
    pub(super) threshold: usize,
    /// `read-pattern=fifo`: a read returns the data of the first child that does not fail.
    pub(super) reads_first: bool,
    /// `blkverify`: there are two children, and different data is an error of the whole system.
    pub(super) verifies: bool,
    /// `rewrite-corrupted`: a read corrects the data of the children that lost the vote.
    pub(super) rewrites: bool,
}

impl Settings {
    /// Takes the options of a node with `count` children.
    ///
    /// # Errors
    /// When a value is not valid, or when the options do not fit together.
    pub(super) fn take(options: &mut Options, count: usize) -> Result<Self> {
        let threshold = options.take_number("vote-threshold")?.map_or(0, u64::cast_signed);
        let verifies = options.take_bool("blkverify")?.unwrap_or(false);
        let rewrites = options.take_bool("rewrite-corrupted")?.unwrap_or(false);
        let pattern = options.take_str("read-pattern")?;
        if threshold < 1 {
            return Err(Error::invalid("Parameter 'vote-threshold' expects a value >= 1"));
        }
        let threshold = usize::try_from(threshold).ok().filter(|threshold| *threshold <= count);
        let Some(threshold) = threshold else {
            return Err(Error::invalid("threshold may not exceed children count"));
        };
        let reads_first = match pattern.as_deref() {
            None | Some("quorum") => false,
            Some("fifo") => true,
            Some(_) => {
                return Err(Error::invalid("Please set read-pattern as fifo or quorum"));
            }
        };
        if reads_first {
            return Ok(Self { threshold, reads_first, verifies: false, rewrites: false });
        }
        if verifies && (threshold != 2 || count != 2) {
            return Err(Error::invalid(
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ));
        }
        if verifies && rewrites {
            return Err(Error::invalid("rewrite-corrupted=on cannot be used with blkverify=on"));
        }
        Ok(Self { threshold, reads_first, verifies, rewrites })
    }
}

/// Takes the list of children.
///
/// # Errors
/// When there is no child, or when the keys are not consecutive numbers.
pub(super) fn take_children(options: &mut Options) -> Result<Vec<Value>> {
    let mut list = match options.take("children") {
        Some(Value::Object(list)) if !list.is_empty() => list,
        _ => return Err(Error::invalid("Number of provided children must be 1 or more")),
    };
    let indices = 0..list.len();
    let children = indices.map(|index| list.remove(&index.to_string())).collect::<Option<_>>();
    children.ok_or_else(|| Error::invalid("Option children is not a valid array"))
}
