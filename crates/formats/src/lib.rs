//! oxblk: formats.
