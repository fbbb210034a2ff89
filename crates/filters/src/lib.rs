//! Filter drivers. A filter shows the data of its child unchanged, and adds something to the requests.
//!
//! | folder | filter |
//! |---|---|
//! | `blkdebug` | fails and suspends requests at chosen steps of the driver above |
//! | `blkverify` | compares an image with a raw copy |
//! | `compress` | makes writes compressed writes |
//! | `copy_on_read` | copies data that is read from backing files to the image below |
//! | `preallocate` | makes the file below longer than needed |
//! | `throttle` | limits the rate of requests, alone or together with other nodes |
#![forbid(unsafe_code)]

mod below;
pub mod blkdebug;
pub mod blkverify;
pub mod compress;
pub mod copy_on_read;
pub mod preallocate;
pub mod throttle;
