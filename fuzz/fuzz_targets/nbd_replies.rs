//! Fuzz target; see `oxblk_tests::fuzz::nbd_replies`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::nbd_replies::run(data));
