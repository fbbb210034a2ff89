//! The library as an embedder uses it.

mod closing;
mod examine;
mod examples;
mod executors;
mod opening;
mod programs;
