//! Fuzz target; see `oxblk_tests::fuzz::qcow2_subclusters`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::qcow2_subclusters::run(data));
