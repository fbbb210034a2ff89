//! Fuzz target; see `oxblk_tests::fuzz::vpc_header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::vpc_header::run(data));
