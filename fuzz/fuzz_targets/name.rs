//! Any string as a name and as an argument: no panic, a valid name is safe and made of its parts.
#![no_main]
use fleet_unit::{UnitName, UnitType, name};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let argument = name::from_argument(text);
    assert!(!argument.contains('/'));
    let suffix = argument.rsplit_once('.').map(|(_, suffix)| suffix);
    assert!(suffix.is_some_and(|suffix| UnitType::from_suffix(suffix).is_some()));

    let name = match UnitName::parse(text) {
        Ok(name) => name,
        Err(error) => {
            assert!(!error.to_string().contains(['\n', '\0']));
            return;
        }
    };
    assert!(text.len() <= name::MAX_LENGTH && !text.contains('/') && text != "." && text != "..");
    assert_eq!(argument, text);
    assert_eq!(format!("{}.{}", name.stem(), name.kind()), text);
    match name.instance() {
        Some(instance) => assert_eq!(format!("{}@{instance}", name.prefix()), name.stem()),
        None => assert_eq!(name.prefix(), name.stem()),
    }
    if let Some(template) = name.template() {
        assert!(template.is_template() && UnitName::parse(template.as_str()).as_ref() == Ok(&template));
    }
});
