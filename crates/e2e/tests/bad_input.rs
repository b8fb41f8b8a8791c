//! Bad input gets a clear error that names the place, and changes nothing.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};
use std::io::{Read, Write};

#[test]
fn unit_files_and_names() -> Result<()> {
    let fleet = Fleet::up("bad-units")?;
    let files: [(&str, &str, &str); 8] = [
        ("garbage.service", "[Service]\nthis is no option\n", "garbage.service:2"),
        ("unclosed.service", "[Service\nExecStart=/bin/true\n", "unclosed.service:1"),
        ("empty.service", "", "unit does not exist and options field empty"),
        ("comment.service", "# only a comment\n", "unit does not exist and options field empty"),
        ("relative.service", "[Service]\nExecStart=relative/path\n", "relative.service:2"),
        ("noexec.service", "[Service]\nRestart=always\n", "noexec.service"),
        (
            "contrary.service",
            "[Service]\nExecStart=/bin/true\n[X-Fleet]\nMachineID=abc\nConflicts=x*\n",
            "MachineID cannot be used with Conflicts",
        ),
        (
            "both.service",
            "[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=true\nMachineOf=x.service\n",
            "Global cannot be used with Peers",
        ),
    ];
    for (name, text, message) in files {
        fleet.file(name, text)?;
        let submit = fleet.ctl(&format!("submit {name}"))?;
        assert_eq!(submit.code(), 1, "{name}");
        assert!(submit.stderr.starts_with("Error creating units: "), "{name}: {}", submit.stderr);
        assert!(submit.stderr.contains(message), "{name}: {}", submit.stderr);
    }
    fleet.host().write("/root/nul.service", b"[Service]\nExecStart=/bin/\0true\n")?;
    fleet
        .host()
        .write("/root/latin.service", b"[Unit]\nDescription=Gr\xfc\xdfe\n[Service]\nExecStart=/bin/true\n")?;
    fleet.host().sh("head -c 10485760 /dev/zero | tr '\\0' '#' > /root/huge.service; head -c 4096 /dev/urandom > /root/rubbish.service; mkdir /root/dir.service")?.ok()?;
    for (name, message) in [
        ("nul.service", "NUL"),
        ("latin.service", "UTF-8"),
        ("huge.service", "too large"),
        ("rubbish.service", "rubbish.service"),
        ("dir.service", "is a directory"),
        ("nonsuch.service", "unable to find Unit(nonsuch.service) in Registry or on filesystem"),
        ("foo.bar", "unable to find Unit(foo.bar.service)"),
        ("a+b.service", "invalid character '+' in unit name"),
        ("@.service", "unit name cannot start in \"@\""),
        ("../../etc/passwd", "unable to find Unit(passwd.service)"),
    ] {
        // A name is looked at when there is a file of that name.
        if name.contains(['+', '@']) {
            fleet.file(name, SLEEP)?;
        }
        let submit = fleet.ctl(&format!("submit -- {name}"))?;
        assert_eq!(submit.code(), 1, "{name}: {}", submit.stdout);
        assert!(submit.stderr.contains(message), "{name}: {}", submit.stderr);
    }
    // An unknown option is warned about, and kept.
    fleet.file("typo.service", &format!("{SLEEP}[X-Fleet]\nMachineMetaData=a=b\n"))?;
    let typo = fleet.ctl("submit typo.service")?.ok()?;
    assert!(
        typo.stderr.contains(
            "Unit typo.service: unrecognized requirement in [X-Fleet] section: \"MachineMetaData\""
        ),
        "{}",
        typo.stderr
    );
    assert!(fleet.ok("cat typo.service")?.contains("MachineMetaData=a=b"));
    assert_eq!(
        fleet.ok("list-unit-files --no-legend --fields=unit")?,
        "typo.service\n",
        "nothing else was kept"
    );

    for (words, code) in [
        ("bogus", 2),
        ("list-units --bogus", 2),
        ("list-u", 2),
        ("start", 2),
        ("cat", 1),
        ("journal nonsuch.service", 1),
        ("status nonsuch.service", 1),
        ("start --block-attempts=x typo.service", 2),
        ("--endpoint=nonsense list-units", 1),
        ("--endpoint=unix:///nonexistent.sock list-units", 1),
        ("--endpoint=http://127.0.0.1:1 list-units", 1),
        ("list-units --fields=bogus", 1),
    ] {
        let out = fleet.ctl(words)?;
        assert_eq!(out.code(), code, "{words}: {}", out.stderr);
        assert!(!out.stderr.is_empty(), "{words}");
    }
    Ok(())
}

#[test]
fn names_that_the_machine_has_already() -> Result<()> {
    let fleet = Fleet::up("taken")?;
    fleet.host().write("/etc/systemd/system/mine.service", "[Service]\nExecStart=/bin/sleep 54321\n")?;
    fleet.host().run(["systemctl", "daemon-reload"])?.ok()?;
    fleet.host().run(["systemctl", "start", "mine.service"])?.ok()?;
    let pid = fleet.main_pid("mine.service")?;
    for name in ["mine.service", "systemd-journald.service"] {
        fleet.file(name, SLEEP)?;
        let start = fleet.ctl(&format!("start --timeout 60s {name}"))?;
        assert_eq!(start.code(), 1, "{name}");
        assert!(start.stderr.contains("already has a unit"), "{name}: {}", start.stderr);
        // Others are not held up.
        fleet.start("other.service", SLEEP)?;
        fleet.ok(&format!("destroy other.service {name}"))?;
    }
    assert_eq!(fleet.main_pid("mine.service")?, pid, "the machine's own unit was not touched");

    fleet.file("badinst.service", &format!("{SLEEP}[Install]\nWantedBy=bad name\n"))?;
    let start = fleet.ctl("start --timeout 60s badinst.service")?;
    assert_eq!(start.code(), 1, "{}", start.stdout);
    assert!(start.stderr.contains("badinst.service"), "{}", start.stderr);
    fleet.start("other.service", SLEEP)?;
    assert_eq!(fleet.state("other.service")?.as_deref(), Some("active running"));
    Ok(())
}

#[test]
fn fleetd_that_cannot_start_says_why() -> Result<()> {
    let fleet = Fleet::installed_embedded("cannot")?;
    fleet.host().start_fleet()?;
    let refuse = |script: &str, message: &str| -> Result<()> {
        let out = fleet.host().sh(script)?;
        assert!(!out.success(), "{script}: {}", out.stderr);
        assert!(out.stderr.contains(message), "{script}: {}", out.stderr);
        Ok(())
    };
    fleet.start("run.service", SLEEP)?;
    let pid = fleet.main_pid("run.service")?;

    refuse("timeout 20 fleetd", "already running")?;
    refuse("FLEET_API_SOCKET=/run/other.sock timeout 20 fleetd", "another")?;
    refuse("timeout 20 fleetd --config /nonexistent", "/nonexistent")?;
    refuse(
        "echo 'agent_ttl=\"30\"' > /root/f.conf; timeout 20 fleetd --config /root/f.conf",
        "missing unit in duration",
    )?;
    fleet.host().run(["systemctl", "stop", "fleetd.service", "fleetd.socket"])?.ok()?;
    refuse(
        "mkdir -p /run/ro && mount -t tmpfs -o ro tmpfs /run/ro && FLEET_STATE_DIRECTORY=/run/ro timeout 20 fleetd",
        "/run/ro",
    )?;
    refuse(
        "mkdir -p /run/full && mount -t tmpfs -o size=64k tmpfs /run/full && head -c 65536 /dev/zero > /run/full/x; FLEET_STATE_DIRECTORY=/run/full timeout 20 fleetd",
        "/run/full",
    )?;
    refuse("DBUS_SYSTEM_BUS_ADDRESS=unix:path=/nonexistent timeout 60 fleetd", "systemd")?;
    // A damaged registry is refused, and never taken for an empty one.
    refuse(
        "cp -r /var/lib/fleet /var/lib/damaged; truncate -s 100 /var/lib/damaged/registry.redb; FLEET_STATE_DIRECTORY=/var/lib/damaged timeout 20 fleetd",
        "registry",
    )?;
    refuse(
        "rm /var/lib/damaged/registry.redb; FLEET_STATE_DIRECTORY=/var/lib/damaged timeout 20 fleetd",
        "registry",
    )?;
    fleet.host().run(["fleetd", "registry", "check"])?.ok()?;
    fleet.host().run(["systemctl", "start", "fleetd.service"])?.ok()?;
    until("all is as before", || Ok(fleet.state("run.service")?.as_deref() == Some("active running")))?;
    assert_eq!(fleet.main_pid("run.service")?, pid);

    let unknown = fleet.host().sh(
        "echo 'no_such_key=1' > /root/f.conf; FLEET_API_SOCKET=/run/x.sock FLEET_STATE_DIRECTORY=/run/x timeout -s TERM 3 fleetd --config /root/f.conf",
    )?;
    assert!(unknown.stderr.contains("no_such_key"), "{}", unknown.stderr);
    Ok(())
}

#[test]
fn full_disks_while_running() -> Result<()> {
    let fleet = Fleet::installed_embedded("full")?;
    fleet.host().sh("mkdir -p /var/lib/fleet && mount -t tmpfs -o size=4m tmpfs /var/lib/fleet")?.ok()?;
    fleet.host().start_fleet()?;
    fleet.start("run.service", SLEEP)?;
    let pid = fleet.main_pid("run.service")?;

    // The registry's disk is full: writes fail with a reason, reads go on, nothing is lost.
    fleet.host().sh("cat /dev/zero > /var/lib/fleet/filler; true")?;
    let http = fleet.http()?;
    let value = "x".repeat(1500);
    let mut refused = None;
    for number in 0..4000 {
        let body = format!(r#"{{"options":[{{"section":"Unit","name":"Description","value":"{value}"}}]}}"#);
        let answer = http.json("PUT", &format!("/fleet/v1/units/fill{number}.service"), &body)?;
        if answer.status != 201 {
            refused = Some((number, answer));
            break;
        }
    }
    let Some((number, answer)) = refused else { anyhow::bail!("the disk never got full") };
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(
        http.get(&format!("/fleet/v1/units/fill{number}.service"))?.status,
        404,
        "refused, so not there"
    );
    assert_eq!(fleet.state("run.service")?.as_deref(), Some("active running"));
    // Room again: writes go on by themselves.
    fleet.host().sh("rm /var/lib/fleet/filler")?.ok()?;
    until("writes are taken again", || {
        let body = r#"{"options":[{"section":"Service","name":"ExecStart","value":"/bin/true"}]}"#;
        Ok(matches!(http.json("PUT", "/fleet/v1/units/again.service", body)?.status, 201 | 204 | 409))
    })?;
    for kept in 0..number {
        assert_eq!(
            http.get(&format!("/fleet/v1/units/fill{kept}.service"))?.status,
            200,
            "fill{kept} was acknowledged"
        );
    }

    // /run is full: the unit waits with the reason, and starts when there is room.
    fleet.host().sh("mount -t tmpfs -o size=64k tmpfs /run/fleet/units --make-private; cat /dev/zero > /run/fleet/units/.filler; true")?;
    fleet.file("late.service", SLEEP)?;
    let late = fleet.ctl("start --timeout 60s late.service")?;
    assert_eq!(late.code(), 1, "{}{}", late.stdout, late.stderr);
    assert!(late.stderr.contains("/run/fleet/units"), "{}", late.stderr);
    fleet.host().sh("rm /run/fleet/units/.filler")?.ok()?;
    until("it starts after all", || Ok(fleet.state("late.service")?.as_deref() == Some("active running")))?;
    assert_eq!(fleet.main_pid("run.service")?, pid);
    Ok(())
}

#[test]
fn clients_that_misbehave() -> Result<()> {
    let fleet = Fleet::up("clients")?;
    let http = fleet.http()?;
    // Rubbish, oversized headers, oversized bodies.
    assert_eq!(http.raw(b"\x16\x03\x01 rubbish\r\n\r\n")?.status, 400);
    let long = format!("GET /fleet/v1/units HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(200_000));
    assert!(matches!(http.raw(long.as_bytes())?.status, 400 | 431));
    let head = "PUT /fleet/v1/units/big.service HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n";
    assert_eq!(http.raw(format!("{head}{}", " ".repeat(9 << 20)).as_bytes())?.status, 413);
    // A body that never comes is waited for only so long.
    let mut stalled = http.connect()?;
    stalled.write_all(
        b"PUT /fleet/v1/units/slow.service HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    )?;
    // Clients that connect and say nothing, or half, hold nobody up.
    let mut idle = Vec::new();
    for number in 0..200 {
        let mut stream = http.connect()?;
        if number % 2 == 0 {
            stream.write_all(b"GET /fleet/v1/un")?;
        }
        idle.push(stream);
    }
    assert_eq!(http.get("/fleet/v1/units")?.status, 200);
    // Event streams that nobody reads do not grow.
    for _ in 0..20 {
        let mut stream = http.connect()?;
        stream.write_all(b"GET /fleet/v1/events?snapshot=1 HTTP/1.1\r\nHost: x\r\n\r\n")?;
        idle.push(stream);
    }
    for number in 0..50 {
        fleet.file(&format!("u{number}.service"), SLEEP)?;
    }
    let names: Vec<_> = (0..50).map(|number| format!("u{number}.service")).collect();
    fleet.ok(&format!("submit {}", names.join(" ")))?;
    assert_eq!(http.get("/fleet/v1/units")?.status, 200);
    let mut answer = [0; 12];
    stalled.read_exact(&mut answer)?;
    assert_eq!(&answer, b"HTTP/1.1 408");
    assert_eq!(http.get("/fleet/v1/units/slow.service")?.status, 404);
    Ok(())
}
