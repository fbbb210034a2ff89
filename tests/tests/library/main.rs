//! The library as an embedder uses it.

mod bitmaps;
mod closing;
mod examine;
mod examples;
mod executors;
mod files;
mod one_writer;
mod opening;
mod programs;
