//! Fuzzes [`dtr_fuzz::manifest`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dtr_fuzz::manifest(bytes));
