use super::*;
use proptest::prelude::*;

fn check(name: &str, text: &str) -> Vec<(usize, String)> {
    let name = UnitName::parse(name).unwrap();
    rejections(&name, &UnitFile::parse(text).unwrap())
        .into_iter()
        .map(|rejection| (rejection.line, rejection.reason))
        .collect()
}

/// Files that `systemd-analyze verify` of systemd 252 refuses, with its texts, and the line.
const REFUSED: &[(&str, usize, &str)] = &[
    (
        "[Unit]\nDescription=no service section\n",
        0,
        "Service has no ExecStart=, ExecStop=, or SuccessAction=. Refusing.",
    ),
    ("[Service]\nType=simple\n", 0, "Service has no ExecStart=, ExecStop=, or SuccessAction=. Refusing."),
    (
        "[Service]\nExecStart=/bin/true\nExecStart=\n",
        0,
        "Service has no ExecStart=, ExecStop=, or SuccessAction=. Refusing.",
    ),
    (
        "[Service]\nType=simple\nExecStop=/bin/true\n",
        2,
        "Service has no ExecStart= setting, which is only allowed for Type=oneshot services. Refusing.",
    ),
    (
        "[Service]\nExecStop=/bin/true\nRemainAfterExit=no\n",
        0,
        "Service has no ExecStart= and no SuccessAction= settings and does not have RemainAfterExit=yes set. Refusing.",
    ),
    (
        "[Service]\nExecStart=/bin/true\nExecStart=/bin/sh -c \"exit 0\"\n",
        3,
        "Service has more than one ExecStart= setting, which is only allowed for Type=oneshot services. Refusing.",
    ),
    (
        "[Service]\nType=oneshot\nExecStart=/bin/true\nRestart=always\n",
        4,
        "Service has Restart= set to either always or on-success, which isn't allowed for Type=oneshot services. Refusing.",
    ),
    (
        "[Service]\nType=dbus\nExecStart=/bin/true\n",
        2,
        "Service is of type D-Bus but no D-Bus service name has been specified. Refusing.",
    ),
    (
        "[Service]\nExecStart=relative/path\n",
        2,
        "Neither a valid executable name nor an absolute path: relative/path",
    ),
    ("[Service]\nExecStart=@+./run x\n", 2, "Neither a valid executable name nor an absolute path: ./run"),
    (
        "[Service]\nExecStart=/bin/true\nExecStartPre=${X}/bin/a\n",
        3,
        "Neither a valid executable name nor an absolute path: ${X}/bin/a",
    ),
    (
        "[Service]\nExecStart=relative/path\nExecStart=\nExecStart=/bin/true\n",
        2,
        "Neither a valid executable name nor an absolute path: relative/path",
    ),
    ("[Service]\nExecStart=/bin/true\nExecReload=/bin/\n", 3, "Executable path specifies a directory: /bin/"),
    (
        "[Service]\nExecStart=/bin/true\nExecStop=..\n",
        3,
        "Neither a valid executable name nor an absolute path: ..",
    ),
    ("[Service]\nExecStart=/bin/true\nExecStartPost=@ x\n", 3, "Empty path in command line: '@ x'"),
    (
        "[Service]\n# c\nExecStart=\\\n# d\n  bin/a \\\n  b\n",
        3,
        "Neither a valid executable name nor an absolute path: bin/a",
    ),
];

/// Files that systemd takes, or of which it is not certain.
const TAKEN: &[&str] = &[
    "[Service]\nExecStart=/bin/true\n",
    "[Service]\nExecStart=true\n",
    "[Service]\nExecStart=-@:/bin/true x\n",
    "[Service]\nExecStart=/bin/..\n",
    "[Service]\nExecStart=/bin/true\nExecStart=--/bin/true\n",
    "[Service]\nExecStart=!!/bin/true\n",
    "[Service]\nExecStart=%h/bin/x\n",
    "[Service]\nExecStart=a%i/x\n",
    "[Service]\nExecStart=\"/bin/true\" x\n",
    "[Service]\nExecStart=\"bin dir/true\" x\n",
    "[Service]\nExecStart=|a/b\n",
    "[Service]\nExecStart=/bin/true\nExecStartPre=-relative/path\n",
    "[Service]\nExecStart=/bin/true\nExecStart=-relative/path\n",
    "[Service]\nExecStart=/bin/true\nExecStart=\nExecStart=/bin/false\n",
    "[Service]\nType=oneshot\nExecStart=/bin/true\nExecStart=/bin/true\n",
    "[Service]\nExecStart=/bin/true\nExecStart=/bin/true\nType=oneshot\n",
    "[Service]\nType=bogus\nExecStart=/bin/true\nExecStart=/bin/true\n",
    "[Service]\nType=oneshot\nRestart=on-failure\nExecStart=/bin/true\n",
    "[Service]\nType=oneshot\nRestart=always\nRestart=no\nExecStart=/bin/true\n",
    "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStop=/bin/true\n",
    "[Service]\nRemainAfterExit=on\nExecStop=/bin/true\n",
    "[Unit]\nSuccessAction=reboot\n",
    "[Service]\nType=dbus\nBusName=a.b\nExecStart=/bin/true\n",
    "[Service]\nExecStart=/bin/true \\\\\nType=oneshot\nExecStart=/bin/true\n",
    "[Service]\nExecStart=/bin/echo \\\n  ExecStart=bin/a\n",
    "[Service]\r\nExecStart=/bin/echo \\\r\n  a\r\n",
    "[Service]\nExecStart=/bin/true\n[X-Other]\nExecStart=bin/a\n",
];

#[test]
fn refuses_with_the_texts_of_systemd() {
    for &(text, line, reason) in REFUSED {
        assert_eq!(check("x.service", text), [(line, reason.to_owned())], "{text}");
        assert_eq!(check("x@.service", text), [(line, reason.to_owned())], "{text}");
    }
}

#[test]
fn takes_what_systemd_may_take() {
    for text in TAKEN {
        assert_eq!(check("x.service", text), [], "{text}");
    }
    for name in ["x.timer", "x.socket", "x.target"] {
        assert_eq!(check(name, "[Unit]\nDescription=a\n"), []);
    }
}

#[test]
fn names_every_bad_line() {
    let lines: Vec<_> =
        check("x.service", "[Service]\nExecStart=a/b\nExecStop=/bin/true\nExecStopPost=c/d\n")
            .into_iter()
            .map(|(line, _)| line)
            .collect();
    assert_eq!(lines, [2, 4]);
}

proptest! {
    #[test]
    fn never_panics(text in "([\\[\\]A-Za-z=#;/ \\t\\r\\\\\n%\"-]|ExecStart=|\\[Service\\]\n|Type=oneshot\n){0,60}") {
        if let Ok(file) = UnitFile::parse(&text) {
            let _ = rejections(&UnitName::parse("x.service").unwrap(), &file);
        }
    }
}
