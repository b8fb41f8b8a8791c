//! Any [X-Fleet] section: no panic, no long time, and the same through the normal form.
#![no_main]
use fleet_unit::{Requirements, UnitFile, UnitName, requirements};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &str)| {
    let (which, text) = input;
    let names = ["hello.service", "hello@.service", "hello@1.service", "a@b@c.timer"];
    let name = UnitName::parse(names[usize::from(which) % names.len()]).expect("a valid name");
    let Ok(file) = UnitFile::parse(&format!("[X-Fleet]\n{text}")) else { return };
    let again = UnitFile::parse(&file.normal_form()).expect("a normal form can be read");

    let read = Requirements::of(&name, &file);
    assert_eq!(read, Requirements::of(&name, &again));
    assert_eq!(requirements::unknown_options(&file), requirements::unknown_options(&again));
    assert_eq!(requirements::ignored_metadata(&name, &file), requirements::ignored_metadata(&name, &again));

    let Ok(read) = read else { return };
    assert!(read.metadata.iter().all(|(key, values)| !key.is_empty() && !values.is_empty()));
    if !name.is_template() {
        let patterns = read.conflicts.iter().chain(&read.replaces);
        let matched = patterns.clone().any(|glob| read.machine_of.iter().any(|peer| glob.matches(peer)));
        assert!(!matched, "a peer that must not be there");
        assert!(read.machine_id.is_none() || patterns.count() == 0);
    }
});
