use super::*;
use proptest::prelude::*;

fn of(name: &str, section: &str) -> Result<Requirements, RequirementError> {
    let file = UnitFile::parse(&format!("[X-Fleet]\n{section}\n")).unwrap();
    Requirements::of(&UnitName::parse(name).unwrap(), &file)
}

fn read(section: &str) -> Requirements {
    of("hello.service", section).unwrap_or_else(|error| panic!("{error} in {section}"))
}

fn patterns(globs: &[Glob]) -> Vec<&str> {
    globs.iter().map(Glob::as_str).collect()
}

fn metadata(section: &str) -> Vec<(String, Vec<String>)> {
    read(section).metadata.into_iter().map(|(k, v)| (k, v.into_iter().collect())).collect()
}

#[test]
fn refuses_contradictions_with_the_texts_of_the_original() {
    // golden/04-submit.txt "options that cannot go together", golden/19-api.txt.
    let cases = [
        ("MachineID=abc\nConflicts=x*", "MachineID cannot be used with Conflicts"),
        ("MachineID=abc\nMachineOf=x.service", "MachineID cannot be used with Peers"),
        ("MachineID=abc\nGlobal=true", "MachineID cannot be used with Global"),
        ("MachineID=abc\nReplaces=x.service", "MachineID cannot be used with Replaces"),
        ("Global=true\nMachineOf=x.service", "Global cannot be used with Peers"),
        ("Global=true\nReplaces=x", "Global cannot be used with Replaces"),
        ("Conflicts=a\nReplaces=b", "Conflicts cannot be used with Replaces"),
        (
            "MachineOf=x.service\nConflicts=x*",
            r#"unresolvable requirements: peer "x.service" matches conflict "x*""#,
        ),
        (
            "MachineOf=x.service\nReplaces=x*",
            r#"unresolvable requirements: peer "x.service" matches replace "x*""#,
        ),
        (
            "X-Conflicts=b*\nX-ConditionMachineOf=b.service",
            r#"unresolvable requirements: peer "b.service" matches conflict "b*""#,
        ),
        ("X-ConditionMachineBootID=abc\nGlobal=true", "MachineID cannot be used with Global"),
        // The order of the checks: pairs of a peer and a pattern, then of MachineID, then of Global.
        (
            "MachineID=a\nGlobal=true\nMachineOf=y.service x.service\nConflicts=x*\nReplaces=y*",
            r#"unresolvable requirements: peer "y.service" matches replace "y*""#,
        ),
        (
            "MachineID=a\nGlobal=true\nMachineOf=y.service\nConflicts=x\nReplaces=z",
            "MachineID cannot be used with Peers",
        ),
        ("MachineID=a\nGlobal=1\nConflicts=x\nReplaces=z", "MachineID cannot be used with Conflicts"),
        ("MachineID=a\nGlobal=1\nReplaces=z", "MachineID cannot be used with Global"),
        ("Global=1\nMachineOf=y.service\nReplaces=z", "Global cannot be used with Peers"),
        ("Global=1\nConflicts=y\nReplaces=z", "Global cannot be used with Replaces"),
        // Specifiers are expanded first.
        (
            "MachineOf=%p.socket\nConflicts=%N*",
            r#"unresolvable requirements: peer "hello.socket" matches conflict "hello*""#,
        ),
    ];
    for (section, text) in cases {
        assert_eq!(of("hello.service", section).unwrap_err().to_string(), text, "{section}");
    }
}

#[test]
fn on_isolation() {
    let stop = OnIsolation::Stop;
    for (section, want) in [
        ("", OnIsolation::Keep),
        ("OnIsolation=", OnIsolation::Keep),
        ("OnIsolation=keep", OnIsolation::Keep),
        ("OnIsolation=keep\nGlobal=true", OnIsolation::Keep),
        ("OnIsolation=stop", stop),
        ("OnIsolation=\"stop\"", stop),
        ("OnIsolation=stop\nOnIsolation=\nOnIsolation=stop", stop),
        ("OnIsolation=stop\nMachineID=abc", stop),
        ("OnIsolation=stop\nGlobal=no", stop),
    ] {
        assert_eq!(read(section).on_isolation, want, "{section}");
    }
    for (section, text) in [
        ("OnIsolation=stop\nOnIsolation=keep", "OnIsolation is both keep and stop"),
        ("OnIsolation=\"keep\" \"stop\"", "OnIsolation is both keep and stop"),
        ("OnIsolation=Stop", r#"OnIsolation has to be keep or stop, not "Stop""#),
        ("OnIsolation=true", r#"OnIsolation has to be keep or stop, not "true""#),
        ("OnIsolation=%p", r#"OnIsolation has to be keep or stop, not "hello""#),
        ("OnIsolation=stop keep", r#"OnIsolation has to be keep or stop, not "stop keep""#),
        ("OnIsolation=stop\nGlobal=true", "Global cannot be used with OnIsolation=stop"),
        // What the original refused is refused in its words first.
        ("OnIsolation=x\nGlobal=true\nMachineID=a", "MachineID cannot be used with Global"),
    ] {
        assert_eq!(of("hello.service", section).unwrap_err().to_string(), text, "{section}");
        assert_eq!(of("hello@.service", section).is_err(), section != "OnIsolation=%p", "{section}");
    }
    // An instance can say it by its name.
    assert_eq!(of("hello@stop.service", "OnIsolation=%i").unwrap().on_isolation, stop);
    assert!(of("hello@now.service", "OnIsolation=%i").is_err());
    let file = UnitFile::parse("[X-Fleet]\nOnIsolation=stop\nOnIsolaton=stop\n").unwrap();
    assert_eq!(unknown_options(&file), ["OnIsolaton"]);
}

#[test]
fn what_was_accepted_before_an_option_was_known_stays_readable() {
    let hello = UnitName::parse("hello.service").unwrap();
    for section in
        ["OnIsolation=whatever", "OnIsolation=keep\nOnIsolation=stop", "Global=true\nOnIsolation=stop"]
    {
        let file = UnitFile::parse(&format!("[X-Fleet]\n{section}\n")).unwrap();
        assert!(Requirements::of(&hello, &file).is_err(), "{section}");
        let read = Requirements::of_accepted(&hello, &file).unwrap();
        assert_eq!(read.on_isolation, OnIsolation::Keep, "{section}");
    }
    let file = UnitFile::parse("[X-Fleet]\nOnIsolation=stop\nConflicts=a*\n").unwrap();
    assert_eq!(Requirements::of_accepted(&hello, &file), Requirements::of(&hello, &file));
    let file = UnitFile::parse("[X-Fleet]\nMachineID=a\nGlobal=true\n").unwrap();
    assert_eq!(Requirements::of_accepted(&hello, &file), Requirements::of(&hello, &file));
}

#[test]
fn takes_what_goes_together() {
    for section in [
        "Global=true\nConflicts=x*",
        "Global=true\nMachineMetadata=a=b",
        "MachineID=abc\nMachineMetadata=a=b",
        // A malformed pattern matches nothing.
        "Conflicts=[a\nMachineOf=a.service",
        "MachineOf=a.service\nConflicts=b*",
        "MachineOf=a.service\nReplaces=b*",
        "Global=no\nMachineOf=a.service",
        "X-Global=true\nMachineOf=a.service",
    ] {
        assert!(!read(section).is_empty(), "{section}");
    }
    assert!(read("X-Global=true").is_empty());
    let other = UnitFile::parse("[Service]\nConflicts=a\nMachineID=b\n").unwrap();
    assert!(Requirements::of(&UnitName::parse("a.service").unwrap(), &other).unwrap().is_empty());
}

#[test]
fn machine_id() {
    let cases = [
        ("", None),
        ("MachineID=123", Some("123")),
        ("MachineID=\"123\" \"456\"", Some("123")),
        ("MachineID=123\nMachineID=456", Some("123")),
        ("X-ConditionMachineID=\"456\"\nMachineID=\"123\"", Some("123")),
        ("X-ConditionMachineBootID=123\nX-ConditionMachineID=456", Some("456")),
        ("X-ConditionMachineBootID=123", Some("123")),
        // Says nothing, or asks for something that is not there.
        ("MachineID=", None),
        ("MachineID=%i", Some("")),
    ];
    for (section, want) in cases {
        assert_eq!(read(section).machine_id.as_deref(), want, "{section}");
    }
}

#[test]
fn machine_of_conflicts_and_replaces() {
    assert_eq!(
        read("MachineOf=a.service\nX-ConditionMachineOf=b.service\nMachineOf=a.service c.service").machine_of,
        ["b.service", "a.service", "c.service"]
    );
    assert!(read("MachineOf=").machine_of.is_empty());
    assert_eq!(read("MachineOf=%i").machine_of, [""]);
    for (section, want) in [
        ("Conflicts=*bar*", vec!["*bar*"]),
        ("Conflicts=a* b*", vec!["a*", "b*"]),
        ("Conflicts=\"a* b*\" \"c\"\nX-Conflicts=d", vec!["d", "a*", "b*", "c"]),
        ("Conflicts=a \\\n  b\\\n c", vec!["a", "b", "c"]),
        ("Conflicts=", vec![]),
    ] {
        assert_eq!(patterns(&read(section).conflicts), want, "{section}");
        let section = section.replace("X-Conflicts", "Replaces").replace("Conflicts", "Replaces");
        let mut want = want;
        want.sort_unstable();
        let replaces = read(&section).replaces;
        let mut got = patterns(&replaces);
        got.sort_unstable();
        assert_eq!(got, want, "{section}");
    }
}

#[test]
fn metadata_pairs() {
    let one = |key: &str, values: &[&str]| {
        (key.to_owned(), values.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(metadata("MachineMetadata=foo=bar"), [one("foo", &["bar"])]);
    assert_eq!(
        metadata("MachineMetadata=\"region=us-east-1\" \"diskType=SSD\"\nMachineMetadata=region=us-west-1"),
        [one("diskType", &["SSD"]), one("region", &["us-east-1", "us-west-1"])]
    );
    // On two lines with a backslash.
    assert_eq!(metadata("MachineMetadata=\"a=b\" \\\n\"c=d\""), [one("a", &["b"]), one("c", &["d"])]);
    assert_eq!(metadata("MachineMetadata=location=New York"), [one("location", &["New York"])]);
    assert_eq!(
        metadata("MachineMetadata=oh=yeah\nX-ConditionMachineMetadata=\"oh=no\" \"one=%p\""),
        [one("oh", &["no", "yeah"]), one("one", &["hello"])]
    );
    let file = UnitFile::parse(
        "[X-Fleet]\nMachineMetadata=foo=\nMachineMetadata==asdf\nMachineMetadata=foo=asdf=WHAT\n\
         MachineMetadata=a=b c=d\nMachineMetadata=foo\nMachineMetadata=\nMachineMetadata=x=y\n",
    )
    .unwrap();
    let name = UnitName::parse("hello.service").unwrap();
    let requirements = Requirements::of(&name, &file).unwrap();
    assert_eq!(requirements.metadata.keys().collect::<Vec<_>>(), ["x"]);
    assert_eq!(ignored_metadata(&name, &file), ["foo=", "=asdf", "foo=asdf=WHAT", "a=b c=d", "foo"]);
}

#[test]
fn global() {
    for (section, want) in [
        ("Global=true", true),
        ("Global=TRUE", true),
        ("Global=yes", true),
        ("Global=1", true),
        ("Global=on", true),
        ("Global=t", true),
        ("Global=\"true\"", true),
        ("Global=y", false),
        ("Global=false", false),
        ("Global=", false),
        // The last one counts.
        ("Global=true\nGlobal=no", false),
        ("Global=true\nGlobal=", false),
        ("Global=no\nGlobal=true", true),
    ] {
        assert_eq!(read(section).global, want, "{section}");
    }
}

#[test]
fn specifiers() {
    let expanded = |name: &str, value: &str| {
        of(name, &format!("MachineID={value}")).unwrap().machine_id.unwrap_or_default()
    };
    for (value, plain, instance) in [
        ("%n", "test.service", "ssh@2.service"),
        ("%N", "test", "ssh@2"),
        ("%p", "test", "ssh"),
        ("%i", "", "2"),
        ("a%p-%ib%", "atest-b%", "assh-2b%"),
        // Not doubled, as in the original.
        ("%%n", "%test.service", "%ssh@2.service"),
        ("%m%h", "%m%h", "%m%h"),
        ("%ä", "%ä", "%ä"),
    ] {
        assert_eq!(expanded("test.service", value), plain);
        assert_eq!(expanded("ssh@2.service", value), instance);
    }
}

#[test]
fn templates_are_checked_with_specifiers_as_they_stand() {
    let section = "MachineOf=db%i.service\nConflicts=db.service";
    assert!(of("web@.service", section).is_ok());
    assert!(of("web@1.service", section).is_ok());
    let error = of("web@.service", "MachineOf=db%i.service\nConflicts=db*").unwrap_err();
    assert_eq!(error.to_string(), r#"unresolvable requirements: peer "db%i.service" matches conflict "db*""#);
}

#[test]
fn unknown_names() {
    let unknown = |section: &str| unknown_options(&UnitFile::parse(section).unwrap());
    assert_eq!(
        unknown(
            "[X-Fleet]\nMachineMetaData=a=b\nX-Global=true\nX-MachineID=a\nMachineMetaData=c=d\n\
             [Service]\nFoo=bar\n"
        ),
        ["MachineMetaData", "X-Global", "X-MachineID"]
    );
    let known = "[X-Fleet]\nMachineID=\nMachineOf=\nMachineMetadata=\nConflicts=\nGlobal=\nReplaces=\n\
                 X-ConditionMachineID=\nX-ConditionMachineBootID=\nX-ConditionMachineOf=\n\
                 X-ConditionMachineMetadata=\nX-Conflicts=\n";
    assert!(unknown(known).is_empty());
}

#[test]
fn values_are_bounded() {
    let many = |line: &str, times: usize| of("hello@1.service", &line.repeat(times));
    assert!(many("Conflicts=a\n", 16 << 10).is_ok());
    assert_eq!(many("Conflicts=a\n", (16 << 10) + 1), Err(RequirementError::TooLarge));
    // Their size counts with specifiers expanded.
    assert_eq!(many("Conflicts=%n%n%n%n%n\n", 512), Err(RequirementError::TooLarge));
}

proptest! {
    #[test]
    fn never_panics(
        name in prop::sample::select(&["a.service", "a@.service", "a@b@c.timer"]),
        lines in prop::collection::vec(
            (
                prop::sample::select(&[
                    "MachineID", "MachineOf", "MachineMetadata", "Conflicts", "Global", "Replaces",
                    "X-Conflicts", "X-ConditionMachineOf", "Other",
                ]),
                "[ab*\\[\\\\\"%niNp= \\t]{0,12}",
            ),
            0..6,
        ),
    ) {
        let section: String = lines.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        let file = UnitFile::parse(&format!("[X-Fleet]\n{section}")).unwrap();
        let name = UnitName::parse(name).unwrap();
        let _ = ignored_metadata(&name, &file);
        prop_assert_eq!(
            unknown_options(&file).is_empty(),
            file.options().iter().all(|o| o.name != "Other"),
        );
        if let Ok(requirements) = Requirements::of(&name, &file) {
            // The same unit through the API asks for the same.
            let again = UnitFile::parse(&file.normal_form()).unwrap();
            prop_assert_eq!(Requirements::of(&name, &again), Ok(requirements));
        }
    }
}
