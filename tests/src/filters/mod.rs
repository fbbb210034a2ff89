//! Stacks of filters above an image and below it. A stack changes nothing that a guest or a check sees.
//!
//! | file | concern |
//! |---|---|
//! | this file | the filters, and which filter is allowed where |
//! | `disks` | a stack on simulated disks, and its recovery after a power cut |

pub(crate) mod disks;

use oxblk_core::{Gate, Graph, Objects, Options};
use oxblk_filters::throttle::{Group, GroupLimits, Notation};
use serde_json::{Value, json};

use crate::formats::{self, Variant};
use crate::random::Random;

/// The identifier of the throttle group of the filters.
const GROUP: &str = "filters";

/// The largest number of filters in a stack.
const MOST: u64 = 5;

/// The largest number of filters with copies in a stack.
const MOST_WITH_COPIES: usize = 2;

/// The bytes in front of an image whose file is behind [`Filter::Part`].
pub(crate) const START: u64 = 3 * 512;

/// A filter, or a node that acts as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// blkdebug with limits and without rules.
    Blkdebug,
    /// blkdebug whose rules delay reads and writes.
    Delays,
    /// blklogwrites. The log is a null disk with a latency.
    Blklogwrites,
    /// blkverify with a copy of the node below.
    Blkverify,
    /// compress.
    Compress,
    /// copy-before-write. The target is a null disk.
    CopyBeforeWrite,
    /// copy-on-read.
    CopyOnRead,
    /// raw with `offset` below an image, or with `size` above it.
    Part,
    /// preallocate.
    Preallocate,
    /// quorum with the node below and two copies of it. Two children must agree.
    Quorum,
    /// throttle with limits that are not reached.
    Throttle,
}

use Filter::{
    Blkdebug, Blklogwrites, Blkverify, Compress, CopyBeforeWrite, CopyOnRead, Delays, Part,
    Preallocate, Quorum, Throttle,
};

/// Where a filter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Between the guest and the image.
    Above,
    /// Between the image and its file.
    Below,
}

impl Filter {
    /// Every filter.
    pub const ALL: [Filter; 11] = [
        Blkdebug,
        Delays,
        Blklogwrites,
        Blkverify,
        Compress,
        CopyBeforeWrite,
        CopyOnRead,
        Part,
        Preallocate,
        Quorum,
        Throttle,
    ];

    /// The number of copies of the node below that the filter uses.
    fn copies(self) -> usize {
        match self {
            Blkverify => 1,
            Quorum => 2,
            _ => 0,
        }
    }

    /// Whether a compressed write passes the filter.
    fn passes_compressed(self) -> bool {
        matches!(self, CopyOnRead | Throttle)
    }

    /// Whether the disk can be resized through the filter.
    fn resizes(self, side: Side) -> bool {
        self != Quorum && (self != Part || side == Side::Below)
    }

    /// A filter above the node `below`. `size` is the size of the disk in bytes.
    fn wrap(self, side: Side, below: &Value, copies: &[Value], size: u64) -> Value {
        match self {
            Blkdebug => json!({
                "driver": "blkdebug", "image": below, "align": 512, "max-transfer": 1 << 20,
            }),
            Delays => {
                let rule = |io, delay| json!({ "event": "none", "iotype": io, "errno": 0, "delay-ns": delay });
                json!({
                    "driver": "blkdebug",
                    "image": below,
                    "inject-error": [rule("read", 20_000), rule("write", 50_000)],
                })
            }
            Blklogwrites => {
                let log = json!({ "driver": "null-co", "size": 1_u64 << 40, "latency-ns": 5000 });
                json!({ "driver": "blklogwrites", "file": below, "log": log })
            }
            Blkverify => json!({ "driver": "blkverify", "test": below, "raw": copies[0] }),
            Compress => json!({ "driver": "compress", "file": below }),
            CopyBeforeWrite => {
                let target =
                    json!({ "driver": "null-co", "size": 1_u64 << 40, "read-only": false });
                json!({ "driver": "copy-before-write", "file": below, "target": target })
            }
            CopyOnRead => json!({ "driver": "copy-on-read", "file": below }),
            Part if side == Side::Above => {
                json!({ "driver": "raw", "file": below, "offset": 0, "size": size })
            }
            Part => json!({ "driver": "raw", "file": below, "offset": START }),
            Preallocate => {
                json!({ "driver": "preallocate", "file": below, "prealloc-size": 1 << 20 })
            }
            Quorum => json!({
                "driver": "quorum", "children": [below, copies[0], copies[1]], "vote-threshold": 2,
            }),
            Throttle => json!({ "driver": "throttle", "file": below, "throttle-group": GROUP }),
        }
    }
}

/// Filters above an image and below it, on each side the lowest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stack {
    above: Vec<Filter>,
    below: Vec<Filter>,
}

impl Stack {
    /// The stack of this one filter. `None` if the filter cannot be there.
    pub fn alone(variant: &Variant, side: Side, filter: Filter) -> Option<Self> {
        let mut stack = Self::default();
        stack.push(variant, side, filter).then_some(stack)
    }

    /// All stacks of one filter.
    pub fn all_alone(variant: &Variant) -> Vec<Self> {
        let sides = [Side::Above, Side::Below];
        let each = |side| Filter::ALL.map(|filter| Self::alone(variant, side, filter));
        sides.into_iter().flat_map(each).flatten().collect()
    }

    /// A random stack of up to five filters.
    pub fn random(variant: &Variant, random: &mut Random) -> Self {
        let mut stack = Self::default();
        let count = random.within(1, MOST);
        while stack.len() < count {
            let side = *random.pick(&[Side::Above, Side::Below]);
            let filter = *random.pick(&Filter::ALL);
            stack.push(variant, side, filter);
        }
        stack
    }

    /// A random stack with the property [`loses_nothing_by_failures`](Stack::loses_nothing_by_failures).
    pub fn random_for_failures(variant: &Variant, random: &mut Random) -> Self {
        loop {
            let stack = Self::random(variant, random);
            if stack.loses_nothing_by_failures() {
                return stack;
            }
        }
    }

    /// Whether the image has the data of all completed requests although operations of its disk have failed. blkverify reports
    /// a difference after a failed request. A quorum above the image completes a request if the image is the only child that
    /// fails.
    pub fn loses_nothing_by_failures(&self) -> bool {
        !self.has(Blkverify) && !self.above.contains(&Quorum)
    }

    /// Whether filters use copies of the nodes below them.
    pub fn has_copies(&self) -> bool {
        self.filters().any(|(_, filter)| filter.copies() > 0)
    }

    fn len(&self) -> u64 {
        (self.above.len() + self.below.len()) as u64
    }

    /// Puts a filter on top of one side. Returns whether the filter can be there.
    fn push(&mut self, variant: &Variant, side: Side, filter: Filter) -> bool {
        let with_copies = self.filters().filter(|(_, filter)| filter.copies() > 0).count();
        if filter.copies() > 0 && with_copies == MOST_WITH_COPIES {
            return false;
        }
        let fits = match (side, filter) {
            // The node directly below must compress.
            (Side::Above, Compress) => self.passes_compressed(variant),
            (Side::Below, Compress) => false,
            // The bytes in front of the image are not in the copies.
            (Side::Below, Part) => !variant.data_file && self.below.is_empty(),
            // The file and the data file are on one disk.
            (Side::Below, Blkverify | Quorum) => !variant.data_file,
            _ => true,
        };
        if fits {
            match side {
                Side::Above => self.above.push(filter),
                Side::Below => self.below.push(filter),
            }
        }
        fits
    }

    fn filters(&self) -> impl Iterator<Item = (Side, Filter)> {
        let above = self.above.iter().map(|filter| (Side::Above, *filter));
        above.chain(self.below.iter().map(|filter| (Side::Below, *filter)))
    }

    /// The filters of one side, the lowest first.
    pub(crate) fn side(&self, side: Side) -> &[Filter] {
        match side {
            Side::Above => &self.above,
            Side::Below => &self.below,
        }
    }

    /// Whether a guest can write compressed data to an image of this variant.
    pub(crate) fn passes_compressed(&self, variant: &Variant) -> bool {
        variant.compress && self.above.iter().all(|filter| filter.passes_compressed())
    }

    /// Whether an image of this variant can be resized.
    pub(crate) fn resizes(&self, variant: &Variant) -> bool {
        variant.resizes && self.filters().all(|(side, filter)| filter.resizes(side))
    }

    /// Whether the stack has this filter on one of the sides.
    fn has(&self, filter: Filter) -> bool {
        self.filters().any(|(_, other)| other == filter)
    }

    /// Whether the image is behind [`START`] bytes of its file.
    pub(crate) fn has_start(&self) -> bool {
        self.below.contains(&Part)
    }

    /// The number of copies that the filters of one side use.
    pub(crate) fn copies(&self, side: Side) -> usize {
        self.side(side).iter().map(|filter| filter.copies()).sum()
    }

    /// Puts the filters of one side above a node. `copies` are the copies of the node, `size` is the size of the disk in bytes.
    pub(crate) fn wrap(&self, side: Side, node: Value, copies: &[Value], size: u64) -> Value {
        let mut copies = copies;
        self.side(side).iter().fold(node, |node, filter| {
            let (own, rest) = copies.split_at(filter.copies());
            copies = rest;
            filter.wrap(side, &node, own, size)
        })
    }
}

/// A graph for filters.
pub(crate) fn graph() -> Graph {
    let objects = Objects::from(formats::secrets());
    let mut limits = Options::from_dotted("x-iops-total=10000000", None).expect("limits");
    let limits = GroupLimits::take(&mut limits, Notation::KeyValue).expect("limits");
    objects.add(GROUP, Group::new(GROUP, limits)).expect("a new identifier");
    Graph::with_objects(oxblk::drivers(), Gate::Anything, objects)
}

/// The options of a node in the form of JSON.
pub(crate) fn options(node: &Value) -> Options {
    Options::from_json(&node.to_string()).expect("valid options")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::named;

    #[test]
    fn a_random_stack_obeys_the_rules_of_its_filters_and_each_filter_occurs_on_each_side() {
        let [variant] = named("qcow2-4k")[..] else { panic!("one variant") };
        let mut random = Random::new(1);
        let mut seen = Vec::new();
        for _ in 0..1000 {
            let stack = Stack::random(variant, &mut random);
            assert!((1..=5).contains(&stack.len()));
            let mut checked = Stack::default();
            for (side, filter) in stack.filters() {
                assert!(checked.push(variant, side, filter), "{stack:?}");
                if !seen.contains(&(side, filter)) {
                    seen.push((side, filter));
                }
            }
        }
        assert_eq!(seen.len(), 2 * Filter::ALL.len() - 1);
    }

    #[test]
    fn compress_needs_an_image_that_compresses_directly_below() {
        let [qcow2, raw] = ["qcow2-4k", "raw"].map(|name| named(name)[0]);
        assert!(Stack::alone(raw, Side::Above, Compress).is_none());
        let mut stack = Stack::alone(qcow2, Side::Above, Throttle).expect("it fits");
        assert!(stack.passes_compressed(qcow2));
        assert!(stack.push(qcow2, Side::Above, Compress));
        assert!(!stack.passes_compressed(qcow2));
        assert!(!stack.push(qcow2, Side::Above, Compress));
    }
}
