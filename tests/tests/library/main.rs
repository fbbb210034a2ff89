//! Tests of the library from the view of an embedder.

mod bitmaps;
mod closing;
mod examine;
mod examples;
mod executors;
mod files;
mod one_writer;
mod opening;
mod programs;
