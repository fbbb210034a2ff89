//! oxblk: nbd.
