//! Filter drivers. A filter shows the data of its child unchanged, and adds something to the requests.
//!
//! | folder | filter |
//! |---|---|
//! | `blkdebug` | fails and suspends requests at chosen steps of the driver above |
//! | `blklogwrites` | records all changes in a log that can be replayed |
//! | `blkverify` | compares an image with a raw copy |
//! | `quorum` | stores the same data in several children, and reads the data on which they agree |
//! | `throttle` | limits the rate of requests, alone or together with other nodes |
#![forbid(unsafe_code)]

pub mod blkdebug;
pub mod blklogwrites;
pub mod blkverify;
pub mod quorum;
pub mod throttle;
