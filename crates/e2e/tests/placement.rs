//! Where units go: every option of [X-Fleet], alone and together, on machines with metadata; and what is said of a unit that no
//! machine can take.

use super::SLEEP;
use anyhow::{Context, Result};
use fleet_e2e::{Fleet, until};
use std::collections::BTreeMap;

/// The metadata of the hosts, by index. The last one joins late.
const METADATA: [&str; 5] = [
    "region=eu,disk=ssd",
    "region=eu,disk=hdd",
    "region=us,disk=ssd",
    "region=us,disk=hdd",
    "region=ap,disk=ssd",
];
/// All but the last.
const FIRST: [usize; 4] = [0, 1, 2, 3];

/// A cluster of the first hosts; the last one is only booted.
fn cluster(name: &str, hosts: usize) -> Result<Fleet> {
    let conf: Vec<String> = METADATA.iter().map(|metadata| format!("metadata=\"{metadata}\"")).collect();
    let conf: Vec<&str> = conf.iter().take(FIRST.len()).map(String::as_str).collect();
    Fleet::join_first(name, hosts, &conf)
}

fn id(fleet: &Fleet, host: usize) -> &str {
    fleet.cluster.host(host).machine_id()
}

fn service(options: &str) -> String {
    format!("{SLEEP}[X-Fleet]\n{options}\n")
}

/// Starts a unit with these options, and tells on which host it runs.
fn start(fleet: &Fleet, unit: &str, options: &str) -> Result<Vec<usize>> {
    fleet.start(unit, &service(options))?;
    fleet.copies(unit)
}

/// Asks for a unit that cannot be placed now.
fn ask(fleet: &Fleet, unit: &str, options: &str) -> Result<()> {
    fleet.file(unit, &service(options))?;
    fleet.ok(&format!("start --no-block {unit}")).map(drop)
}

/// Why a unit is on no machine: the reason of each, by host.
fn reasons(fleet: &Fleet, unit: &str) -> Result<BTreeMap<usize, String>> {
    let body = fleet.http()?.get(&format!("/fleet/v1/units/{unit}/explain"))?.body;
    let said: serde_json::Value = serde_json::from_str(&body).with_context(|| body.clone())?;
    let hosts = fleet.cluster.hosts();
    let list = said["unplaced"].as_array().map(Vec::as_slice).unwrap_or_default();
    let reasons = list.iter().map(|reason| {
        let host = hosts.iter().position(|host| reason["machineID"] == host.machine_id());
        Ok((host.context(body.clone())?, reason["reason"].as_str().context(body.clone())?.to_owned()))
    });
    reasons.collect()
}

/// Waits until a unit is placed nowhere, with this said of a host.
fn unplaced(fleet: &Fleet, unit: &str, host: usize, reason: &str) -> Result<()> {
    let mut last = BTreeMap::new();
    let mut holds = || {
        last = reasons(fleet, unit)?;
        Ok(last.get(&host).is_some_and(|said| said == reason) && fleet.copies(unit)?.is_empty())
    };
    until(&format!("{unit} is unplaced, on {host}: {reason}"), &mut holds)
        .with_context(|| format!("{last:?}"))
}

/// Waits until a unit runs on these hosts.
fn runs_on(fleet: &Fleet, unit: &str, hosts: &[usize]) -> Result<()> {
    let mut last = Vec::new();
    let mut holds = || {
        last = fleet.copies(unit)?;
        Ok(last == hosts)
    };
    until(&format!("{unit} runs on {hosts:?}"), &mut holds).with_context(|| format!("it runs on {last:?}"))
}

fn metadata(fleet: &Fleet, host: usize, change: &str) -> Result<()> {
    fleet.ok(&format!("machine metadata {} {change}", id(fleet, host))).map(drop)
}

fn destroy(fleet: &Fleet, units: &[&str]) -> Result<()> {
    fleet.ok(&format!("destroy {}", units.join(" "))).map(drop)
}

/// All units that are placed, with the host of each, as the API has it.
fn schedule(fleet: &Fleet) -> Result<BTreeMap<String, usize>> {
    let list = fleet.ok("list-unit-files --no-legend --full --fields=unit,tmachine")?;
    let mut schedule = BTreeMap::new();
    for line in list.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let host = fleet.cluster.hosts().iter().position(|host| words[1].starts_with(host.machine_id()));
        if let Some(host) = host {
            schedule.insert(words[0].to_owned(), host);
        }
    }
    Ok(schedule)
}

/// Every unit that is placed runs where it is placed, and nowhere else.
fn one_copy_of_each(fleet: &Fleet) -> Result<()> {
    let schedule = schedule(fleet)?;
    assert!(!schedule.is_empty());
    for (unit, host) in schedule {
        assert_eq!(fleet.copies(&unit)?, [host], "{unit}");
    }
    Ok(())
}

#[test]
fn units_go_where_they_fit() -> Result<()> {
    let fleet = cluster("fit", 5)?;

    // The least loaded machine, and of several the one with the least ID.
    let mut order = FIRST;
    order.sort_by_key(|host| id(&fleet, *host));
    for (number, host) in order.into_iter().enumerate() {
        assert_eq!(start(&fleet, &format!("even{number}.service"), "")?, [host], "{order:?}");
    }
    destroy(&fleet, &["even2.service"])?;
    assert_eq!(start(&fleet, "filling.service", "")?, [order[2]]);
    destroy(&fleet, &["even0.service", "even1.service", "even3.service", "filling.service"])?;

    // MachineMetadata: all of the keys, one of the values of each; in lines or quoted in one.
    for (unit, options, host) in [
        ("and1.service", "MachineMetadata=region=us\nMachineMetadata=disk=hdd", 3),
        ("and2.service", "MachineMetadata=\"region=eu\" \"disk=hdd\"", 1),
        ("or1.service", "MachineMetadata=\"region=ap\" \"region=us\" \"disk=ssd\"", 2),
        ("or2.service", "MachineMetadata=region=ap\nMachineMetadata=disk=ssd\nMachineMetadata=region=eu", 0),
    ] {
        assert_eq!(start(&fleet, unit, options)?, [host], "{options}");
    }

    // Where none fits every way to ask tells why, by machine, and it starts when one comes to fit.
    fleet.file("mars.service", &service("MachineMetadata=region=mars"))?;
    let said = fleet.ctl("start --timeout=5s mars.service")?;
    assert_eq!(said.code(), 1, "{said:?}");
    let waiting = said.stderr.lines().find(|line| line.starts_with("Waiting for mars.service: no machine"));
    let waiting = waiting.with_context(|| format!("no waiting line in {}", said.stderr))?;
    for region in ["eu", "us"] {
        let reason = format!("its metadata has region={region}, not region=mars (MachineMetadata)");
        assert!(waiting.contains(&reason), "{waiting}");
    }
    let why = reasons(&fleet, "mars.service")?;
    assert_eq!(why.keys().copied().collect::<Vec<_>>(), FIRST, "{why:?}");
    let explained = fleet.ok("explain mars.service")?;
    for (host, reason) in &why {
        let host = fleet.cluster.host(*host);
        let line = format!("    {}.../{}: {reason}", &host.machine_id()[..8], host.ip());
        assert!(explained.lines().any(|said| said == line), "{line:?} is not in {explained}");
    }
    metadata(&fleet, 1, "region=mars")?;
    runs_on(&fleet, "mars.service", &[1])?;
    // What needs the metadata that was there has to go, and nothing else does.
    unplaced(&fleet, "and2.service", 1, "its metadata has region=mars, not region=eu (MachineMetadata)")?;
    metadata(&fleet, 1, "region=eu")?;
    runs_on(&fleet, "and2.service", &[1])?;
    let why = "its metadata has region=eu, not region=mars (MachineMetadata)";
    unplaced(&fleet, "mars.service", 1, why)?;

    // MachineID, whole or its first 8 digits.
    assert_eq!(start(&fleet, "id.service", &format!("MachineID={}", id(&fleet, 2)))?, [2]);
    assert_eq!(start(&fleet, "short.service", &format!("MachineID={}", &id(&fleet, 3)[..8]))?, [3]);
    // A machine that is not there yet.
    let late = id(&fleet, 4).to_owned();
    ask(&fleet, "late.service", &format!("MachineID={late}"))?;
    unplaced(&fleet, "late.service", 0, &format!("its ID is not {late} (MachineID)"))?;
    assert_eq!(reasons(&fleet, "late.service")?.len(), FIRST.len());

    // Global, alone, and on some machines only.
    fleet.start("all.service", &service("Global=true"))?;
    fleet.start("fast.service", &service("Global=true\nMachineMetadata=disk=ssd"))?;
    runs_on(&fleet, "all.service", &FIRST)?;
    runs_on(&fleet, "fast.service", &[0, 2])?;
    metadata(&fleet, 1, "disk=ssd")?;
    runs_on(&fleet, "fast.service", &[0, 1, 2])?;
    let all = (0..4).map(|host| fleet.pids(host, "all")).collect::<Result<Vec<_>>>()?;
    metadata(&fleet, 0, "disk=hdd")?;
    runs_on(&fleet, "fast.service", &[1, 2])?;
    let now = (0..4).map(|host| fleet.pids(host, "all")).collect::<Result<Vec<_>>>()?;
    assert_eq!(now, all, "a Global unit that is not concerned was touched");
    metadata(&fleet, 0, "disk=ssd")?;
    metadata(&fleet, 1, "disk=hdd")?;

    // A machine joins: it gets what waited for it, and the Global units that fit.
    let token = fleet.token("{}")?;
    let newcomer = fleet.cluster.host(4);
    fleet.join(newcomer, &token, &format!("metadata=\"{}\"", METADATA[4]))?;
    newcomer.start_fleet()?;
    runs_on(&fleet, "late.service", &[4])?;
    runs_on(&fleet, "all.service", &[0, 1, 2, 3, 4])?;
    runs_on(&fleet, "fast.service", &[0, 2, 4])?;
    one_copy_of_each(&fleet)
}

#[test]
fn names_and_old_spellings_count() -> Result<()> {
    let fleet = cluster("names", 4)?;

    // Instances of a template, with the parts of their names in the options.
    fleet.file("disk@.service", &service("MachineMetadata=%p=%i\nMachineMetadata=region=us"))?;
    fleet.file("apart@.service", &service("Conflicts=%p@*.service"))?;
    fleet.file("beside@.service", &service("MachineOf=apart@%i.service"))?;
    fleet.ok("start disk@ssd.service disk@hdd.service")?;
    assert_eq!((fleet.copies("disk@ssd.service")?, fleet.copies("disk@hdd.service")?), (vec![2], vec![3]));
    let mut taken = Vec::new();
    for instance in 1..=4 {
        fleet.ok(&format!("start apart@{instance}.service beside@{instance}.service"))?;
        let host = fleet.copies(&format!("apart@{instance}.service"))?;
        assert_eq!(fleet.copies(&format!("beside@{instance}.service"))?, host);
        taken.extend(host);
    }
    let fourth = taken[3];
    taken.sort_unstable();
    assert_eq!(taken, FIRST);
    fleet.ok("start --no-block apart@5.service")?;
    let why = "it conflicts with apart@4.service, which is there (Conflicts=apart@*.service)";
    unplaced(&fleet, "apart@5.service", fourth, why)?;
    fleet.ok("destroy beside@4.service apart@4.service")?;
    runs_on(&fleet, "apart@5.service", &[fourth])?;

    // The whole name, and what stands before its type.
    metadata(&fleet, 1, "whole=called.service")?;
    metadata(&fleet, 3, "stem=stem")?;
    assert_eq!(start(&fleet, "called.service", "MachineMetadata=whole=%n")?, [1]);
    assert_eq!(start(&fleet, "stem.service", "MachineMetadata=stem=%N")?, [3]);

    // As options were spelled before they were called what they are.
    for (unit, options, host) in [
        ("oldid.service", format!("X-ConditionMachineID={}", id(&fleet, 2)), 2),
        ("oldboot.service", format!("X-ConditionMachineBootID={}", id(&fleet, 1)), 1),
        (
            "olddata.service",
            "X-ConditionMachineMetadata=disk=ssd\nX-ConditionMachineMetadata=region=eu".into(),
            0,
        ),
        ("oldof.service", "X-ConditionMachineOf=oldboot.service".into(), 1),
        // Not to where oldboot.service and oldof.service are, and nothing else in the region.
        ("oldapart.service", "X-Conflicts=oldb*\nMachineMetadata=region=eu".into(), 0),
    ] {
        assert_eq!(start(&fleet, unit, &options)?, [host], "{options}");
    }
    one_copy_of_each(&fleet)
}

#[test]
fn units_mind_each_other() -> Result<()> {
    let fleet = cluster("mind", 4)?;

    // MachineOf, through a chain: all of it goes along, and whoever has nothing to do with it stays.
    metadata(&fleet, 1, "role=base")?;
    ask(&fleet, "top.service", "MachineOf=mid.service")?;
    unplaced(&fleet, "top.service", 0, "mid.service is not known to the cluster (MachineOf)")?;
    ask(&fleet, "mid.service", "MachineOf=base.service")?;
    unplaced(&fleet, "top.service", 0, "mid.service is not placed on any machine (MachineOf)")?;
    assert_eq!(start(&fleet, "base.service", "MachineMetadata=role=base")?, [1]);
    let chain = ["base.service", "mid.service", "top.service"];
    let chain_on = |hosts: &[usize]| chain.iter().try_for_each(|unit| runs_on(&fleet, unit, hosts));
    chain_on(&[1])?;
    assert_eq!(start(&fleet, "by.service", &format!("MachineID={}", id(&fleet, 1)))?, [1]);
    let bystander = fleet.pids(1, "by")?;
    metadata(&fleet, 2, "role=base")?;
    metadata(&fleet, 1, "role-")?;
    chain_on(&[2])?;
    assert_eq!(fleet.pids(1, "by")?, bystander);
    // Without its target a follower has no place.
    fleet.ok("unload base.service")?;
    unplaced(&fleet, "mid.service", 2, "base.service is not placed on any machine (MachineOf)")?;
    unplaced(&fleet, "top.service", 2, "mid.service is not placed on any machine (MachineOf)")?;
    fleet.ok("start base.service")?;
    chain_on(&[2])?;
    // Who follows in a circle is told so.
    ask(&fleet, "egg.service", "MachineOf=hen.service")?;
    ask(&fleet, "hen.service", "MachineOf=egg.service")?;
    unplaced(&fleet, "egg.service", 0, "hen.service in turn has to be where this unit is (MachineOf)")?;
    unplaced(&fleet, "hen.service", 0, "egg.service in turn has to be where this unit is (MachineOf)")?;
    destroy(
        &fleet,
        &["egg.service", "hen.service", "top.service", "mid.service", "base.service", "by.service"],
    )?;

    // Conflicts, whichever of the two names the other, and whichever was there first.
    let us = "MachineMetadata=region=us";
    assert_eq!(start(&fleet, "quiet1.service", &format!("{us}\nMachineMetadata=disk=hdd"))?, [3]);
    assert_eq!(start(&fleet, "loner.service", &format!("Conflicts=quiet?.service\n{us}"))?, [2]);
    assert_eq!(start(&fleet, "quiet2.service", us)?, [3]);
    ask(&fleet, "quiet3.service", &format!("{us}\nMachineMetadata=disk=ssd"))?;
    let why = "loner.service, which is there, conflicts with it (Conflicts=quiet?.service)";
    unplaced(&fleet, "quiet3.service", 2, why)?;
    // A Global unit gives way to it, comes when it goes, and then keeps it away.
    fleet.start("shy.service", &service("Global=true\nConflicts=loner.service"))?;
    runs_on(&fleet, "shy.service", &[0, 1, 3])?;
    fleet.ok("unload loner.service")?;
    runs_on(&fleet, "shy.service", &FIRST)?;
    runs_on(&fleet, "quiet3.service", &[2])?;
    destroy(&fleet, &["quiet3.service"])?;
    fleet.ok("start --no-block loner.service")?;
    let why = "shy.service, which is there, conflicts with it (Conflicts=loner.service)";
    unplaced(&fleet, "loner.service", 2, why)?;
    destroy(&fleet, &["shy.service"])?;
    runs_on(&fleet, "loner.service", &[2])?;
    destroy(&fleet, &["loner.service", "quiet1.service", "quiet2.service"])?;

    // Replaces: the one replaced goes where it fits, which fleet 1.0 did not look at, or nowhere.
    let eu = "MachineMetadata=region=eu";
    let first = start(&fleet, "old.service", eu)?[0];
    let second = 1 - first;
    let disk = |host: usize| if host == 0 { "ssd" } else { "hdd" };
    let by = |host: usize| format!("Replaces=old.service\n{eu}\nMachineMetadata=disk={}", disk(host));
    // So that the other region has less to do.
    for number in 0..3 {
        start(
            &fleet,
            &format!("weight{number}.service"),
            &format!("{eu}\nMachineMetadata=disk={}", disk(second)),
        )?;
    }
    assert_eq!(start(&fleet, "new.service", &by(first))?, [first]);
    runs_on(&fleet, "old.service", &[second])?;
    assert_eq!(start(&fleet, "newer.service", &by(second))?, [second]);
    let why = "newer.service, which is there, replaces it (Replaces=old.service)";
    unplaced(&fleet, "old.service", second, why)?;
    unplaced(&fleet, "old.service", 2, "its metadata has region=us, not region=eu (MachineMetadata)")?;
    destroy(&fleet, &["new.service"])?;
    runs_on(&fleet, "old.service", &[first])?;
    one_copy_of_each(&fleet)
}
