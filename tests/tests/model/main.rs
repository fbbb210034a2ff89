//! Random operations against an array of bytes.

mod given_up;
mod random;
