//! The examples of the library, included as modules.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "they are programs of their own")]
#![allow(clippy::cast_possible_truncation, reason = "examples run on 64-bit machines")]

#[path = "../../../crates/oxblk/examples/bitmap_backup.rs"]
pub mod bitmap_backup;
#[path = "../../../crates/oxblk/examples/convert.rs"]
pub mod convert;
#[path = "../../../crates/oxblk/examples/custom_driver.rs"]
pub mod custom_driver;
#[path = "../../../crates/oxblk/examples/progress.rs"]
pub mod progress;
#[path = "../../../crates/oxblk/examples/read.rs"]
pub mod read;
#[path = "../../../crates/oxblk/examples/serve_nbd.rs"]
pub mod serve_nbd;
#[path = "../../../crates/oxblk/examples/snapshot.rs"]
pub mod snapshot;
#[path = "../../../crates/oxblk/examples/tokio.rs"]
pub mod tokio;
