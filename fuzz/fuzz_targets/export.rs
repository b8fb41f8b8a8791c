#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fleet_fuzz_libfuzzer::run("export", input));
