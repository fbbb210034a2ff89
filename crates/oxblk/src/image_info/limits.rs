//! The limits of the requests of a node, as a JSON object of the QAPI type `BlockLimitsInfo`.

use oxblk_core::Limits;
use serde_json::{Map, Value, json};

/// Maximum number of buffers in one request to the host.
const MAX_IOV: u32 = 1024;
/// Page size in bytes. The optimal alignment of buffers is at least the page size.
const PAGE: u32 = 4096;

/// The limits as JSON. A limit that is not set is not included.
pub(crate) fn to_json(limits: &Limits) -> Value {
    let mut map = Map::new();
    let mut insert = |key: &str, value: u64| map.insert(key.to_owned(), json!(value));
    insert("request-alignment", limits.request_alignment.into());
    let sizes = [
        ("max-discard", limits.max_discard),
        ("max-write-zeroes", limits.max_write_zeroes),
        ("opt-transfer", limits.opt_transfer),
        ("max-transfer", limits.max_transfer),
    ];
    for (key, size) in sizes.into_iter().filter(|(_, size)| *size > 0) {
        insert(key, size);
    }
    let alignments = [
        ("discard-alignment", limits.discard_alignment),
        ("write-zeroes-alignment", limits.write_zeroes_alignment),
    ];
    for (key, alignment) in alignments.into_iter().filter(|(_, alignment)| *alignment > 1) {
        insert(key, alignment.into());
    }
    insert("min-mem-alignment", limits.mem_alignment.into());
    insert("opt-mem-alignment", limits.mem_alignment.max(PAGE).into());
    insert("max-iov", MAX_IOV.into());
    Value::Object(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_are_not_set_are_not_in_the_json() {
        let none = json!({
            "request-alignment": 1, "min-mem-alignment": 1, "opt-mem-alignment": 4096, "max-iov": 1024,
        });
        assert_eq!(to_json(&Limits::default()), none);
        let limits = Limits { discard_alignment: 65536, max_transfer: 4096, ..Limits::default() };
        let some = to_json(&limits);
        assert_eq!(
            (&some["discard-alignment"], &some["max-transfer"]),
            (&json!(65536), &json!(4096))
        );
    }
}
