//! `oxblk serve`, and clients of others.

mod addresses;
mod guest_boot;
mod log;
mod peers;
mod serve;
mod served;
mod signals;
