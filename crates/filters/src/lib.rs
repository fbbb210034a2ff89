//! Filter drivers. A filter shows the data of its child unchanged, and adds something to the requests.
//!
//! | folder | filter |
//! |---|---|
//! | `throttle` | limits the rate of requests, alone or together with other nodes |
#![forbid(unsafe_code)]

pub mod throttle;
