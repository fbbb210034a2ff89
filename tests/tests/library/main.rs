//! The library as an embedder uses it.

mod bitmaps;
mod closing;
mod examples;
mod executors;
mod files;
mod programs;
