//! Random operations against an array of bytes.

mod control_at_once;
mod given_up;
mod random;
