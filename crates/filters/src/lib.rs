//! Filter drivers. A filter shows the data of its child unchanged, and adds something to the requests. The crate also contains
//! drivers that work together with filters.
//!
//! | folder | filter |
//! |---|---|
//! | `blkdebug` | fails and suspends requests at chosen steps of the driver above |
//! | `blklogwrites` | records all changes in a log that can be replayed |
//! | `blkverify` | compares an image with a raw copy |
//! | `compress` | makes writes compressed writes |
//! | `copy_before_write` | keeps the contents that a disk has at one point in time |
//! | `copy_on_read` | copies data that is read from backing files to the image below |
//! | `preallocate` | makes the file below longer than needed |
//! | `quorum` | stores the same data in several children, and reads the data on which they agree |
//! | `replication` | passes writes on to another host, or shows a disk as it was at the last checkpoint, plus the writes of a guest |
//! | `snapshot_access` | shows the contents that `copy_before_write` keeps |
//! | `throttle` | limits the rate of requests, alone or together with other nodes |
#![forbid(unsafe_code)]

mod below;
pub mod blkdebug;
pub mod blklogwrites;
pub mod blkverify;
pub mod compress;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod preallocate;
pub mod quorum;
pub mod replication;
pub mod snapshot_access;
pub mod throttle;
