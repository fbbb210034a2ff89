//! Fuzz target; see `oxblk_tests::fuzz::qcow2_tables`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::qcow2_tables::run(data));
