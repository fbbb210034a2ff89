//! oxblk: exports.
