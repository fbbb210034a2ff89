//! Filter drivers. A filter shows the data of its child unchanged, and adds something to the requests.
//!
//! | folder | filter |
//! |---|---|
//! | `blkdebug` | fails and suspends requests at chosen steps of the driver above |
//! | `blkverify` | compares an image with a raw copy |
//! | `quorum` | stores the same data in several children, and reads the data on which they agree |
//! | `throttle` | limits the rate of requests, alone or together with other nodes |
#![forbid(unsafe_code)]

pub mod blkdebug;
pub mod blkverify;
pub mod quorum;
pub mod throttle;
