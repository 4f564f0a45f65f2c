//! Fuzzes [`dtr_fuzz::codec`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dtr_fuzz::codec(bytes));
