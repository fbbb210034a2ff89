//! Fuzz target; see `oxblk_tests::fuzz::vdi_header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::vdi_header::run(data));
