//! Fuzzes [`dtr_fuzz::block`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dtr_fuzz::block(bytes));
