//! Fuzzes [`dtr_fuzz::frame`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dtr_fuzz::frame(bytes));
