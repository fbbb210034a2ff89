//! Fuzz target; see `oxblk_tests::fuzz::qed_header`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::qed_header::run(data));
