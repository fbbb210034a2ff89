//! oxblk: ring.
