//! `oxblk serve`, and clients of others.

mod guest_boot;
mod peers;
mod serve;
mod served;
