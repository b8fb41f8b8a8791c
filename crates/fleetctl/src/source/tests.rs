//! Selection over answers in memory.
use super::*;
use fleet_api::client::options_of_file;
use std::collections::BTreeMap;

const HELLO: &str = "[Service]\nExecStart=/bin/sleep 1\n";
const OTHER: &str = "[Service]\nExecStart=/bin/sleep 2\n";

/// A registry and a directory.
#[derive(Default)]
struct World {
    units: BTreeMap<String, Unit>,
    files: BTreeMap<String, Result<Vec<u8>, String>>,
    broken: bool,
}

impl World {
    fn unit(mut self, name: &str, text: &str, desired: &str) -> Self {
        let file = UnitFile::parse(text).unwrap();
        let unit = Unit {
            name: name.into(),
            desired_state: desired.into(),
            options: options_of_file(&file),
            ..Unit::default()
        };
        self.units.insert(name.into(), unit);
        self
    }

    fn file(mut self, path: &str, text: &str) -> Self {
        self.files.insert(path.into(), Ok(text.into()));
        self
    }

    /// What the command would do, as text.
    fn run(&self, verb: Verb, replace: bool, arguments: &[&str]) -> String {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let found = runtime.block_on(find(self, verb, replace, &arguments));
        let mut lines: Vec<String> = found
            .notes
            .iter()
            .map(|note| match note {
                Note::Out(text) => format!("1> {text}"),
                Note::Err(text) => format!("2> {text}"),
            })
            .collect();
        lines.extend(found.actions.iter().map(|action| match action {
            Action::Create { name, file, global, replaces } => {
                let replaces =
                    replaces.as_ref().map(|state| format!(" replacing {state}")).unwrap_or_default();
                let global = if *global { " global" } else { "" };
                format!("create{global} {name} {}{replaces}", file.options().last().unwrap().value)
            }
            Action::Keep(unit) => format!("keep {}", unit.name),
        }));
        if let Some(refusal) = found.refusal {
            lines.push(format!("! {}", refusal.text));
            lines.extend(refusal.more);
        }
        lines.join("\n")
    }
}

impl Lookup for World {
    async fn unit(&self, name: &str) -> Result<Option<Unit>, Error> {
        if self.broken {
            let (url, reason) = ("http://domain-sock/x".to_owned(), "EOF".to_owned());
            return Err(Error::NoAnswer { method: "Get", url, reason });
        }
        Ok(self.units.get(name).cloned())
    }

    async fn text(&self, name: &str) -> Result<Option<String>, Error> {
        Ok(self.units.get(name).map(|unit| file_of_options(&unit.options).unwrap().text().to_owned()))
    }

    fn file(&self, path: &str) -> Result<Option<Vec<u8>>, String> {
        self.files.get(path).cloned().transpose()
    }
}

/// golden/04-submit.txt
#[test]
fn new_known_and_changed() {
    let world = World::default().file("hello.service", HELLO);
    assert_eq!(world.run(Verb::Submit, false, &["hello.service"]), "create hello.service /bin/sleep 1");
    assert_eq!(world.run(Verb::Submit, false, &["hello"]), "create hello.service /bin/sleep 1");
    let world = world.unit("hello.service", HELLO, "inactive");
    assert_eq!(world.run(Verb::Submit, false, &["hello.service"]), "keep hello.service");
    assert_eq!(world.run(Verb::Start, false, &["/elsewhere/hello.service"]), "keep hello.service");
    assert_eq!(
        world.run(Verb::Submit, true, &["hello.service"]),
        "1> Found same Unit(hello.service) in Registry, nothing to do\nkeep hello.service"
    );
    assert_eq!(
        world.run(Verb::Submit, true, &["x/hello.service"]),
        "! error Unit x/hello.service does not seem to be a template unit"
    );
    let world = world.file("hello.service", OTHER);
    assert_eq!(
        world.run(Verb::Start, false, &["hello.service"]),
        "2> WARNING: Unit hello.service in registry differs from local unit file hello.service. \
         Add --replace to override.\nkeep hello.service"
    );
    assert_eq!(
        world.run(Verb::Submit, true, &["hello.service"]),
        "create hello.service /bin/sleep 2 replacing inactive"
    );
}

/// golden/04-submit.txt, "--replace against state"
#[test]
fn replacing_by_state() {
    let refused = |state: &str| {
        format!(
            "2> Warning: can not replace Unit(a.service) in state '{state}', use the appropriate command\nkeep a.service"
        )
    };
    let replaced = |state: &str| format!("create a.service /bin/sleep 2 replacing {state}");
    let run = |verb, state: &str| {
        let world = World::default().unit("a.service", HELLO, state).file("a.service", OTHER);
        world.run(verb, true, &["a.service"])
    };
    assert_eq!(run(Verb::Submit, "inactive"), replaced("inactive"));
    assert_eq!(run(Verb::Submit, "loaded"), refused("loaded"));
    assert_eq!(run(Verb::Submit, "launched"), refused("launched"));
    assert_eq!(run(Verb::Load, "loaded"), replaced("loaded"));
    assert_eq!(run(Verb::Load, "launched"), refused("launched"));
    assert_eq!(run(Verb::Start, "launched"), replaced("launched"));
}

#[test]
fn templates() {
    let world = World::default().file("dir/hello@.service", HELLO);
    assert_eq!(world.run(Verb::Start, false, &["dir/hello@1"]), "create hello@1.service /bin/sleep 1");
    assert_eq!(
        world.run(Verb::Start, false, &["hello@1.service"]),
        "! failed getting Unit(hello@1.service) from template: \
         unable to find template Unit(hello@.service) in Registry or on filesystem"
    );
    // The registry's comes before the directory's.
    let world = world.unit("hello@.service", OTHER, "inactive");
    assert_eq!(
        world.run(Verb::Start, false, &["dir/hello@1.service"]),
        "2> WARNING: Unit hello@.service in registry differs from local template unit file \
         dir/hello@.service. Add --replace to override.\ncreate hello@1.service /bin/sleep 2"
    );
    // A file of the instance itself comes before both.
    let world = world.file("dir/hello@1.service", HELLO);
    assert_eq!(
        world.run(Verb::Start, false, &["dir/hello@1.service"]),
        "create hello@1.service /bin/sleep 1"
    );
    // An instance that is there is compared with the template.
    let world = World::default().unit("hello@1.service", HELLO, "launched").file("hello@.service", OTHER);
    assert_eq!(
        world.run(Verb::Start, false, &["hello@1.service"]),
        "2> WARNING: Unit hello@1.service in registry differs from local template unit file \
         hello@.service. Add --replace to override.\nkeep hello@1.service"
    );
    assert_eq!(
        world.run(Verb::Start, true, &["hello@1.service"]),
        "create hello@1.service /bin/sleep 2 replacing launched"
    );
}

#[test]
fn what_cannot_be_had() {
    let mut world = World::default()
        .file("garbage.service", "[Service]\nthis is no option\n")
        .file("empty.service", "# nothing\n")
        .file("a+b.service", HELLO)
        .file("@x.service", HELLO)
        .file("binary.service", "[Service]\nA=\0\n")
        .file("both.service", "[Service]\nExecStart=/bin/true\n[X-Fleet]\nMachineID=a\nGlobal=true\n");
    world.files.insert("dir.service".into(), Err("read dir.service: is a directory".into()));
    world.files.insert("big.service".into(), Ok(vec![b'#'; fleet_unit::file::MAX_SIZE + 1]));
    let run = |argument: &str| world.run(Verb::Submit, false, &[argument]);
    assert_eq!(run("nonsuch"), "! unable to find Unit(nonsuch.service) in Registry or on filesystem");
    assert_eq!(run(""), "! unable to find Unit(.service) in Registry or on filesystem");
    assert_eq!(run("a*.service"), "! unable to find Unit(a*.service) in Registry or on filesystem");
    assert_eq!(
        run("garbage.service"),
        "! failed getting Unit(garbage.service) from file: unexpected newline encountered while \
         parsing option name\n  garbage.service:2: this is no option"
    );
    assert_eq!(
        run("empty.service"),
        "! failed creating unit empty.service: googleapi: Error 409: unit does not exist and options field empty"
    );
    assert_eq!(
        run("dir.service"),
        "! failed getting Unit(dir.service) from file: read dir.service: is a directory"
    );
    assert_eq!(run("a+b.service"), "! invalid character '+' in unit name");
    assert_eq!(run("@x.service"), "! unit name cannot start in \"@\"");
    assert_eq!(run("both.service"), "! MachineID cannot be used with Global");
    assert!(
        run("binary.service").contains("from file: unit file contains a NUL byte\n  binary.service:2: A=?")
    );
    assert!(run("big.service").contains("from file: unit file too large"));
    world.broken = true;
    assert_eq!(
        world.run(Verb::Start, false, &["x"]),
        "! error retrieving Unit(x.service) from Registry: Get \"http://domain-sock/x\": EOF"
    );
}

/// golden/04-submit.txt, "one is missing: the ones before it are submitted"
#[test]
fn units_before_the_first_fault_stay() {
    let world = World::default().file("a.service", HELLO).file("c.service", HELLO);
    assert_eq!(
        world.run(Verb::Submit, false, &["a", "nonsuch", "c"]),
        "create a.service /bin/sleep 1\n! unable to find Unit(nonsuch.service) in Registry or on filesystem"
    );
    assert_eq!(world.run(Verb::Submit, false, &["a", "a.service", "c", "a"]).lines().count(), 2);
}

#[test]
fn unknown_options_are_warned_of_and_kept() {
    let text = "[Service]\nExecStart=/bin/true\n[X-Fleet]\nMachineMetaData=a=b\n";
    assert_eq!(
        World::default().file("typo.service", text).run(Verb::Submit, false, &["typo"]),
        "2> WARNING: Unit typo.service: unrecognized requirement in [X-Fleet] section: \"MachineMetaData\"\n\
         create typo.service a=b"
    );
    // Quoted as the original does, which escapes in another way than Rust.
    let text = "[Service]\nExecStart=/bin/true\n[X-Fleet]\nMachine\u{7}Ét\u{200b}=a\n";
    let answer = World::default().file("typo.service", text).run(Verb::Submit, false, &["typo"]);
    assert!(answer.contains(r#"section: "Machine\aÉt\u200b""#), "{answer}");
    let global = "[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=true\n";
    assert_eq!(
        World::default().file("g.service", global).run(Verb::Submit, false, &["g"]),
        "create global g.service true"
    );
}

/// What systemd would refuse does not reach a machine.
#[test]
fn what_systemd_refuses_is_refused() {
    let text = "[Service]\nExecStart=relative/path\n";
    let answer = World::default().file("bad.service", text).run(Verb::Start, false, &["bad"]);
    assert!(answer.starts_with("! bad.service:2: "), "{answer}");
    // Something missing is in no line.
    let text = "[Service]\nType=simple\n";
    let answer = World::default().file("bad.service", text).run(Verb::Start, false, &["bad"]);
    assert!(answer.starts_with("! bad.service: Service has"), "{answer}");
}
