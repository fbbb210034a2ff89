//! The library as an embedder uses it.

mod bitmaps;
mod closing;
mod examine;
mod examples;
mod executors;
mod files;
mod opening;
mod programs;
