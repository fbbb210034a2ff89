//! oxblk.

fn main() {}
