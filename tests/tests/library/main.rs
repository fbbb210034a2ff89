//! Tests of the library, which use it as other programs do.

mod bitmaps;
mod closing;
mod examine;
mod examples;
mod executors;
mod files;
mod one_writer;
mod opening;
mod programs;
