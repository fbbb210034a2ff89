//! oxblk: oxblk.
