//! Unit files, [X-Fleet], patterns and names.

use super::{Seen, about};
use fleet_unit::{
    Glob, Requirements, UnitFile, UnitName, UnitType, lint, name as names, requirements as options,
};

pub(super) const WORDS: &[&str] = &[
    "[Unit]\n",
    "[Service]\n",
    "[X-Fleet]\n",
    "ExecStart=",
    "Description=",
    "Type=oneshot\n",
    "\\\n",
    "# ",
    "Restart=always\n",
    "Environment=\"A=b\"\n",
    "Global=true\n",
];
pub(super) const FLEET_WORDS: &[&str] = &[
    "MachineID=",
    "MachineOf=",
    "MachineMetadata=",
    "Conflicts=",
    "Global=true",
    "Replaces=",
    "OnIsolation=stop",
    "X-ConditionMachineID=",
    "%n",
    "%p",
    "%i",
    "%m",
    "\"a=b\" \"c=d\"",
    "region=eu",
    "*.service",
    "hello@1.service",
];

/// No panic, the text kept, the normal form stable, also through options.
pub(super) fn file(bytes: &[u8]) -> Seen {
    let file = match UnitFile::from_bytes(bytes) {
        Ok(file) => file,
        Err(error) => return Seen::message(&error.to_string()),
    };
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
    let mut reasons = Vec::new();
    for rejection in lint::rejections(&name, &file) {
        assert!(rejection.line <= 1 + file.text().matches('\n').count());
        assert!(!rejection.reason.is_empty());
        reasons.push(Seen::message(&rejection.reason).0);
    }
    Seen::of((about(file.options().len()), reasons, normal.as_bytes() == bytes))
}

/// An [X-Fleet] section, after a byte that chooses the unit's name: the same through the normal form.
pub(super) fn requirements(bytes: &[u8]) -> Seen {
    let Some((which, text)) = bytes.split_first() else { return Seen::of("nothing") };
    let Ok(text) = std::str::from_utf8(text) else { return Seen::of("no text") };
    let names = ["hello.service", "hello@.service", "hello@1.service", "a@b@c.timer"];
    let name = UnitName::parse(names[usize::from(*which) % names.len()]).expect("a valid name");
    let file = match UnitFile::parse(&format!("[X-Fleet]\n{text}")) {
        Ok(file) => file,
        Err(error) => return Seen::message(&error.to_string()),
    };
    let again = UnitFile::parse(&file.normal_form()).expect("a normal form can be read");

    let read = Requirements::of(&name, &file);
    assert_eq!(read, Requirements::of(&name, &again));
    assert_eq!(options::unknown_options(&file), options::unknown_options(&again));
    assert_eq!(options::ignored_metadata(&name, &file), options::ignored_metadata(&name, &again));

    let read = match read {
        Ok(read) => read,
        Err(error) => return Seen::message(&error.to_string()),
    };
    assert!(read.metadata.iter().all(|(key, values)| !key.is_empty() && !values.is_empty()));
    if !name.is_template() {
        let patterns = read.conflicts.iter().chain(&read.replaces);
        let matched = patterns.clone().any(|glob| read.machine_of.iter().any(|peer| glob.matches(peer)));
        assert!(!matched, "a peer that must not be there");
        assert!(read.machine_id.is_none() || patterns.count() == 0);
    }
    let sizes = [read.metadata.len(), read.conflicts.len(), read.replaces.len(), read.machine_of.len()];
    Seen::of((sizes.map(about), read.global, read.machine_id.is_some(), names.len()))
}

/// A pattern, a newline and a text: no panic, no long time, a malformed pattern matches nothing.
pub(super) fn glob(bytes: &[u8]) -> Seen {
    let Ok(input) = std::str::from_utf8(bytes) else { return Seen::of("no text") };
    let (pattern, text) = input.split_once('\n').unwrap_or((input, ""));
    let glob = Glob::new(pattern);
    let matched = glob.matches(text);
    assert!(glob.is_valid() || !matched);
    if let Some(literal) = glob.literal() {
        assert_eq!(matched, literal == text);
    }
    // One more `*` at the end takes nothing away, but it does not cross a `/`.
    if matched && !text.contains('/') {
        assert!(Glob::new(format!("{pattern}*")).matches(text));
    }
    let escaped: String = text.chars().flat_map(|c| ['\\', c]).collect();
    assert!(Glob::new(escaped).matches(text));
    let signs = ['*', '?', '[', '\\', '^', '-'].map(|sign| about(pattern.matches(sign).count()));
    Seen::of((glob.is_valid(), matched, glob.literal().is_some(), signs))
}

/// A name and an argument: no panic, a valid name is safe and made of its parts.
pub(super) fn name(bytes: &[u8]) -> Seen {
    let Ok(text) = std::str::from_utf8(bytes) else { return Seen::of("no text") };
    let argument = names::from_argument(text);
    assert!(!argument.contains('/'));
    let suffix = argument.rsplit_once('.').map(|(_, suffix)| suffix);
    assert!(suffix.is_some_and(|suffix| UnitType::from_suffix(suffix).is_some()));

    let name = match UnitName::parse(text) {
        Ok(name) => name,
        Err(error) => {
            assert!(!error.to_string().contains(['\n', '\0']));
            return Seen::message(&error.to_string());
        }
    };
    assert!(text.len() <= names::MAX_LENGTH && !text.contains('/') && text != "." && text != "..");
    assert_eq!(argument, text);
    assert_eq!(format!("{}.{}", name.stem(), name.kind()), text);
    match name.instance() {
        Some(instance) => assert_eq!(format!("{}@{instance}", name.prefix()), name.stem()),
        None => assert_eq!(name.prefix(), name.stem()),
    }
    if let Some(template) = name.template() {
        assert!(template.is_template() && UnitName::parse(template.as_str()).as_ref() == Ok(&template));
    }
    Seen::of((name.kind().to_string(), name.instance().is_some(), name.is_template(), about(text.len())))
}
