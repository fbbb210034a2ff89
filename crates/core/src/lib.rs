//! oxblk: core.
