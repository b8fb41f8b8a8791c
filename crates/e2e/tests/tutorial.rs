//! The tutorial, typed as it stands, with the outputs of the original (golden transcripts).

use anyhow::Result;
use fleet_e2e::{Fleet, until};

/// The unit file of the tutorial: its hash is known.
const DOCKER_HELLO: &str = include_str!("../../../examples/hello.service");

const HELLO: &str = r#"# A comment that is kept

[Unit]
Description=Hello World

[Service]
ExecStart=/bin/bash -c "while true; do echo \"Hello, world\"; sleep 1; done"
"#;

/// It writes faster than one can read.
const TALK: &str = "[Service]\nExecStart=/bin/bash -c 'for i in {1..30}; do echo line $$i; done; while sleep 0.2; do echo more; done'\n";

#[test]
fn tutorial() -> Result<()> {
    let fleet = Fleet::up("tutorial")?;
    let (id, ip, machine) =
        (fleet.host().machine_id().to_owned(), fleet.host().ip().to_owned(), fleet.machine());

    assert_eq!(fleet.ok("list-machines")?, format!("MACHINE\t\tIP\t\tMETADATA\n{}...\t{ip}\t-\n", &id[..8]));
    assert_eq!(fleet.ok("list-machines --fields=machine --full --no-legend")?, format!("{id}\n"));
    assert_eq!(fleet.ok("list-machines -fields=machine -l -no-legend")?, format!("{id}\n"));
    assert_eq!(fleet.ok("list-units")?, "UNIT\tMACHINE\tACTIVE\tSUB\n");
    assert_eq!(fleet.ok("list-unit-files")?, "UNIT\tHASH\tDSTATE\tSTATE\tTMACHINE\n");

    // The hash of the tutorial's file.
    fleet.file("hello.service", DOCKER_HELLO)?;
    assert_eq!(fleet.ok("submit hello.service")?, "Unit hello.service inactive\n");
    assert_eq!(
        fleet.ok("list-unit-files")?,
        "UNIT\t\tHASH\tDSTATE\t\tSTATE\t\tTMACHINE\nhello.service\t0d1c468\tinactive\tinactive\t-\n"
    );
    assert_eq!(fleet.ok("cat hello.service")?, DOCKER_HELLO);

    // Idempotent; a changed file is reported, and taken with --replace.
    let again = fleet.ctl("submit hello.service")?.ok()?;
    assert_eq!((again.stdout.as_str(), again.stderr.as_str()), ("", ""));
    fleet.file("hello.service", HELLO)?;
    let changed = fleet.ctl("submit hello.service")?.ok()?;
    assert_eq!(changed.stdout, "");
    assert_eq!(
        changed.stderr,
        "WARNING: Unit hello.service in registry differs from local unit file hello.service. Add --replace to override.\n"
    );
    assert!(fleet.ok("list-unit-files --no-legend")?.contains("0d1c468"));
    assert_eq!(fleet.ok("submit --replace hello.service")?, "Unit hello.service inactive\n");
    assert_eq!(fleet.ok("cat hello.service")?, HELLO, "byte for byte, comments included");
    assert!(fleet.ok("list-unit-files --no-legend")?.contains("e55c0ae"));

    assert_eq!(fleet.ok("load hello.service")?, format!("Unit hello.service loaded on {machine}\n"));
    assert_eq!(
        fleet.ok("list-units --no-legend --fields=unit,machine,load,active,sub,hash")?,
        format!("hello.service\t{machine}\tloaded\tinactive\tdead\te55c0ae\n")
    );
    assert_eq!(fleet.property("hello.service", "UnitFileState")?, "linked-runtime");
    assert_eq!(fleet.host().read("/run/fleet/units/hello.service")?, HELLO);

    assert_eq!(fleet.ok("start hello.service")?, format!("Unit hello.service launched on {machine}\n"));
    assert_eq!(
        fleet.ok("list-unit-files --no-legend")?,
        format!("hello.service\te55c0ae\tlaunched\tlaunched\t{machine}\n")
    );
    assert_eq!(fleet.state("hello.service")?.as_deref(), Some("active running"));
    let again = fleet.ctl("start hello")?.ok()?;
    assert_eq!((again.stdout.as_str(), again.stderr.as_str()), ("", ""));

    let status = fleet.ok("status hello.service")?;
    assert!(status.starts_with("● hello.service - Hello World\n"), "{status}");
    assert!(status.contains("Active: active (running)"), "{status}");
    assert!(status.contains("linked-runtime"), "{status}");

    until("its log", || Ok(fleet.ok("journal hello.service")?.contains("Hello, world")))?;
    fleet.start("talk.service", TALK)?;
    until("more log", || Ok(fleet.ok("journal --output=cat talk.service")?.contains("more")))?;
    assert_eq!(fleet.ok("journal talk.service")?.lines().count(), 10);
    assert_eq!(fleet.ok("journal --lines 20 --output=cat talk.service")?.lines().count(), 20);
    let mut follow =
        fleet.host().start_process(["fleetctl", "journal", "-f", "--output=cat", "talk.service"])?;
    for _ in 0..15 {
        // Ten lines are there already, the others come as they are written.
        follow.read_line(fleet_e2e::PATIENCE)?.expect("it goes on until interrupted");
    }
    assert!(follow.is_running()?);
    drop(follow);
    fleet.ok("destroy talk.service")?;

    let stop = fleet.ctl("stop hello.service")?.ok()?;
    assert_eq!(stop.stdout, format!("Unit hello.service loaded on {machine}\n"));
    assert_eq!(stop.stderr, "Successfully stopped units [hello.service].\n");
    assert_eq!(fleet.state("hello.service")?.as_deref(), Some("inactive dead"));
    let status = fleet.ctl("status hello.service")?;
    assert_eq!(status.code(), 3);
    assert!(status.stdout.starts_with("○ hello.service - Hello World\n"), "{}", status.stdout);

    let unload = fleet.ctl("unload hello.service")?.ok()?;
    assert_eq!(unload.stdout, "Unit hello.service inactive\n");
    assert_eq!(unload.stderr, "Successfully unloaded units [hello.service].\n");
    assert!(!fleet.host().exists("/run/fleet/units/hello.service"));
    assert_eq!(fleet.state("hello.service")?, None);

    // Straight from submitted to launched, then gone.
    assert_eq!(fleet.ok("start hello.service")?, format!("Unit hello.service launched on {machine}\n"));
    assert_eq!(fleet.ok("destroy hello.service")?, "Destroyed hello.service\n");
    assert!(!fleet.host().exists("/run/fleet/units/hello.service"));
    assert!(!fleet.host().exists("/run/systemd/system/hello.service"));
    assert_eq!(fleet.property("hello.service", "ActiveState")?, "inactive");
    assert_eq!(fleet.ok("list-unit-files --no-legend")?, "");

    // Straight from the file.
    assert_eq!(
        fleet.ok("start hello.service")?,
        format!("Unit hello.service inactive\nUnit hello.service launched on {machine}\n")
    );
    assert_eq!(fleet.ok("destroy hello")?, "Destroyed hello.service\n");
    assert_eq!(fleet.ctl("destroy hello.service")?.ok()?.stderr, "Units not found in registry\n");

    let verify = fleet.ctl("verify hello.service")?;
    assert_eq!(verify.code(), 2);
    assert!(verify.stderr.contains("DEPRECATED"), "{}", verify.stderr);
    assert_eq!(fleet.ok("version")?, format!("fleetctl version {}\n", env!("CARGO_PKG_VERSION")));
    let help = fleet.ok("help")?;
    for command in ["submit", "load", "start", "stop", "unload", "destroy", "status", "journal", "ssh"] {
        assert!(help.contains(command), "{help}");
        assert!(fleet.ok(&format!("help {command}"))?.contains(command));
    }
    Ok(())
}

#[test]
fn ssh_goes_through_the_users_openssh() -> Result<()> {
    let fleet = Fleet::up("ssh")?;
    let key = fleet.host().start_sshd()?;
    fleet.host().copy_in(&key, "/root/.ssh/id_test")?;
    fleet.host().sh("chmod 600 /root/.ssh/id_test")?.ok()?;
    fleet
        .host()
        .write("/root/.ssh/config", "Host *\n  IdentityFile /root/.ssh/id_test\n  LogLevel ERROR\n")?;
    fleet.start("remote.service", super::SLEEP)?;

    let ssh = |words: &str| fleet.ctl(&format!("--strict-host-key-checking=false ssh {words}"));
    assert_eq!(ssh("remote.service hostname")?.ok()?.stdout.trim(), fleet.host().name());
    assert_eq!(ssh("remote whoami")?.ok()?.stdout, "core\n");
    assert_eq!(ssh("remote exit 42")?.code(), 42);
    assert_eq!(ssh("remote -- ls -d /")?.ok()?.stdout, "/\n");
    assert_eq!(
        ssh(&format!("{} hostname", &fleet.host().machine_id()[..4]))?.ok()?.stdout.trim(),
        fleet.host().name()
    );
    let missing = ssh("nonsuch.service hostname")?;
    assert_eq!(missing.code(), 1);
    assert!(missing.stderr.starts_with("Unable to proceed: could not find matching unit or machine\n"));
    Ok(())
}
