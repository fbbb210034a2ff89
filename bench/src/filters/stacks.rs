//! The contenders: disks described by options.

use std::path::Path;

use oxblk::{Cache, Disk, IoBuf, IoThreads, Objects, OpenOptions, Options, define_object};
use serde_json::{Value, json};

use super::{CHUNK, SIZE};
use crate::CaseResult;
use crate::random::Random;

/// A filter above the image.
pub(super) struct Stack {
    pub(super) name: &'static str,
    /// The options of the root node. The argument is the description of the image.
    describe: fn(Value) -> Value,
    /// Whether the complete disk is written before each run.
    is_written: bool,
}

/// The first one is the image without a filter.
pub(super) const STACKS: &[Stack] = &[
    Stack { name: "qcow2", describe: |image| image, is_written: false },
    Stack {
        name: "throttle without limits",
        describe: |image| json!({ "driver": "throttle", "throttle-group": "none", "file": image }),
        is_written: false,
    },
    Stack {
        name: "throttle, limits not reached",
        describe: |image| json!({ "driver": "throttle", "throttle-group": "high", "file": image }),
        is_written: false,
    },
    Stack {
        name: "copy-on-read, no backing file",
        describe: |image| json!({ "driver": "copy-on-read", "file": image }),
        is_written: false,
    },
    Stack {
        name: "copy-before-write, all copied",
        describe: |image| {
            let target = json!({ "driver": "null-co", "size": SIZE, "read-only": false });
            json!({ "driver": "copy-before-write", "file": image, "target": target })
        },
        // The first write to a cluster copies the cluster.
        is_written: true,
    },
    Stack {
        name: "blkdebug without rules",
        describe: |image| json!({ "driver": "blkdebug", "image": image }),
        is_written: false,
    },
    Stack {
        name: "quorum of one",
        describe: |image| json!({ "driver": "quorum", "vote-threshold": 1, "children": [image] }),
        is_written: false,
    },
];

/// The throttle groups: one without limits, and one whose limits no run reaches.
const GROUPS: [&str; 2] = [
    "throttle-group,id=none",
    "throttle-group,id=high,limits.iops-total=100000000,limits.bps-total=1000000000000",
];

impl Stack {
    /// Opens the disk on the qcow2 image at `path`.
    pub(super) fn open(&self, path: &Path, threads: &IoThreads) -> Result<Disk, String> {
        let objects = Objects::default();
        for group in GROUPS {
            define_object(&objects, group).map_err(|error| error.to_string())?;
        }
        let file = json!({ "driver": "file", "filename": path.to_string_lossy() });
        let image = json!({ "driver": "qcow2", "file": file });
        let options = Disk::options().objects(objects);
        let disk = open(options, &(self.describe)(image), threads)?;
        if self.is_written {
            fill(&disk)?;
        }
        Ok(disk)
    }
}

/// Opens the raw image at `path` with `O_DIRECT`.
pub(super) fn open_direct(path: &Path, threads: &IoThreads) -> Result<Disk, String> {
    let file = json!({ "driver": "file", "filename": path.to_string_lossy() });
    open(Disk::options().cache(Cache::None), &json!({ "driver": "raw", "file": file }), threads)
}

fn open(options: OpenOptions, root: &Value, threads: &IoThreads) -> Result<Disk, String> {
    let described = Options::from_json(&root.to_string()).map_err(|error| error.to_string())?;
    let options = options.options(&described).threads(threads.clone()).resizable(false);
    options.require_write(true).open_described().wait().map_err(|error| error.to_string())
}

/// Writes random data to the complete disk, and flushes the disk.
pub(super) fn fill(disk: &Disk) -> CaseResult {
    let mut random = Random::new(1);
    let mut chunk = vec![0; CHUNK];
    for offset in (0..disk.size()).step_by(CHUNK) {
        random.fill(&mut chunk);
        let data = IoBuf::from(chunk.clone());
        disk.write(offset, data).wait().map_err(|error| error.to_string())?;
    }
    disk.flush().wait().map_err(|error| error.to_string())
}
