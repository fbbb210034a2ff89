//! Fuzz target; see `oxblk_tests::fuzz::nbd_negotiation`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| oxblk_tests::fuzz::nbd_negotiation::run(data));
