//! Random operations, checked against an array of bytes, and cancelled or concurrent operations.

mod control_at_once;
mod given_up;
mod random;
