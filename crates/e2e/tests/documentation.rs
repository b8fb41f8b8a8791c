//! The pages of fleet 1.0's documentation, typed as an old user would; what they show comes out, but for what
//! docs/COMPATIBILITY.md lists. (States and error messages: the golden suite. Configuration: [`crate::options`].)

use anyhow::{Context, Result};
use fleet_e2e::{Fleet, until};

/// The unit of nearly every page.
const HELLO: &str = "[Unit]\nDescription=Hello World\n\n[Service]\n\
    ExecStart=/bin/bash -c \"while true; do echo \\\"Hello, world\\\"; sleep 1; done\"\n";

/// What a line of shell on the first machine prints, with each machine as `machine N` and blanks as one.
fn typed(fleet: &Fleet, line: &str) -> Result<String> {
    let output = fleet
        .host()
        .command_in("/root/u", ["/bin/bash", "-c", line])
        .run()?
        .ok()
        .with_context(|| line.to_owned())?;
    let mut text = output.stdout;
    for (index, host) in fleet.cluster.hosts().iter().enumerate() {
        let name = format!("machine {}", index + 1);
        text = text.replace(&format!("{}.../{}", &host.machine_id()[..8], host.ip()), &name);
        text = text.replace(host.machine_id(), &name).replace(host.ip(), &format!("address {}", index + 1));
    }
    let lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// The one machine that a text names, by its number.
fn place(text: &str) -> Result<usize> {
    let digit =
        text.split("machine ").nth(1).and_then(|rest| rest.chars().next()).and_then(|c| c.to_digit(10));
    digit.map(|number| number as usize).with_context(|| format!("no machine in {text}"))
}

fn files(fleet: &Fleet, files: &[(&str, &str)]) -> Result<()> {
    files.iter().try_for_each(|(name, text)| fleet.host().write(format!("/root/u/{name}"), text))
}

#[test]
fn using_the_client() -> Result<()> {
    let fleet = Fleet::join_all("client", 2, "metadata=\"az=us-west-1b\"")?;
    let pong = HELLO.replace("Hello World", "PONG") + "\n[X-Fleet]\nMachineOf=ping.service\n";
    let (ping, bye) = (HELLO.replace("Hello World", "PING"), HELLO.replace("Hello World", "bye"));
    files(
        &fleet,
        &[
            ("examples/hello.service", HELLO),
            ("examples/ping.service", &ping),
            ("examples/pong.service", &pong),
            ("goodbye.service", &bye),
        ],
    )?;
    let ok = |line: &str| typed(&fleet, line);

    // Start and stop units.
    let started = ok("fleetctl start goodbye.service | tail -1")?;
    let on = format!("machine {}", place(&started)?);
    assert_eq!(started, format!("Unit goodbye.service launched on {on}"));
    assert_eq!(ok("fleetctl stop goodbye.service")?, format!("Unit goodbye.service loaded on {on}"));
    // Scheduling units; the hash is the one that the page shows.
    let loaded = ok("fleetctl load examples/hello.service | tail -1")?;
    let on = format!("machine {}", place(&loaded)?);
    assert_eq!(loaded, format!("Unit hello.service loaded on {on}"));
    assert_eq!(
        ok("fleetctl list-units | grep -v goodbye")?,
        format!("UNIT MACHINE ACTIVE SUB\nhello.service {on} inactive dead")
    );
    ok("fleetctl unload hello.service")?;
    assert_eq!(
        ok("fleetctl list-unit-files | grep -v goodbye")?,
        "UNIT HASH DSTATE STATE TMACHINE\nhello.service e55c0ae inactive inactive -"
    );
    assert!(!ok("fleetctl list-units")?.contains("hello"));
    // Adding and removing units.
    ok("fleetctl submit examples/*")?;
    ok("fleetctl start ping pong")?;
    let units =
        ok("fleetctl list-units --no-legend --fields=machine,unit | grep -v bye | cut -f1 | sort -u")?;
    assert_eq!(units.lines().count(), 1, "pong is where ping is: {units}");
    assert_eq!(ok("fleetctl cat hello.service")? + "\n", HELLO);
    ok("fleetctl start hello.service")?;
    let status = ok("fleetctl status hello.service")?;
    assert!(
        status.contains("hello.service - Hello World") && status.contains("Active: active (running)"),
        "{status}"
    );
    until("it logs", || Ok(ok("fleetctl journal hello.service")?.contains("Hello, world")))?;
    ok("fleetctl destroy hello.service")?;
    assert!(typed(&fleet, "cd / && fleetctl start hello.service").is_err(), "it has to be submitted again");
    // Exploring the cluster.
    let machines = ok("fleetctl list-machines")?;
    assert!(
        machines.starts_with("MACHINE IP METADATA\n") && machines.contains("address 2 az=us-west-1b"),
        "{machines}"
    );
    Ok(())
}

#[test]
fn unit_files_and_scheduling() -> Result<()> {
    let fleet = Fleet::join_all("pages", 3, "")?;
    let ok = |line: &str| typed(&fleet, line);
    let run = "[Service]\nExecStart=/bin/sleep 1d\n";
    // Metadata by the HTTP API (api-v1.md), and a Global unit for it: machines 1 and 3 of the page's table.
    let ids: Vec<&str> = fleet.cluster.hosts().iter().map(|host| host.machine_id()).collect();
    let set = |id: &str, key: &str, value: &str| {
        format!(r#"{{"op":"add","path":"/{id}/metadata/{key}","value":"{value}"}}"#)
    };
    let patch = [
        set(ids[0], "diskType", "SSD"),
        set(ids[0], "region", "us-east-1"),
        set(ids[1], "region", "us-east-1"),
        set(ids[2], "diskType", "SSD"),
        set(ids[2], "region", "us-west-1"),
    ];
    assert_eq!(
        fleet.http()?.json("PATCH", "/fleet/v1/machines", &format!("[{}]", patch.join(",")))?.status,
        204
    );
    let metadata =
        "MachineMetadata=\"region=us-east-1\" \"diskType=SSD\"\nMachineMetadata=region=us-west-1\n";
    files(&fleet, &[("app.service", &format!("{run}[X-Fleet]\nGlobal=true\n{metadata}"))])?;
    ok("fleetctl start app.service")?;
    until("it runs where the page says", || Ok(fleet.copies("app.service")? == [0, 2]))?;

    // The options of versions before 0.8.
    let old = format!("{run}[X-Fleet]\nX-ConditionMachineID={}\n", ids[1]);
    let beside = format!(
        "{run}[X-Fleet]\nX-ConditionMachineOf=old.service\nX-ConditionMachineMetadata=region=us-east-1\n"
    );
    let away = format!("{run}[X-Fleet]\nX-Conflicts=old*\n");
    files(&fleet, &[("old.service", &old), ("beside.service", &beside), ("away.service", &away)])?;
    ok("fleetctl start old beside; fleetctl start away")?;
    assert_eq!((fleet.copies("old.service")?, fleet.copies("beside.service")?), (vec![1], vec![1]));
    assert_ne!(fleet.copies("away.service")?, [1]);

    // Specifiers: the same text for two units.
    let follow = format!("{run}[X-Fleet]\nMachineOf=%p.timer\n");
    files(&fleet, &[("foo.timer", "[Timer]\nOnActiveSec=1d\n"), ("foo.service", &follow)])?;
    ok("fleetctl load foo.timer foo.service")?;
    let list = ok("fleetctl list-unit-files --no-legend --fields=unit,tmachine | grep ^foo")?;
    assert_eq!(
        place(list.lines().next().unwrap_or_default())?,
        place(list.lines().nth(1).unwrap_or_default())?,
        "{list}"
    );

    // The Install section: systemd starts the sidekick with its unit, whatever is desired of it.
    let sidekick = format!(
        "[Unit]\nBindsTo=my.service\n\n{run}\n[Install]\nWantedBy=my.service\n\n[X-Fleet]\nMachineOf=my.service\n"
    );
    files(&fleet, &[("my.service", run), ("my_discovery.service", &sidekick)])?;
    ok("fleetctl load my.service my_discovery.service")?;
    ok("fleetctl start my.service")?;
    until("the sidekick runs, too", || {
        Ok(ok("fleetctl list-units")?
            .lines()
            .any(|line| line.starts_with("my_discovery.service") && line.ends_with("active running")))
    })?;
    assert!(
        ok("fleetctl list-unit-files")?
            .lines()
            .any(|line| line.starts_with("my_discovery.service") && line.contains("loaded loaded"))
    );

    // The example deployment: pairs of units, a pair on each machine.
    let http = "[Unit]\nDescription=subgun\n\n[Service]\nExecStartPre=-/bin/false kill subgun-%i\nExecStart=/bin/sleep 1d\nExecStop=/bin/true\n\n[X-Fleet]\nConflicts=subgun-http@*.service\n";
    let presence = "[Unit]\nDescription=subgun presence service\nBindsTo=subgun-http@%i.service\n\n[Service]\nExecStart=/bin/sleep 1d\n\n[X-Fleet]\nMachineOf=subgun-http@%i.service\n";
    files(&fleet, &[("subgun-http@.service", http), ("subgun-presence@.service", presence)])?;
    ok("fleetctl submit subgun-presence@.service subgun-http@.service")?;
    let started = ok("fleetctl start subgun-presence@{1..3}.service subgun-http@{1..3}.service")?;
    assert_eq!(started.matches("launched on").count(), 6, "{started}");
    let list = ok("fleetctl list-units --no-legend --fields=unit,machine,active,sub | grep subgun")?;
    for number in 1..=3 {
        let place = |unit: &str| {
            list.lines().find(|line| line.starts_with(&format!("{unit}@{number}.service "))).map(place)
        };
        let (http, presence) =
            (place("subgun-http").context("it runs")??, place("subgun-presence").context("it runs")??);
        assert_eq!(http, presence, "{list}");
    }
    assert_eq!(list.matches("active running").count(), 6, "{list}");

    // Service discovery: quotes and specifiers of systemd reach systemd.
    let announce = "[Unit]\nDescription=Announce nginx1.service\n# Binds this unit and nginx1 together.\nBindsTo=nginx1.service\nAfter=nginx1.service\n\n[Service]\n\
        ExecStart=/bin/sh -c \"while true; do echo set /services/website/nginx1 '{ \\\"host\\\": \\\"%H\\\", \\\"port\\\": 8080 }' --ttl 60;sleep 45;done\"\n\
        ExecStop=/bin/echo delete /services/website/nginx1\n\n[X-Fleet]\n# This unit will always be colocated with nginx1.service\nMachineOf=nginx1.service\n";
    files(&fleet, &[("nginx1.service", run), ("nginx1-discovery.service", announce)])?;
    ok("fleetctl start nginx1 nginx1-discovery")?;
    until("it announces", || {
        Ok(ok("fleetctl journal --output=cat nginx1-discovery")?.contains("\"port\": 8080 } --ttl 60"))
    })?;
    ok("fleetctl stop nginx1")?;
    until("it ends with its unit", || Ok(fleet.copies("nginx1-discovery.service")?.is_empty()))?;
    Ok(())
}

/// What `examples/api.py` does: a client made of the discovery document.
#[test]
fn the_api_describes_itself() -> Result<()> {
    let fleet = Fleet::up("discover")?;
    let http = fleet.http()?;
    let document: serde_json::Value = serde_json::from_str(&http.get("/fleet/v1/discovery")?.body)?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned).context("a text");
    let method = &document["resources"]["Machines"]["methods"]["List"];
    assert_eq!(text(&method["httpMethod"])?, "GET");
    let answer = http.get(&format!("/{}{}", text(&document["servicePath"])?, text(&method["path"])?))?;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    assert!(answer.body.contains(fleet.host().machine_id()));
    // metrics.md; failures are counted from the first one on.
    fleet.start("counted.service", crate::SLEEP)?;
    let metrics =
        fleet.host().sh("curl -s --unix-socket /var/run/fleet.sock http://fleet/metrics")?.ok()?.stdout;
    for name in [
        "engine_leader_start_time",
        "engine_task_count_total",
        "engine_reconcile_count_total",
        "engine_reconcile_duration_second",
        "registry_operation_count_total",
        "registry_operation_duration_second",
    ] {
        assert!(metrics.contains(&format!("# TYPE fleet_{name} ")), "{name} is missing:\n{metrics}");
    }
    Ok(())
}
