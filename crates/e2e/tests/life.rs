//! Kinds of units and what can become of them.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};

#[test]
fn all_kinds_of_units() -> Result<()> {
    let fleet = Fleet::up("kinds")?;
    let kinds = [
        ("once.service", "[Service]\nType=oneshot\nExecStart=/bin/true\n", "inactive dead"),
        (
            "remain.service",
            "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n",
            "active exited",
        ),
        (
            "slow.service",
            "[Service]\nExecStartPre=/bin/sleep 1\nExecStart=/bin/sleep infinity\n",
            "active running",
        ),
        (
            "notify.service",
            "[Service]\nType=notify\nNotifyAccess=all\nExecStart=/bin/sh -c 'sleep 1; systemd-notify --ready; sleep infinity'\n",
            "active running",
        ),
        ("tick.timer", "[Timer]\nOnActiveSec=600\nUnit=once.service\n", "active waiting"),
        ("talk.socket", "[Socket]\nListenStream=/run/talk.test\nAccept=yes\n", "active listening"),
        ("watch.path", "[Path]\nPathExists=/nonexistent-watch\nUnit=once.service\n", "active waiting"),
        ("group.target", "[Unit]\nDescription=A target\n", "active active"),
        ("run-scratch.mount", "[Mount]\nWhat=tmpfs\nWhere=/run/scratch\nType=tmpfs\n", "active mounted"),
        ("run-lazy.automount", "[Automount]\nWhere=/run/lazy\n", "active waiting"),
        ("run-lazy.mount", "[Mount]\nWhat=tmpfs\nWhere=/run/lazy\nType=tmpfs\n", "active mounted"),
    ];
    fleet.file("talk@.service", "[Service]\nStandardInput=socket\nExecStart=/bin/cat\n")?;
    fleet.ok("submit talk@.service")?;
    let mut broken = Vec::new();
    for (name, text, state) in kinds {
        // Containers may not be able to automount; then systemd's word is the expected one.
        fleet.file(name, text)?;
        let start = fleet.ctl(&format!("start {name}"))?;
        if name == "run-lazy.automount" && !start.success() {
            assert!(start.stderr.contains("run-lazy.automount"), "{}", start.stderr);
            continue;
        }
        let found = fleet.state(name)?;
        if !start.success() || found.as_deref() != Some(state) {
            broken.push(format!("{name}: {found:?}, not {state}; {}{}", start.stdout, start.stderr));
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    for (name, ..) in kinds {
        fleet.ok(&format!("destroy {name}"))?;
        assert!(!fleet.host().exists(format!("/run/fleet/units/{name}")), "{name} is still there");
    }
    Ok(())
}

#[test]
fn templates_and_instances() -> Result<()> {
    let fleet = Fleet::up("templates")?;
    fleet
        .file("hello@.service", "[Unit]\nDescription=Hello %i\n[Service]\nExecStart=/bin/sleep infinity\n")?;
    // The template from the directory.
    fleet.ok("start hello@1.service")?;
    fleet.ok("submit hello@.service")?;
    fleet.host().sh("rm /root/hello@.service")?.ok()?;
    // The template from the registry.
    fleet.ok("start hello@2 hello@3.service")?;
    for instance in 1..=3 {
        assert_eq!(
            fleet.property(&format!("hello@{instance}.service"), "Description")?,
            format!("Hello {instance}")
        );
        assert_eq!(fleet.state(&format!("hello@{instance}.service"))?.as_deref(), Some("active running"));
    }
    let template = fleet.ctl("start hello@.service")?;
    assert!(!template.success(), "a template can't be started: {}", template.stdout);
    fleet.ok("destroy hello@1.service hello@2.service hello@3.service hello@.service")?;
    assert_eq!(fleet.ok("list-unit-files --no-legend")?, "");
    Ok(())
}

#[test]
fn several_units_and_their_order_of_removal() -> Result<()> {
    let fleet = Fleet::up("several")?;
    let names: Vec<String> = (0..40).map(|n| format!("many{n}.service")).collect();
    for name in &names {
        fleet.file(name, SLEEP)?;
    }
    let all = names.join(" ");
    fleet.ok(&format!("start {all}"))?;
    let list = fleet.ok("list-units --no-legend")?;
    assert_eq!(list.lines().filter(|line| line.ends_with("active\trunning")).count(), names.len(), "{list}");
    fleet.ok(&format!("destroy {all}"))?;
    assert_eq!(fleet.ok("list-units --no-legend")?, "");
    assert_eq!(fleet.host().run(["ls", "/run/fleet/units"])?.ok()?.stdout, "");
    Ok(())
}

#[test]
fn removal_has_two_phases() -> Result<()> {
    let fleet = Fleet::up("removal")?;
    // It takes its time to stop; its file must be there until it has.
    let unit = "[Service]\nExecStart=/bin/sleep infinity\nExecStop=/bin/sh -c 'sleep 2; test -e /run/fleet/units/slow.service && touch /run/file-was-there'\n";
    fleet.start("slow.service", unit)?;
    fleet.ok("destroy slow.service")?;
    assert!(fleet.host().exists("/run/file-was-there"), "the file went before the unit had stopped");
    assert!(!fleet.host().exists("/run/fleet/units/slow.service"));
    assert_eq!(fleet.property("slow.service", "ActiveState")?, "inactive");

    // Without waiting, the unit is unknown at once, and gone in the end.
    fleet.ok("start slow.service")?;
    fleet.ok("destroy --no-block slow.service")?;
    assert_eq!(fleet.ok("list-unit-files --no-legend")?, "");
    until("slow.service is gone", || Ok(!fleet.host().exists("/run/fleet/units/slow.service")))?;

    // Started again while it is still stopping: one copy, with the new file.
    fleet.ok("start slow.service")?;
    fleet.ok("destroy --no-block slow.service")?;
    fleet.file("slow.service", "[Unit]\nDescription=new\n[Service]\nExecStart=/bin/sleep infinity\n")?;
    fleet.ok("start slow.service")?;
    assert_eq!(fleet.state("slow.service")?.as_deref(), Some("active running"));
    assert_eq!(fleet.property("slow.service", "Description")?, "new");
    Ok(())
}

#[test]
fn replacing_and_reloading() -> Result<()> {
    let fleet = Fleet::up("replace")?;
    let text = |word: &str| format!("[Unit]\nDescription={word}\n[Service]\nExecStart=/bin/sleep infinity\n");
    fleet.start("a.service", &text("one"))?;
    fleet.start("b.service", SLEEP)?;
    let (a, b) = (fleet.main_pid("a.service")?, fleet.main_pid("b.service")?);

    fleet.file("a.service", &text("two"))?;
    let refused = fleet.ctl("submit --replace a.service")?.ok()?;
    assert_eq!(
        refused.stderr,
        "Warning: can not replace Unit(a.service) in state 'launched', use the appropriate command\n"
    );
    let replaced = fleet.ok("start --replace a.service")?;
    assert_eq!(
        replaced,
        format!("Unit a.service inactive\nUnit a.service launched on {}\n", fleet.machine())
    );
    assert_eq!(fleet.property("a.service", "Description")?, "two");
    assert_ne!(fleet.main_pid("a.service")?, a, "it was started with its new file");
    assert_eq!(fleet.main_pid("b.service")?, b, "its neighbour was not touched");
    assert_eq!(fleet.property("a.service", "NeedDaemonReload")?, "no");
    assert_eq!(
        fleet.ok("start --replace a.service")?,
        "Found same Unit(a.service) in Registry, nothing to do\n"
    );

    let restarted = fleet.ctl("restart a.service")?.ok()?;
    assert!(restarted.stdout.contains("Unit a.service launched on"), "{}", restarted.stdout);
    assert_eq!(fleet.state("a.service")?.as_deref(), Some("active running"));

    // load of a launched unit stops it, and it can be started again.
    fleet.ok("load a.service")?;
    assert_eq!(fleet.state("a.service")?.as_deref(), Some("inactive dead"));
    fleet.ok("start a.service")?;
    assert_eq!(fleet.state("a.service")?.as_deref(), Some("active running"));
    Ok(())
}

#[test]
fn failures_say_why() -> Result<()> {
    let fleet = Fleet::up("failures")?;
    // For Type=simple systemd's job is done before the program is executed, so its failure may come after the start.
    fleet.file("noexe.service", "[Service]\nType=exec\nExecStart=/nonexistent/program\n")?;
    fleet.file(
        "pre.service",
        "[Service]\nExecStartPre=/bin/sh -c 'echo out of luck; exit 3'\nExecStart=/bin/sleep infinity\n",
    )?;
    for (name, why) in [("noexe.service", "noexe.service"), ("pre.service", "out of luck")] {
        let start = fleet.ctl(&format!("start {name}"))?;
        assert_eq!(start.code(), 1, "{name}: {}{}", start.stdout, start.stderr);
        assert!(start.stderr.contains("fail"), "{name}: {}", start.stderr);
        // What a program says last may come to its journal after its end. Asked again, fleetctl tells it again.
        until(why, || Ok(fleet.ctl(&format!("start {name}"))?.stderr.contains(why)))?;
        assert_eq!(fleet.state(name)?.as_deref(), Some("failed failed"));
    }
    // The cause gone, it can be started again.
    fleet.file("pre.service", SLEEP)?;
    fleet.ok("start --replace pre.service")?;
    assert_eq!(fleet.state("pre.service")?.as_deref(), Some("active running"));

    fleet.file("mars.service", &format!("{SLEEP}[X-Fleet]\nMachineMetadata=planet=mars\n"))?;
    let start = fleet.ctl("start --timeout 5s mars.service")?;
    assert_eq!(start.code(), 1);
    assert!(start.stderr.contains("planet"), "{}", start.stderr);
    let explained = fleet.ctl("explain mars.service")?;
    assert!(explained.stdout.contains("planet"), "{}", explained.stdout);
    assert!(fleet.ok("list-unit-files --no-legend")?.contains("mars.service"));

    // The machine gets what it lacked: the unit starts by itself.
    let patch = format!(
        r#"[{{"op":"add","path":"/{}/metadata/planet","value":{{"value":"mars"}}}}]"#,
        fleet.host().machine_id()
    );
    assert_eq!(fleet.http()?.json("PATCH", "/fleet/v1/machines", &patch)?.status, 204);
    until("mars.service runs", || Ok(fleet.state("mars.service")?.as_deref() == Some("active running")))?;
    assert!(fleet.ok("list-machines --no-legend")?.contains("planet=mars"));
    // And loses it again: the unit goes.
    let patch = patch.replace(r#""op":"add""#, r#""op":"remove""#);
    assert_eq!(fleet.http()?.json("PATCH", "/fleet/v1/machines", &patch)?.status, 204);
    until("mars.service is gone", || Ok(fleet.state("mars.service")?.is_none()))?;
    Ok(())
}

#[test]
fn conflicts_replaces_and_global_on_one_machine() -> Result<()> {
    let fleet = Fleet::up("xfleet")?;
    fleet.start("only1.service", &format!("{SLEEP}[X-Fleet]\nConflicts=only*.service\n"))?;
    fleet.file("only2.service", &format!("{SLEEP}[X-Fleet]\nConflicts=only*.service\n"))?;
    let second = fleet.ctl("start --timeout 5s only2.service")?;
    assert_eq!(second.code(), 1);
    assert!(second.stderr.contains("only1.service"), "{}", second.stderr);
    fleet.ok("destroy only1.service")?;
    until("the other runs", || Ok(fleet.state("only2.service")?.as_deref() == Some("active running")))?;

    fleet.start("global.service", &format!("{SLEEP}[X-Fleet]\nGlobal=true\n"))?;
    // Starting a Global unit does not wait for its machines.
    until(
        "the Global unit runs",
        || Ok(fleet.state("global.service")?.as_deref() == Some("active running")),
    )?;
    assert!(
        fleet
            .ok("list-unit-files --no-legend --fields=unit,state,target")?
            .contains("global.service\t-\t\tglobal")
    );
    assert!(fleet.ok("status global.service")?.contains("active (running)"));

    // A follower goes where its target is, and waits while that has no place.
    fleet.file("follow.service", &format!("{SLEEP}[X-Fleet]\nMachineOf=lead.service\n"))?;
    let follow = fleet.ctl("start --timeout 5s follow.service")?;
    assert_eq!(follow.code(), 1);
    assert!(follow.stderr.contains("lead.service"), "{}", follow.stderr);
    fleet.start("lead.service", SLEEP)?;
    until("the follower runs", || Ok(fleet.state("follow.service")?.as_deref() == Some("active running")))?;
    Ok(())
}
