use super::*;
use proptest::prelude::*;

fn option(section: &str, name: &str, value: &str) -> UnitOption {
    UnitOption { section: section.into(), name: name.into(), value: value.into() }
}

fn parse(text: &str) -> UnitFile {
    UnitFile::parse(text).unwrap_or_else(|error| panic!("{error} in {text:?}"))
}

fn short(text: &str) -> String {
    parse(text).hash().short()
}

/// Text of the file, text that the original's `fleetctl cat` printed, hash: golden/05-unit-text.txt.
const GOLDEN: &[(&str, &str, &str)] = &[
    (
        "# head\n[Unit]\n; semicolon\nDescription=With comments\n# inside\n\n\n[Service]\nExecStart=/bin/true\n",
        "[Unit]\nDescription=With comments\n\n[Service]\nExecStart=/bin/true\n",
        "df127d1b9038dfaf556fe231769e6b3ff2541374",
    ),
    (
        "[Service]\nExecStart=/bin/echo a \\\nb\nType=oneshot\n",
        "[Service]\nExecStart=/bin/echo a \\\nb\nType=oneshot\n",
        "4f889b7d9391af65ee47cf51ecca66941fd5edab",
    ),
    (
        "[Service]\nExecStart=\nExecStart=/bin/true\nEnvironment=\n",
        "[Service]\nExecStart=\nExecStart=/bin/true\nEnvironment=\n",
        "2dcfcf4413411d4c30235c8a12fedd88e9bafc92",
    ),
    (
        "[Service]\nExecStart=/bin/true\n[Unit]\nDescription=a\n[Service]\nUser=root\n",
        "[Service]\nExecStart=/bin/true\nUser=root\n\n[Unit]\nDescription=a\n",
        "77510491a3de3169d5f419258167baf9e2876469",
    ),
    (
        "[Service]\n  ExecStart = /bin/echo  two  spaces  \n\tUser\t=\troot\t\n",
        "[Service]\nExecStart=/bin/echo  two  spaces\nUser=root\n",
        "5773f66328d568da6c66088807457d04387a4971",
    ),
    (
        "[Service]\nExecStart=/bin/true",
        "[Service]\nExecStart=/bin/true\n",
        "86943ac9f3754cb90f8dd38bf6da7b0cad074592",
    ),
    (
        "[Service]\r\nExecStart=/bin/true\r\n",
        "[Service]\nExecStart=/bin/true\n",
        "86943ac9f3754cb90f8dd38bf6da7b0cad074592",
    ),
    (
        "[Service]\nEnvironment=A=b=c\nExecStart=/bin/true\n",
        "[Service]\nEnvironment=A=b=c\nExecStart=/bin/true\n",
        "018885990d3015bc077617864ca5c45e2e31b775",
    ),
    (
        "[Service]\nExecStart=/bin/echo \"a\\\"b\" 'c' %n %% \\x41\n",
        "[Service]\nExecStart=/bin/echo \"a\\\"b\" 'c' %n %% \\x41\n",
        "a64eb8d0b6892fb81a68d8e6a42dbbbe0d42964d",
    ),
    (
        "[Service]\nExecStart=/bin/echo a\\\n",
        "[Service]\nExecStart=/bin/echo a\\\n\n",
        "2559636f3f566d57ed18525faece57bd502486ff",
    ),
    (
        "[X-Fleet]\nMachineMetadata=\"region=eu\" \"disk=ssd\"\nConflicts=a* b*\n[Service]\nExecStart=/bin/true\n",
        "[X-Fleet]\nMachineMetadata=\"region=eu\" \"disk=ssd\"\nConflicts=a* b*\n\n[Service]\nExecStart=/bin/true\n",
        "f800f392bc3ac59f9223b8352fe2d30316acd529",
    ),
    (
        "[Unit]\n[Service]\nExecStart=/bin/true\n",
        "[Service]\nExecStart=/bin/true\n",
        "86943ac9f3754cb90f8dd38bf6da7b0cad074592",
    ),
    (
        "[Unit]\nDescription=Grüße ☃\n[Service]\nExecStart=/bin/true\n",
        "[Unit]\nDescription=Grüße ☃\n\n[Service]\nExecStart=/bin/true\n",
        "9bd0f5b642f5cbd061bb25cf5c7cad70f5257bfa",
    ),
    (
        "[Service]\nExecStart=/bin/true\n[Foo Bar]\nx y=z\n",
        "[Service]\nExecStart=/bin/true\n\n[Foo Bar]\nx y=z\n",
        "daae251e08075cb93329cc5bc0fe28aa8c1c1b0a",
    ),
    (
        "\u{feff}[Service]\nExecStart=/bin/true\n",
        "[Service]\nExecStart=/bin/true\n",
        "86943ac9f3754cb90f8dd38bf6da7b0cad074592",
    ),
];

#[test]
fn reads_files_as_the_original() {
    for &(text, normal_form, hash) in GOLDEN {
        let file = parse(text);
        assert_eq!(file.text(), text);
        assert_eq!(file.normal_form(), normal_form, "{text:?}");
        assert_eq!(file.hash().to_string(), hash, "{text:?}");
        assert_eq!(file.hash().short(), hash[..7]);
        assert_eq!(parse(normal_form).hash(), file.hash());
    }
}

#[test]
fn hashes_as_the_original() {
    const LOOP: &str = r#"ExecStart=/bin/bash -c "while true; do echo \"Hello, world\"; sleep 1; done""#;
    const SLEEP: &str = "[Service]\nExecStart=/bin/sleep infinity\n";
    let hello = |description: &str| format!("[Unit]\nDescription={description}\n\n[Service]\n{LOOP}\n");
    let fleet = |options: &str| format!("{SLEEP}\n[X-Fleet]\n{options}\n");
    let mine = "MachineID=4a1e0c2fb7d94e6c8f3a51d2c07e9b11";
    let cases = [
        // golden/04-submit.txt
        (hello("Hello World"), "e55c0ae"),
        (hello("Hello again"), "50f0e4d"),
        (SLEEP.to_owned(), "8385c91"),
        ("[Unit]\nDescription=v2\n[Service]\nExecStart=/bin/sleep infinity\n".to_owned(), "556005c"),
        ("[Unit]\nDescription=v3\n[Service]\nExecStart=/bin/sleep infinity\n".to_owned(), "0a69ac5"),
        // golden/06-load.txt, golden/07-start.txt
        (hello("Hello Again"), "2ebb295"),
        (fleet("MachineMetadata=planet=mars"), "2c5337e"),
        ("[Service]\nExecStart=relative/path\n".to_owned(), "c1fee78"),
        ("[Unit]\nDescription=no Service section\n".to_owned(), "4aefd5e"),
        ("[Service]\nExecStart=/bin/false\n".to_owned(), "1fa41b0"),
        ("[Service]\nExecStart=/nonexistent/program\n".to_owned(), "3a22f24"),
        (
            "[Service]\nExecStart=/bin/sh -c 'sleep 0.3; exit 1'\nRestart=always\nRestartSec=0.2\n".to_owned(),
            "a3c73a4",
        ),
        ("[Service]\nExecStart=/bin/true\nType=oneshot\n".to_owned(), "8db2052"),
        ("[Service]\nExecStart=/bin/true\nType=oneshot\nRemainAfterExit=yes\n".to_owned(), "acfe4b4"),
        ("[Service]\nExecStart=/bin/sleep infinity\nExecStartPre=/bin/sleep 4\n".to_owned(), "8b77cd9"),
        (
            "[Service]\nExecStart=/bin/sh -c 'sleep 3; systemd-notify --ready; sleep infinity'\nType=notify\nNotifyAccess=all\n".to_owned(),
            "972ba67",
        ),
        ("[Service]\nExecStart=/bin/cat\nStandardInput=socket\n".to_owned(), "f56ff66"),
        ("[Socket]\nListenStream=/run/sock.test\nAccept=yes\n".to_owned(), "b178ab7"),
        (
            "[Timer]\nOnActiveSec=600\nOnUnitActiveSec=600\n\n[X-Fleet]\nMachineOf=tick.service\n".to_owned(),
            "1755095",
        ),
        (
            "[Path]\nPathExists=/nonexistent-watch\nUnit=tick.service\n\n[X-Fleet]\nMachineOf=tick.service\n".to_owned(),
            "cc41cbd",
        ),
        (fleet("Conflicts=only*.service"), "e6ef53d"),
        // golden/08-list-units.txt
        (fleet("Global=true"), "d7594b2"),
        // golden/16-node.txt
        (format!("{}\n# comment\n[X-Fleet]\n{mine}\n", hello("Hello World")), "e33b021"),
        (format!("{SLEEP}\n[Install]\nWantedBy=bad name\n\n[X-Fleet]\n{mine}\n"), "b463794"),
        (fleet(mine), "113f8b8"),
    ];
    for (text, hash) in &cases {
        assert_eq!(short(text), *hash, "{text}");
    }
    // The file of the tutorial.
    let tutorial = r#"[Unit]
Description=My Service
After=docker.service

[Service]
TimeoutStartSec=0
ExecStartPre=-/usr/bin/docker kill hello
ExecStartPre=-/usr/bin/docker rm hello
ExecStartPre=/usr/bin/docker pull busybox
ExecStart=/usr/bin/docker run --name hello busybox /bin/sh -c "while true; do echo Hello World; sleep 1; done"
ExecStop=/usr/bin/docker stop hello
"#;
    assert_eq!(short(tutorial), "0d1c468");
    assert_eq!(parse(tutorial).normal_form(), tutorial);
}

#[test]
fn refuses_what_the_original_refused() {
    let cases = [
        ("[Service]\nthis is no option\n", 2, "unexpected newline encountered while parsing option name"),
        (
            "[Service]\n\n# c\nno=\r\noption\r\n",
            5,
            "unexpected newline encountered while parsing option name",
        ),
        ("[Service]\nno option", 2, "unexpected end of file encountered while parsing option name"),
        ("\n[Service\nExecStart=/bin/true\n", 2, "unable to find end of section"),
        ("[A]\nb=c\n[B] d\n", 3, "found garbage after section name B: d"),
        (
            "[A\n\x1b[31m] \"\\\x0e\u{9b}é\n",
            2,
            r#"found garbage after section name A\n\u{1b}[31m: "\\u{e}\u{9b}é"#,
        ),
        ("[A]\nb=c\0\n", 2, "unit file contains a NUL byte"),
        (
            "[Service]\nExecStart=/bin/echo a\n  b\n",
            3,
            "unexpected newline encountered while parsing option name",
        ),
    ];
    for (text, line, message) in cases {
        let error = UnitFile::parse(text).unwrap_err();
        assert_eq!((error.line(), error.to_string().as_str()), (line, message), "{text:?}");
    }
}

#[test]
fn bounds_the_length_of_lines() {
    let file = |length: usize, end: &str| {
        let option = "ExecStart=/bin/echo ";
        format!("[Service]\n{option}{}{end}", "x".repeat(length - option.len()))
    };
    for end in ["", "\n", "\r\n"] {
        assert!(UnitFile::parse(&file(2047, end)).is_ok());
        let error = UnitFile::parse(&file(2048, end)).unwrap_err();
        assert_eq!(error.to_string(), "line too long (max 2048 bytes)");
        assert_eq!(error.line(), 2);
    }
    // Each line of a continued value counts for itself.
    assert!(UnitFile::parse(&format!("{}\\\n{}\n", file(2000, ""), "y".repeat(2000))).is_ok());
    // An error further up comes first, in the same line or below second.
    let long = "x".repeat(2048);
    let line_and_text = |text: String| {
        let error = UnitFile::parse(&text).unwrap_err();
        (error.line(), error.to_string())
    };
    assert_eq!(line_and_text(format!("[A]\nb\nc={long}\n")).0, 2);
    assert_eq!(line_and_text(format!("[A]\n{long}\nb\n")), (2, "line too long (max 2048 bytes)".to_owned()));
    let value = option("Service", "ExecStart", &"x".repeat(3000));
    assert_eq!(
        UnitFile::from_options(vec![value]).unwrap_err().to_string(),
        "line too long (max 2048 bytes)"
    );
}

#[test]
fn refuses_other_bytes() {
    let cases: [(&[u8], usize, &str); 3] = [
        (b"[A]\nb=\xff\n", 2, "unit file is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\0\0", 1, "unit file contains a NUL byte"),
        (b"[A]\n\n\0", 3, "unit file contains a NUL byte"),
    ];
    for (bytes, line, message) in cases {
        let error = UnitFile::from_bytes(bytes).unwrap_err();
        assert_eq!((error.line(), error.to_string().as_str()), (line, message));
    }
    let mut large = b"[A]\n".to_vec();
    large.extend("b=c\n".repeat(MAX_SIZE / 4 - 1).bytes());
    assert_eq!(large.len(), MAX_SIZE);
    assert!(UnitFile::from_bytes(&large).is_ok());
    large.push(b'\n');
    let error = UnitFile::from_bytes(&large).unwrap_err();
    assert_eq!(error.to_string(), "unit file too large (max 1048576 bytes)");
    assert_eq!(error.line(), MAX_SIZE / 4 + 1);
    assert_eq!(UnitFile::parse(std::str::from_utf8(&large).unwrap()), Err(error));
}

#[test]
fn files_without_options() {
    // golden/04-submit.txt: the API then says that the options field is empty.
    for text in ["", "ExecStart=/bin/true\n", "# only a comment\n", "[Service]\n", "#[A]\n", "rubbish"] {
        let file = parse(text);
        assert!(file.options().is_empty());
        assert_eq!((file.text(), file.normal_form().as_str()), (text, ""));
    }
}

#[test]
fn odd_options() {
    assert_eq!(parse("[Service]\n=value\n").options(), [option("Service", "", "value")]);
    assert_eq!(parse("x[A]\nb=c").options(), [option("A", "b", "c")]);
    assert_eq!(parse("[A]\n<<=bar\n").options(), [option("A", "<<", "bar")]);
    assert_eq!(parse("[A]\nb=c;d # e\n").options(), [option("A", "b", "c;d # e")]);
    assert_eq!(parse("[A]\nb=\u{1}\n").options(), [option("A", "b", "\u{1}")]);
}

#[test]
fn continued_values() {
    let text = "[Service]\nExecStart=echo \\\n  \"pi\\\n  ng\"\nExecStop=\\\necho \"po\\\nng\"\n";
    assert_eq!(
        parse(text).options(),
        [
            option("Service", "ExecStart", "echo \\\n  \"pi\\\n  ng\""),
            option("Service", "ExecStop", "\\\necho \"po\\\nng\""),
        ]
    );
    // A blank line ends the value.
    assert_eq!(parse("[A]\nb=c\\\n\nd=e\n").options(), [option("A", "b", "c\\\n"), option("A", "d", "e")]);
    // So does a backslash that is not at the very end, which it then must not become.
    let file = parse("[A]\nb=c\\ \t\nd=e\n");
    assert_eq!(file.options(), [option("A", "b", "c\\ "), option("A", "d", "e")]);
    assert_eq!(file.normal_form(), "[A]\nb=c\\ \nd=e\n");
    assert_eq!(parse("[A]\nb=c\\").normal_form(), "[A]\nb=c\\\n\n");
}

#[test]
fn comments_within_continued_values_are_left_out() {
    // The original refused this file, systemd takes it.
    let file = parse("[Service]\nExecStart=/bin/echo a \\\n  b \\\n# comment inside\n  c\nUser=root\n");
    assert_eq!(
        file.options(),
        [option("Service", "ExecStart", "/bin/echo a \\\n  b \\\n  c"), option("Service", "User", "root"),]
    );
    assert_eq!(file.options()[0].unfolded_value(), "/bin/echo a  b  c");
    assert_eq!(parse("[A]\nb=c\\\n  ; one \\\n\t# two\nd\n").options(), [option("A", "b", "c\\\nd")]);
    // Elsewhere a comment goes on after a backslash, as in the original.
    assert_eq!(parse("[A]\n# b \\\nno option\nc=d\n").options(), [option("A", "c", "d")]);
}

#[test]
fn lines_of_options() {
    let file = parse("\n# c\n[A]\nb=c \\\n d\n\ne=f\n[B]\ng=h");
    let lines: Vec<_> = (0..4).map(|index| file.line_of(index)).collect();
    assert_eq!(lines, [Some(4), Some(7), Some(9), None]);
}

#[test]
fn options_of_the_api() {
    // golden/19-api.txt "newline in a value"
    let file = UnitFile::from_options(vec![option("Service", "ExecStart", "/bin/true\nUser=root")]).unwrap();
    assert_eq!(
        file.options(),
        [option("Service", "ExecStart", "/bin/true"), option("Service", "User", "root")]
    );
    assert_eq!(file.text(), "[Service]\nExecStart=/bin/true\nUser=root\n");
    // "empty section"
    let nosec = vec![option("", "ExecStart", "/bin/true")];
    let file = UnitFile::from_options(nosec.clone()).unwrap();
    assert_eq!((file.options(), file.text()), (&nosec[..], "[]\nExecStart=/bin/true\n"));
    // "option without name and value"
    let empty = vec![option("Service", "", "")];
    assert_eq!(UnitFile::from_options(empty.clone()).unwrap().options(), empty);
    // "create"
    let sleep = UnitFile::from_options(vec![option("Service", "ExecStart", "/bin/sleep infinity")]).unwrap();
    assert_eq!(sleep.hash().to_string(), "8385c9176f09a5ee3bbb88d45c6fc3f0b69d1f52");
    // What is no option once it is written out.
    assert_eq!(UnitFile::from_options(vec![]).unwrap().text(), "");
    assert!(UnitFile::from_options(vec![option("A]\n", "b", "c")]).is_err());
    assert!(UnitFile::from_options(vec![option("A", "b\nc", "d")]).is_err());
    assert!(UnitFile::from_options(vec![option("A", "b", "c\0")]).is_err());
    let comment = UnitFile::from_options(vec![option("A", "#b", "c"), option("A", "d", "e")]).unwrap();
    assert_eq!((comment.options(), comment.text()), (&[option("A", "d", "e")][..], "[A]\nd=e\n"));
}

#[test]
fn description_and_install() {
    let description = |text: &str| parse(text).description().map(str::to_owned);
    assert_eq!(description("[Unit]\nDescription=a\nDescription = b \n").as_deref(), Some("b"));
    assert_eq!(description("[Unit]\nDescription=a \\\n   b\n").as_deref(), Some("a  b"));
    assert_eq!(description("[Unit]\nDescription=a\nDescription=\n"), None);
    assert_eq!(description("[Service]\nDescription=a\n"), None);
    assert!(parse("[Install]\nWantedBy=a.target\n").has_install());
    assert!(!parse("[Install]\n[A]\nb=c\n").has_install());
}

#[test]
fn hashes_as_text() {
    let text = "1c6fb6f3684bafb0c173d8b8b957ceff031180c1";
    let hash = parse("[Service]\nExecStart=/bin/sleep 100\n").hash();
    assert_eq!(Hash::parse(text), Some(hash));
    assert_eq!(Hash::parse(&text.to_uppercase()), Some(hash));
    assert_eq!((hash.short().as_str(), format!("{hash:?}").as_str()), ("1c6fb6f", text));
    for bad in
        ["", "1c6fb6f", &text[1..], &format!("{text}0"), &text.replace('c', "g"), &text.replace("c1", "ä")]
    {
        assert_eq!(Hash::parse(bad), None, "{bad}");
    }
}

#[test]
fn many_sections_take_no_long() {
    // Quadratic grouping would take minutes for such a file.
    let text: String = (0..100_000).map(|n| format!("[{n}]\na=\n")).collect();
    let text = text[..text.len().min(MAX_SIZE)].to_owned();
    let text = &text[..text.rfind('[').unwrap()];
    assert!(parse(text).options().len() > 80_000);
}

/// Lines out of which files that come close to the rules are made.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ \\t]{0,2}[a-c]{0,2} ?= ?[a-c\"\\\\ #;\\[=\u{a0}]{0,6}",
        "\\[[a-c \n]{0,2}\\][ \\t]{0,2}",
        "[#; \\t\\\\a\\[\\]=\\r]{0,6}",
        "\\PC{0,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = UnitFile::from_bytes(&bytes);
    }

    #[test]
    fn reading_keeps_the_text_and_the_normal_form_is_stable(
        pieces in prop::collection::vec((piece(), prop::sample::select(&["\n", "\n", "\r\n", "\\\n", "\\\r\n", "\\ \n", "\r", ""])), 0..12),
    ) {
        let text: String = pieces.iter().flat_map(|(piece, end)| [piece.as_str(), end]).collect();
        if let Ok(file) = UnitFile::parse(&text) {
            prop_assert_eq!(file.text(), &text);
            let normal = file.normal_form();
            let again = UnitFile::parse(&normal).expect("a normal form can be read");
            prop_assert_eq!(again.normal_form(), normal.as_str());
            prop_assert_eq!(again.hash(), file.hash());
            // What the API makes of the options is the same unit.
            let through_api = UnitFile::from_options(file.options().to_vec()).unwrap();
            prop_assert_eq!(through_api.text(), normal);
            prop_assert_eq!(through_api.hash(), file.hash());
            prop_assert_eq!(through_api.options(), again.options());
            prop_assert_eq!(again.options().len(), file.options().len());
        }
    }

    #[test]
    fn any_options(options in prop::collection::vec(
        ("[a-c\\]\n]{0,3}", "[a-c#=\\[\n ]{0,3}", "[a-c#\\\\=\\[\\]\r\n ]{0,8}"), 0..5,
    )) {
        let options = options.iter().map(|(s, n, v)| option(s, n, v)).collect();
        if let Ok(file) = UnitFile::from_options(options) {
            prop_assert_eq!(file.normal_form(), file.text());
            prop_assert_eq!(&parse(file.text()), &file);
        }
    }

    #[test]
    fn plain_options_come_back(options in prop::collection::vec(
        ("[A-Za-z-]{1,8}", "[A-Za-z-]{1,8}", "[a-z=\"' %/]{0,20}"), 0..8,
    )) {
        let options: Vec<_> = options.iter().map(|(s, n, v)| option(s, n, v.trim())).collect();
        let file = UnitFile::from_options(options.clone()).unwrap();
        let mut sorted = options;
        let order: Vec<_> = sorted.iter().map(|o| o.section.clone()).collect();
        sorted.sort_by_key(|o| order.iter().position(|s| *s == o.section));
        prop_assert_eq!(file.options(), sorted);
    }

    #[test]
    fn hash_text(bytes in any::<[u8; 20]>(), text in ".{0,44}") {
        prop_assert_eq!(Hash::parse(&Hash(bytes).to_string()), Some(Hash(bytes)));
        let _ = Hash::parse(&text);
    }
}
