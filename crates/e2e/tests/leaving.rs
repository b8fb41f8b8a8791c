//! Leaving on purpose: cordon, drain, metadata, shutdown, removal. After each step exactly one copy of each unit runs, nothing was
//! touched that need not be, and no unit ever ran twice.

use anyhow::Result;
use fleet_e2e::{Fleet, RECORDED, Running, until};
use std::collections::BTreeSet;

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}{number}.service")).collect()
}

fn none() -> BTreeSet<String> {
    BTreeSet::new()
}

/// How many machines are there.
fn there(fleet: &Fleet) -> Result<usize> {
    Ok(fleet.ok("list-machines --no-legend")?.lines().count())
}

/// The ID of a host's machine, and the beginning of it that commands take.
fn id(fleet: &Fleet, host: usize) -> (String, String) {
    let id = fleet.cluster.host(host).machine_id().to_owned();
    let short = id[..8].to_owned();
    (id, short)
}

/// What `list-machines` says of the state of a host's machine.
fn state(fleet: &Fleet, host: usize) -> Result<String> {
    let list = fleet.ok("list-machines --no-legend --full --fields=machine,state")?;
    let line = list.lines().find(|line| line.starts_with(fleet.cluster.host(host).machine_id()));
    Ok(line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default().to_owned())
}

/// Restarts the server, and waits until it serves and everybody is there again.
fn restart_server(fleet: &Fleet) -> Result<()> {
    fleet.host().run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    until("all are there again", || {
        let list = fleet.ctl("machine list --no-legend")?;
        Ok(list.success() && list.stdout.matches("\tup").count() == fleet.cluster.hosts().len())
    })
}

/// Everything at the end of a step.
fn all_well(fleet: &Fleet, units: &[String], before: &Running, moved: &BTreeSet<String>) -> Result<Running> {
    let now = fleet.one_each(units)?;
    now.only_changed(before, moved)?;
    fleet.never_two(units)?;
    Ok(now)
}

#[test]
fn a_cordoned_machine_takes_nothing_new() -> Result<()> {
    let fleet = Fleet::join_all("cordon", 3, "")?;
    let (_, short) = id(&fleet, 2);
    let mut units = names("u", 3);
    let before = fleet.start_all(&units, RECORDED)?;
    assert_eq!(before.on(2).len(), 1);
    assert!(fleet.ok(&format!("machine cordon {short}"))?.contains("is cordoned"));
    assert_eq!(state(&fleet, 2)?, "up,cordoned");
    assert!(fleet.ok("machine list")?.contains("up,cordoned"));
    // The mark is neither the server's nor the agent's to forget.
    restart_server(&fleet)?;
    fleet.cluster.host(2).run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    until("it is still cordoned", || Ok(there(&fleet)? == 3 && state(&fleet, 2)? == "up,cordoned"))?;

    let more = names("v", 4);
    fleet.start_all(&more, RECORDED)?;
    units.extend(more);
    let now = all_well(&fleet, &units, &before, &names("v", 4).into_iter().collect())?;
    assert_eq!(now.on(2), before.on(2), "what was there stays, and nothing came");

    // A unit that can only go there waits, and says why.
    let pinned = format!("{RECORDED}[X-Fleet]\nMachineID={}\n", fleet.cluster.host(2).machine_id());
    fleet.file("pinned.service", &pinned)?;
    let waited = fleet.ctl("start --timeout=5s pinned.service")?;
    assert!(!waited.success());
    assert!(waited.stderr.contains("it is cordoned"), "{}", waited.stderr);
    let reasons = fleet.ok("list-unit-files --no-legend --fields=unit,reason")?;
    let reason = reasons.lines().find(|line| line.starts_with("pinned.service")).unwrap_or_default();
    assert!(reason.contains(&format!("it is cordoned ({short}...")), "{reasons}");
    assert!(reason.contains("its ID is not") && reason.contains("and 1 more"), "{reasons}");
    assert!(fleet.ok("explain pinned.service")?.contains("it is cordoned"));

    // As soon as the machine takes units again it comes.
    assert!(fleet.ok(&format!("machine uncordon {short}"))?.contains("takes new units"));
    units.push("pinned.service".to_owned());
    let now = fleet.one_each(&units)?;
    assert_eq!(now.host_of("pinned.service"), Some(2));
    assert_eq!(state(&fleet, 2)?, "up");
    Ok(())
}

#[test]
fn a_drained_machine_is_left_by_all_its_units() -> Result<()> {
    let fleet = Fleet::join_all("drain", 3, "")?;
    let (drained, short) = id(&fleet, 1);
    let mut units = names("u", 12);
    fleet.start_all(&units, RECORDED)?;
    // One that follows another there, and one that is everywhere.
    let pinned = format!("{RECORDED}[X-Fleet]\nMachineMetadata=\"a=b\" \"a=c\"\n");
    fleet.ok(&format!("machine metadata {short} a=b"))?;
    fleet.start("lead.service", &pinned)?;
    fleet.start("follow.service", &format!("{RECORDED}[X-Fleet]\nMachineOf=lead.service\n"))?;
    fleet.start("all.service", &format!("{RECORDED}[X-Fleet]\nGlobal=true\n"))?;
    until("the Global unit runs everywhere", || Ok(fleet.copies("all.service")? == [0, 1, 2]))?;
    let third = id(&fleet, 2).1;
    fleet.ok(&format!("machine metadata {third} a=c"))?;
    units.extend(["lead.service", "follow.service"].map(str::to_owned));
    let globals = ["all.service"];
    let everywhere = fleet.running(&globals)?;
    let before = fleet.one_each(&units)?;
    let leaving = before.on(1);
    assert_eq!(leaving.len(), 6, "{before:?}");

    let out = fleet.ctl(&format!("machine drain {short}"))?.ok()?;
    let said: BTreeSet<String> = out
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("Unit ")?.split(' ').next())
        .map(str::to_owned)
        .collect();
    assert_eq!(said, leaving, "one line for each: {}", out.stdout);
    assert!(out.stdout.contains(" moved to "), "{}", out.stdout);
    assert!(out.stdout.contains(&format!("Machine {short}.../")), "{}", out.stdout);
    assert!(out.stdout.trim_end().ends_with("is drained: 6 units moved"), "{}", out.stdout);
    let now = all_well(&fleet, &units, &before, &leaving)?;
    assert_eq!(now.on(1), none());
    assert_eq!((now.host_of("lead.service"), now.host_of("follow.service")), (Some(2), Some(2)));
    assert_eq!(fleet.running(&globals)?, everywhere, "Global units stay");
    assert_eq!(state(&fleet, 1)?, "up,draining");
    // Once more: there is nothing to do.
    assert!(fleet.ok(&format!("machine drain {drained}"))?.contains("is drained: 0 units moved"));

    // Restarts forget nothing, and units come back only when they may.
    restart_server(&fleet)?;
    assert_eq!(state(&fleet, 1)?, "up,draining");
    fleet.start_all(&["late.service"], RECORDED)?;
    assert_ne!(fleet.one_each(&["late.service"])?.host_of("late.service"), Some(1));
    fleet.ok(&format!("machine uncordon {short}"))?;
    assert_eq!(state(&fleet, 1)?, "up");
    all_well(&fleet, &units, &now, &none())?;
    fleet.start_all(&["next.service"], RECORDED)?;
    assert_eq!(fleet.one_each(&["next.service"])?.host_of("next.service"), Some(1), "least loaded");
    Ok(())
}

#[test]
fn a_drain_tells_what_it_cannot_move() -> Result<()> {
    let fleet = Fleet::join_all("stuck", 3, "")?;
    let (machine, short) = id(&fleet, 1);
    let mut units = names("bound", 3);
    units.push("slow.service".to_owned());
    // Only there, for the moment.
    fleet.ok(&format!("machine metadata {short} here=yes"))?;
    let before = fleet.start_all(&units[..3], &format!("{RECORDED}[X-Fleet]\nMachineMetadata=here=yes\n"))?;
    assert_eq!(before.on(1).len(), 3);
    let out = fleet.ctl(&format!("machine drain {short}"))?;
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(out.stderr.contains("3 units are left that can't go anywhere else"), "{}", out.stderr);
    for unit in &units[..3] {
        let line = out.stderr.lines().find(|line| line.contains(unit.as_str())).unwrap_or_default();
        assert!(
            line.contains("its metadata has no here, wanted is here=yes (MachineMetadata)"),
            "{}",
            out.stderr
        );
        assert!(line.contains("and 1 more"), "both machines: {line}");
    }
    assert!(out.stderr.contains(&format!("fleetctl machine uncordon {short}")), "{}", out.stderr);
    all_well(&fleet, &units[..3], &before, &none())?;

    // With room elsewhere the drain goes on by itself.
    let third = id(&fleet, 2).1;
    fleet.ok(&format!("machine metadata {third} here=yes"))?;
    until("all have moved", || Ok(fleet.running(&units[..3])?.on(2).len() == 3))?;
    let now = all_well(&fleet, &units[..3], &before, &units[..3].iter().cloned().collect())?;

    // A unit that takes its time: the deadline passes, the drain goes on.
    fleet.ok(&format!("machine uncordon {short}"))?;
    let slow = RECORDED.replace(
        "ExecStopPost",
        "ExecStop=/bin/sh -c 'while ! test -e /run/go; do sleep 0.1; done'\nExecStopPost",
    );
    let others = format!("{} {third}", id(&fleet, 0).1);
    fleet.ok(&format!("machine cordon {others}"))?;
    fleet.start("slow.service", &slow)?;
    fleet.ok(&format!("machine uncordon {others}"))?;
    let began = fleet.one_each(&units)?;
    assert_eq!(began.host_of("slow.service"), Some(1));
    let out = fleet.ctl(&format!("machine drain {machine} --deadline 1s -o json"))?;
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(out.stderr.contains("is not drained after 1 s: 1 unit is left"), "{}", out.stderr);
    assert!(out.stderr.contains("slow.service"), "{}", out.stderr);
    let said: serde_json::Value = serde_json::from_str(&out.stdout)?;
    assert_eq!((&said[0]["name"], &said[0]["moved"]), (&"slow.service".into(), &false.into()));
    assert_eq!(state(&fleet, 1)?, "up,draining");
    assert_eq!(fleet.running(&["slow.service"])?.on(1).len(), 1, "it is stopping, and nowhere else");
    fleet.cluster.host(1).sh("touch /run/go")?.ok()?;
    until("it has left", || Ok(fleet.running(&["slow.service"])?.on(1).is_empty()))?;
    let moved = all_well(&fleet, &units, &began, &["slow.service".to_owned()].into())?;
    assert_ne!(moved.host_of("slow.service"), Some(1));
    moved.only_changed(&now, &["slow.service".to_owned()].into())?;
    Ok(())
}

#[test]
fn metadata_moves_only_what_it_breaks() -> Result<()> {
    let fleet = Fleet::join_all("metadata", 3, "metadata=\"disk=ssd\"")?;
    let mut units = names("u", 6);
    fleet.start_all(&units, RECORDED)?;
    let fast = names("fast", 3);
    fleet.start_all(&fast, &format!("{RECORDED}[X-Fleet]\nMachineMetadata=disk=ssd\n"))?;
    units.extend(fast);
    let before = fleet.one_each(&units)?;
    let (machine, short) = id(&fleet, 2);
    let breaks: BTreeSet<String> = before.on(2).into_iter().filter(|unit| unit.starts_with("fast")).collect();
    assert_eq!(breaks.len(), 1, "{before:?}");
    assert_eq!(before.on(2).len(), 3);

    fleet.ok(&format!("machine metadata {short} disk=hdd rack=7"))?;
    until("the unit has moved", || Ok(fleet.running(&units)?.on(2).is_disjoint(&breaks)))?;
    let now = all_well(&fleet, &units, &before, &breaks)?;
    let shown = || -> Result<bool> {
        let list = fleet.ok("list-machines --no-legend --full --fields=machine,metadata")?;
        Ok(list.contains(&format!("{machine}\tdisk=hdd,rack=7")) && list.lines().count() == 3)
    };
    assert!(shown()?);
    // It holds whoever is started anew, and moves nothing again.
    restart_server(&fleet)?;
    assert!(shown()?, "after a restart of the server");
    fleet.cluster.host(2).run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    until("the agent is back", shown)?;
    let now = all_well(&fleet, &units, &now, &none())?;
    // Taken back, what the configuration says holds again; nothing has a reason to move.
    let patch = format!(
        r#"[{{"op":"remove","path":"/{machine}/metadata/rack"}},{{"op":"add","path":"/{machine}/metadata/disk","value":{{"value":"ssd"}}}}]"#
    );
    assert_eq!(fleet.http()?.json("PATCH", "/fleet/v1/machines", &patch)?.status, 204);
    until("the metadata are back", || {
        Ok(fleet
            .ok("list-machines --no-legend --full --fields=machine,metadata")?
            .contains(&format!("{machine}\tdisk=ssd\n")))
    })?;
    all_well(&fleet, &units, &now, &none())?;
    Ok(())
}

#[test]
fn a_reboot_moves_units_without_waiting() -> Result<()> {
    // Nobody could wait for this TTL.
    let fleet = Fleet::join_all("farewell", 3, "agent_ttl=\"1h\"")?;
    let units = names("u", 6);
    let before = fleet.start_all(&units, RECORDED)?;
    let leaving = before.on(2);
    fleet.cluster.host(2).reboot()?;
    until("its units run elsewhere, and it is back", || {
        let now = fleet.running(&units)?;
        Ok(now.one_each().is_ok() && now.on(2).is_empty() && there(&fleet)? == 3)
    })?;
    let now = fleet.one_each(&units)?;
    now.only_changed(&before, &leaving)?;
    assert_eq!(now.on(2), none(), "nothing moves back");
    Ok(())
}

#[test]
fn a_removed_machine_lets_go_of_its_units() -> Result<()> {
    // Nobody could wait for this TTL.
    let fleet = Fleet::join_one_server("remove", 3, "agent_ttl=\"1h\"")?;
    let units = names("u", 6);
    let before = fleet.start_all(&units, RECORDED)?;
    let leaving = before.on(2);
    assert_eq!(leaving.len(), 2);
    let (machine, short) = id(&fleet, 2);
    assert!(fleet.ok(&format!("machine remove {short}"))?.contains("its credentials are revoked"));
    until("it is out of the cluster", || {
        Ok(there(&fleet)? == 2 && !fleet.ok("machine list --full")?.contains(&machine))
    })?;
    let now = all_well(&fleet, &units, &before, &leaving)?;
    assert_eq!(now.on(2), none());
    assert!(!fleet.cluster.host(2).exists("/run/fleet/units/u0.service"));
    // Its certificate is worth nothing, and a restart changes nothing.
    let host = fleet.cluster.host(2);
    host.run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    until("it is refused", || {
        let log = host.journal(Some("fleetd.service"))?;
        Ok(log
            .rsplit("Starting fleetd")
            .next()
            .is_some_and(|log| log.contains("is not in this cluster (any more)")))
    })?;
    assert!(!fleet.ctl(&format!("machine remove {machine}"))?.success());
    all_well(&fleet, &units, &now, &none())?;
    Ok(())
}

#[test]
fn a_machine_removed_while_out_of_reach_is_told_when_it_returns() -> Result<()> {
    // Nobody could wait for this TTL.
    let fleet = Fleet::join_embedded("removed", 3, "agent_ttl=\"1h\"")?;
    let units = names("u", 6);
    let before = fleet.start_all(&units, RECORDED)?;
    let leaving = before.on(2);
    let (machine, short) = id(&fleet, 2);
    let kept = |now: &Running| before.0.iter().all(|(unit, runs)| now.0[unit].contains(&runs[0]));
    fleet.cluster.host(2).run(["systemctl", "stop", "fleetd.service", "fleetd.socket"])?.ok()?;
    until("its connection is gone", || Ok(fleet.ok("machine list")?.contains("lost")))?;
    assert_eq!(there(&fleet)?, 3, "its presence stays");
    let out = fleet.ctl(&format!("machine remove {short}"))?.ok()?;
    assert!(out.stderr.contains("is out of reach"), "{}", out.stderr);
    assert_eq!(there(&fleet)?, 2, "it is not shown any longer");
    assert!(
        fleet
            .ok("machine list --full")?
            .lines()
            .any(|line| line.contains(&machine) && line.ends_with("removed"))
    );
    // Its units run elsewhere, and there too, as nobody told it: absence is no instruction.
    until("the units run elsewhere", || {
        let now = fleet.running(&units)?;
        Ok(leaving.iter().all(|unit| now.0[unit].len() == 2))
    })?;
    assert!(kept(&fleet.running(&units)?), "nothing was stopped");
    // It comes back, and is told.
    fleet.cluster.host(2).run(["systemctl", "start", "fleetd.service"])?.ok()?;
    let now = fleet.one_each(&units)?;
    assert_eq!(now.on(2), none());
    now.only_changed(&before, &leaving)?;
    until("it is forgotten", || Ok(!fleet.ok("machine list --full")?.contains(&machine)))?;

    // A machine that a server merely does not know is refused, and keeps its units: the registry may have been lost.
    let second = fleet.running(&units)?.on(1);
    fleet.host().sh("systemctl stop fleetd.service fleetd.socket && rm -rf /var/lib/fleet/registry* && systemctl start fleetd.service")?.ok()?;
    let host = fleet.cluster.host(1);
    until("it has no session", || {
        let log = host.journal(Some("fleetd.service"))?;
        Ok(log.contains("no session with server") && there(&fleet)? == 1)
    })?;
    assert_eq!(fleet.running(&units)?.on(1), second, "nothing was stopped");
    Ok(())
}

#[test]
fn many_machines_lost_at_once_are_replaced_slowly() -> Result<()> {
    let fleet = Fleet::join_all("massloss", 3, "agent_ttl=\"10s\"\nmass_loss_rate=\"0.01\"")?;
    let units = names("u", 6);
    fleet.start_all(&units, RECORDED)?;
    for host in 1..3 {
        fleet.cluster.host(host).cut()?;
    }
    // Two of three. Those of the machine that was missed first may be placed elsewhere already; of the others one goes at once, and
    // then one every 100 s.
    until("the operator is told", || {
        Ok(fleet.ctl("machine list")?.stderr.contains("NOTICE: 2 of 3 machines vanished within 10 s"))
    })?;
    let mut events = fleet.http()?.events("?snapshot=1")?;
    assert!(events.any(|line| line.is_ok_and(|line| line.contains(r#""id":"massLoss""#))));
    let held =
        |text: &str| -> Result<usize> { Ok(fleet.ok("explain u0 u1 u2 u3 u4 u5")?.matches(text).count()) };
    until("it is said which units wait", || {
        Ok(held("waits for a machine: many machines vanished at once")? > 0)
    })?;
    let reasons = fleet.ok("list-unit-files --no-legend --fields=reason")?;
    assert!(reasons.contains("many machines vanished at once"), "{reasons}");
    // Back again, they keep what they have, and it is over.
    for host in 1..3 {
        fleet.cluster.host(host).join()?;
    }
    fleet.one_each(&units)?;
    until("the notice is gone", || {
        Ok(fleet.ctl("machine list")?.stderr.is_empty() && held("waits for")? == 0)
    })?;
    Ok(())
}
