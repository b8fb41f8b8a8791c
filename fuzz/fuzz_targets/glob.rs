//! Any pattern on any text: no panic, no long time, a malformed pattern matches nothing.
#![no_main]
use fleet_unit::Glob;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (pattern, text) = input;
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
});
