//! Tests of `oxblk serve`: NBD clients of other projects, addresses, signals, the log, and limited resources.

mod addresses;
mod guest_boot;
mod log;
mod peers;
mod scarce;
mod serve;
mod served;
mod signals;
