//! Fuzzes [`dtr_fuzz::names`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dtr_fuzz::names(bytes));
