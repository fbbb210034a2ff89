//! oxblk: core.

pub mod bitmap;
