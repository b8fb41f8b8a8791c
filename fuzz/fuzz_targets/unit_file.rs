//! Any bytes as a unit file: no panic, the text kept, the normal form stable, also through options.
#![no_main]
use fleet_unit::{UnitFile, UnitName, lint};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = UnitFile::from_bytes(bytes) else { return };
    assert_eq!(file.text().as_bytes(), bytes);
    assert!((0..file.options().len()).all(|index| file.line_of(index).is_some()));

    let normal = file.normal_form();
    let again = UnitFile::parse(&normal).expect("a normal form can be read");
    assert_eq!(again.normal_form(), normal);
    assert_eq!(again.hash(), file.hash());
    assert_eq!(again.description(), file.description());

    let of_options = UnitFile::from_options(file.options().to_vec()).expect("options that were read");
    assert_eq!(of_options, again);

    let name = UnitName::parse("fuzz.service").expect("a valid name");
    for rejection in lint::rejections(&name, &file) {
        assert!(rejection.line <= 1 + file.text().matches('\n').count());
        assert!(!rejection.reason.is_empty());
    }
});
