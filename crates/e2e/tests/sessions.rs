//! Sessions of agents through everything that happens to them: servers that are not there, cables cut without a word, restarts and
//! kills on either side. Units notice none of it, and what the machines did meanwhile is told.

use super::SLEEP;
use anyhow::{Context, Result, ensure};
use fleet_e2e::{Fleet, until};
use std::collections::BTreeSet;
use std::net::TcpListener;

/// How often a text is in the journal of fleetd on a host.
fn told(fleet: &Fleet, host: usize, text: &str) -> Result<usize> {
    Ok(fleet.cluster.host(host).journal(Some("fleetd.service"))?.matches(text).count())
}

fn units() -> Vec<String> {
    (0..6).map(|number| format!("u{number}.service")).collect()
}

fn machines(fleet: &Fleet) -> Result<usize> {
    Ok(fleet.ok("list-machines --no-legend")?.lines().count())
}

#[test]
fn agents_find_their_server_and_keep_to_it() -> Result<()> {
    // No cut is long enough for a machine to be lost.
    let conf = "agent_ttl=\"10m\"";
    let fleet = Fleet::join_first_one_server("find", 3, &[conf, conf])?;

    // Dead servers first: nobody has the address, nothing listens, what listens says nothing.
    let third = fleet.cluster.host(2);
    let token = fleet.token("{}")?;
    fleet.join(third, &token, conf)?;
    let (gateway, second, server) = (fleet.cluster.gateway(), fleet.cluster.host(1).ip(), fleet.host().ip());
    let listener = TcpListener::bind((gateway.as_str(), 0))?;
    let mute = listener.local_addr()?;
    let nobody = format!("{}.250", gateway.rsplit_once('.').context("an address")?.0);
    let conf = third.read("/etc/fleet/fleet.conf")?;
    let join = format!("join=\"{nobody}:4919,{second}:4918,{mute},{server}\"");
    let conf = conf.replace(&format!("join=\"{server}\""), &join);
    ensure!(conf.contains(&join), "{conf}");
    third.write("/etc/fleet/fleet.conf", conf)?;
    third.start_fleet()?;
    until("the third machine is there", || Ok(machines(&fleet)? == 3))?;

    let units = units();
    let before = fleet.start_all(&units, SLEEP)?;
    let untouched = || fleet.running(&units)?.only_changed(&before, &BTreeSet::new());
    let list = fleet.ok("list-units --no-legend")?;
    let as_before = || until("all is as before", || Ok(fleet.ok("list-units --no-legend")? == list));
    let sessions = |host: usize| {
        let id = fleet.cluster.host(host).machine_id();
        told(&fleet, 0, &format!("session with machine {id} begins"))
    };

    // Agents restart, and are killed; also the one that has to look for its server anew.
    for (host, how) in [
        (1, "systemctl restart fleetd.service"),
        (2, "systemctl restart fleetd.service"),
        (1, "systemctl kill -s KILL fleetd.service"),
    ] {
        let had = sessions(host)?;
        fleet.cluster.host(host).sh(how)?.ok()?;
        until("the agent is back", || Ok(sessions(host)? > had))?;
        as_before()?;
        untouched().with_context(|| how.to_owned())?;
    }

    // The cable: neither side hears a word. Both find out by themselves, and the agent is back soon after the cable is.
    let cut = fleet.cluster.host(1);
    let (had, lost) = (sessions(1)?, told(&fleet, 1, "the session with the server ended")?);
    cut.cut()?;
    until("the agent finds out", || Ok(told(&fleet, 1, "the session with the server ended")? > lost))?;
    let ended = format!("session with machine {} ends", cut.machine_id());
    until("the server finds out", || Ok(told(&fleet, 0, &ended)? >= had))?;
    // What happens there meanwhile is told when it is back.
    let victim = before.on(1).into_iter().next().context("a unit of the machine that was cut off")?;
    cut.run(["systemctl", "kill", "-s", "KILL", &victim])?.ok()?;
    cut.join()?;
    until("the agent is back", || Ok(sessions(1)? > had))?;
    until("the failure is told", || Ok(fleet.state(&victim)?.as_deref() == Some("failed failed")))?;
    fleet.running(&units)?.only_changed(&before, &BTreeSet::from([victim]))?;
    ensure!(machines(&fleet)? == 3);
    Ok(())
}

#[test]
fn what_happened_while_the_server_was_dead_is_told() -> Result<()> {
    let fleet = Fleet::join_one_server("dead", 3, "agent_ttl=\"10m\"")?;
    let pin = |host: usize| format!("[X-Fleet]\nMachineID={}\n", fleet.cluster.host(host).machine_id());
    let units = units();
    let before = fleet.start_all(&units, SLEEP)?;
    for (unit, host) in [("fails.service", 1), ("stopped.service", 1), ("goes.service", 2)] {
        fleet.start(unit, &format!("{SLEEP}{}", pin(host)))?;
    }
    let oneshot = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/sh -c 'until test -e /run/go; do sleep 0.1; done'\n";
    fleet.file("finishes.service", &format!("{oneshot}{}", pin(2)))?;
    fleet.ok("start --no-block finishes.service")?;
    until("it is under way", || Ok(fleet.state("finishes.service")?.as_deref() == Some("activating start")))?;

    // For good, until it is started again.
    fleet.host().sh("systemctl stop fleetd.socket; systemctl kill -s KILL fleetd.service; systemctl stop fleetd.service")?.ok()?;
    for words in ["list-units", "start u0.service", "stop u0.service"] {
        let said = fleet.ctl(words)?;
        ensure!(said.code() == 1, "{words}: {said:?}");
        ensure!(
            said.stderr.contains("/run/fleet.sock") && said.stderr.contains("fleetd"),
            "{words}: {}",
            said.stderr
        );
    }
    // On another machine there is no server to ask, which it says, with where there is one.
    let elsewhere = fleet.cluster.host(1).run(["fleetctl", "list-units"])?;
    ensure!(elsewhere.code() == 1 && elsewhere.stderr.contains(fleet.host().ip()), "{elsewhere:?}");

    let (one, two) = (fleet.cluster.host(1), fleet.cluster.host(2));
    one.run(["systemctl", "kill", "-s", "KILL", "fails.service"])?.ok()?;
    one.run(["systemctl", "stop", "stopped.service"])?.ok()?;
    two.sh("touch /run/go; systemctl kill -s TERM goes.service")?.ok()?;
    // One agent that does not even remember.
    one.run(["systemctl", "restart", "fleetd.service"])?.ok()?;

    fleet.host().start_fleet()?;
    for (unit, state) in [
        ("fails.service", "failed failed"),
        ("stopped.service", "inactive dead"),
        ("goes.service", "inactive dead"),
        ("finishes.service", "active exited"),
    ] {
        until(&format!("{unit} is {state}"), || Ok(fleet.state(unit)?.as_deref() == Some(state)))?;
    }
    fleet.running(&units)?.only_changed(&before, &BTreeSet::new())?;
    until("all units are told", || {
        Ok(units.iter().all(|unit| matches!(fleet.state(unit), Ok(Some(state)) if state == "active running")))
    })?;
    ensure!(machines(&fleet)? == 3);
    Ok(())
}
