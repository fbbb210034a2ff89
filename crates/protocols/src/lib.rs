//! oxblk: protocols.
