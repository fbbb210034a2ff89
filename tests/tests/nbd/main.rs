//! `oxblk serve` with NBD clients of other projects.

mod addresses;
mod guest_boot;
mod log;
mod peers;
mod scarce;
mod serve;
mod served;
mod signals;
