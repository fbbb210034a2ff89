//! Random stacks of filters above an image and below it. The stacks change nothing that a guest or a check sees.

use oxblk_core::{Gate, Graph, Objects, Options};
use oxblk_filters::throttle::{Group, GroupLimits, Notation};
use serde_json::json;

use crate::formats::{self, Variant};
use crate::random::Random;

/// The identifier of the throttle group of the filters.
const GROUP: &str = "filters";

/// The largest number of filters above an image, and below it.
const MOST: u64 = 3;

/// Filters, the lowest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Filters {
    above: Vec<&'static str>,
    below: Vec<&'static str>,
}

impl Filters {
    /// Chooses filters for an image of this variant.
    pub(super) fn random(variant: &Variant, random: &mut Random) -> Self {
        // The others pass no compressed writes on.
        let above = match variant.compress {
            true => &["copy-on-read", "throttle"][..],
            false => &["copy-on-read", "throttle", "blkdebug", "blklogwrites", "copy-before-write"],
        };
        let below = &["preallocate", "throttle", "blkdebug", "blklogwrites", "copy-before-write"];
        let mut pick = |from: &[&'static str]| {
            (0..random.below(MOST + 1)).map(|_| *random.pick(from)).collect()
        };
        Self { above: pick(above), below: pick(below) }
    }

    /// Puts the filters below an image on its file.
    pub(super) fn on_file(&self, file: Options) -> Options {
        self.below.iter().fold(file, |file, name| wrap(name, &file))
    }

    /// Puts the filters above an image on the image.
    pub(super) fn on_image(&self, image: Options) -> Options {
        self.above.iter().fold(image, |image, name| wrap(name, &image))
    }

    /// The graph for the filters.
    pub(super) fn graph(&self) -> Graph {
        let objects = Objects::from(formats::secrets());
        let mut limits = Options::from_dotted("x-iops-total=10000000", None).expect("limits");
        let limits = GroupLimits::take(&mut limits, Notation::KeyValue).expect("limits");
        objects.add(GROUP, Group::new(GROUP, limits)).expect("a new identifier");
        Graph::with_objects(oxblk::drivers(), Gate::Anything, objects)
    }
}

/// A filter above a node that options describe.
fn wrap(name: &str, below: &Options) -> Options {
    let below = below.to_json();
    let options = match name {
        "blkdebug" => {
            json!({ "driver": name, "image": below, "align": 512, "max-transfer": 1 << 20 })
        }
        "blklogwrites" => {
            let log = json!({ "driver": "null-co", "size": 1_u64 << 40 });
            json!({ "driver": name, "file": below, "log": log })
        }
        "copy-before-write" => {
            let target = json!({ "driver": "null-co", "size": 1_u64 << 40, "read-only": false });
            json!({ "driver": name, "file": below, "target": target })
        }
        "preallocate" => json!({ "driver": name, "file": below, "prealloc-size": 1 << 20 }),
        "throttle" => json!({ "driver": name, "file": below, "throttle-group": GROUP }),
        _ => json!({ "driver": name, "file": below }),
    };
    Options::from_json(&options.to_string()).expect("valid options")
}
