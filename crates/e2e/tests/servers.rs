//! Several servers: each answers for the whole cluster, also for machines that have their session with another; and agents find another server
//! when theirs is gone.

use super::SLEEP;
use anyhow::{Context, Result, ensure};

use fleet_e2e::{Fleet, PATIENCE, base64, from_base64, until};
use serde_json::{Value, json};
use std::time::Instant;

/// Runs on every machine.
const EVERYWHERE: &str = "[Unit]\nDescription=Everywhere\n[Service]\nExecStart=/bin/sh -c 'echo said by $$(cat /etc/machine-id); exec sleep infinity'\n\
                          [X-Fleet]\nGlobal=true\n";

/// The host of the server that has the session with a machine, as the registry says at a member of etcd.
fn server_by(fleet: &Fleet, member: usize, host: usize) -> Result<Option<usize>> {
    let key = format!("/_coreos.com/fleet/v3/entries/presence/{}", id(fleet, host));
    let answer = fleet.members().call(member, "kv/range", &json!({"key": base64(key.as_bytes())}))?;
    let Some(value) = answer["kvs"][0]["value"].as_str() else { return Ok(None) };
    let presence: Value = serde_json::from_slice(&from_base64(value)?)?;
    Ok(fleet.cluster.hosts().iter().position(|host| host.machine_id() == presence["server"]))
}

fn server_of(fleet: &Fleet, host: usize) -> Result<Option<usize>> {
    server_by(fleet, 0, host)
}

/// Waits until another server than this has the session with a machine; which.
fn moved(fleet: &Fleet, machine: usize, from: usize) -> Result<usize> {
    let (mut to, other) = (None, (from + 1) % 3);
    let waited = until("another server has the session", || {
        to = server_by(fleet, other, machine)?.filter(|server| *server != from);
        Ok(to.is_some())
    });
    waited.with_context(|| format!("{}{}", log(fleet, machine), log(fleet, from)))?;
    to.context("a server")
}

/// What fleetd on a host said last.
fn log(fleet: &Fleet, host: usize) -> String {
    let host = fleet.cluster.host(host);
    let log =
        host.run(["journalctl", "-u", "fleetd.service", "-n", "40", "--no-pager", "-o", "short-precise"]);
    format!("{}:\n{}", host.name(), log.map(|log| log.stdout).unwrap_or_default())
}

fn id(fleet: &Fleet, host: usize) -> &str {
    fleet.cluster.host(host).machine_id()
}

/// What a GET of the API says at a server, as JSON.
fn get(fleet: &Fleet, server: usize, path: &str) -> Result<Value> {
    let answer = fleet.http_on(server)?.get(&format!("/fleet/v1/{path}"))?;
    serde_json::from_str(&answer.body).with_context(|| format!("{path}: {answer:?}"))
}

#[test]
fn any_server_answers_for_the_whole_cluster() -> Result<()> {
    let fleet = Fleet::on_etcd("servers", 3, 2, "agent_ttl=\"15s\"\nmass_loss_rate=\"0.01\"")?;
    fleet.start("everywhere.service", EVERYWHERE)?;
    until("it runs everywhere", || Ok(fleet.copies("everywhere.service")?.len() == 5))?;

    for server in fleet.servers() {
        for machine in 0..5 {
            // The state is told a moment after systemd has it.
            let machine = id(&fleet, machine);
            until("its status is told", || {
                let said = fleet.ctl_on(server, &format!("status everywhere.service@{machine}"))?;
                Ok(said.success() && said.stdout.contains("active (running)"))
            })?;
            until("its journal is told", || {
                let said = fleet.ctl_on(server, &format!("journal everywhere.service@{machine}"))?.ok()?;
                Ok(said.stdout.contains(&format!("said by {machine}")))
            })?;
        }
        // One stream of all five.
        let said = fleet.ctl_on(server, "journal everywhere.service")?.ok()?.stdout;
        ensure!((0..5).all(|machine| said.contains(&format!("said by {}", id(&fleet, machine)))), "{said}");
        // Two joined, and are connected, wherever.
        let members = get(&fleet, server, "members")?;
        let members = members["members"].as_array().context("members")?.clone();
        ensure!(
            members.len() == 2 && members.iter().all(|member| member["connected"] == true),
            "{members:?}"
        );
        // Each says how far all are.
        until("all servers have said how they are", || {
            let said = fleet.ctl_on(server, "servers")?;
            Ok(said.success() && said.stdout.lines().filter(|line| line.contains("s ago")).count() == 3)
        })?;
        let said = get(&fleet, server, "servers")?;
        let listed = said["servers"].as_array().context("servers")?;
        ensure!(listed.iter().all(|server| server["revision"].is_u64() && server["lag"].is_u64()), "{said}");
    }

    a_server_out_of_reach_is_named(&fleet)?;
    what_the_leader_knows_is_known_everywhere(&fleet)
}

/// Where the agents' machines have their session.
fn a_server_out_of_reach_is_named(fleet: &Fleet) -> Result<()> {
    let machine = id(fleet, 3);
    let there = server_of(fleet, 3)?.context("no session")?;
    let asked = (there + 1) % 3;
    let from = fleet.cluster.host(asked).ip();
    let wall = format!("INPUT -p tcp -s {from} --dport 4919 -j REJECT --reject-with tcp-reset");
    fleet.cluster.host(there).sh(&format!("iptables -I {wall}"))?.ok()?;
    let said = fleet.ctl_on(asked, &format!("status everywhere.service@{machine}"))?;
    let expected = format!(
        "machine {machine} has its session with server {}, which can't be reached at {}:4919: ",
        id(fleet, there),
        fleet.cluster.host(there).ip()
    );
    ensure!(!said.success() && said.stderr.contains(&expected), "{said:?}");
    let servers = fleet.ctl_on(asked, "servers")?;
    ensure!(!servers.success() && servers.stderr.contains("does not say how it is"), "{servers:?}");
    fleet.cluster.host(there).sh(&format!("iptables -D {wall}"))?.ok()?;
    until("it can be asked again", || {
        Ok(fleet.ctl_on(asked, &format!("status everywhere.service@{machine}"))?.success())
    })
}

/// Many machines vanish: the leader holds their units up, and every server says so.
fn what_the_leader_knows_is_known_everywhere(fleet: &Fleet) -> Result<()> {
    let units: Vec<String> = (0..10).map(|number| format!("u{number}.service")).collect();
    let before = fleet.start_all(&units, SLEEP)?;
    let held: Vec<_> = [3, 4].iter().flat_map(|host| before.on(*host)).collect();
    ensure!(held.len() >= 3, "least loaded first: {before:?}");
    for host in [3, 4] {
        fleet.cluster.host(host).kill()?;
    }
    for server in fleet.servers() {
        until("the notice is known", || {
            let said = get(fleet, server, "notices")?;
            Ok(said["notices"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == "massLoss")))
        })?;
        // Some were placed elsewhere before the second machine was missed; the next would be in 100 s.
        until("a unit is known to be held up", || {
            let said = held.iter().map(|unit| get(fleet, server, &format!("units/{unit}/explain")));
            let said = said.collect::<Result<Vec<_>>>()?;
            let delayed = |said: &Value| {
                said["delayed"].as_str().is_some_and(|why| why.starts_with("many machines vanished"))
            };
            Ok(said.iter().any(delayed))
        })?;
    }
    for host in [3, 4] {
        fleet.cluster.host(host).boot()?;
    }
    for server in fleet.servers() {
        let mut said = Vec::new();
        let free = until("nothing is held up any more", || {
            let asked = held.iter().map(|unit| get(fleet, server, &format!("units/{unit}/explain")));
            said = asked.collect::<Result<Vec<_>>>()?;
            Ok(said.iter().all(|said| said["delayed"].as_str().unwrap_or_default().is_empty()))
        });
        free.with_context(|| format!("{said:?}\n{}{}", log(fleet, server), log(fleet, 3)))?;
    }
    Ok(())
}

#[test]
fn machines_leave_through_any_server() -> Result<()> {
    // Nobody could wait for this TTL.
    let fleet = Fleet::on_etcd("leave", 3, 2, "agent_ttl=\"1h\"")?;
    let units: Vec<String> = (0..10).map(|number| format!("u{number}.service")).collect();
    let before = fleet.start_all(&units, SLEEP)?;
    let drained = before.on(3);
    ensure!(!drained.is_empty(), "{before:?}");
    // Each by servers that have not its session.
    let there = server_of(&fleet, 3)?.context("no session")?;
    let said = fleet.ctl_on((there + 1) % 3, &format!("machine drain {}", id(&fleet, 3)))?.ok()?;
    for unit in &drained {
        ensure!(said.stdout.contains(&format!("Unit {unit} moved to ")), "{said:?}");
    }
    let after = fleet.one_each(&units)?;
    ensure!(after.on(3).is_empty(), "{after:?}");

    let removed = after.on(4);
    ensure!(!removed.is_empty(), "{after:?}");
    let there = server_of(&fleet, 4)?.context("no session")?;
    let server = (there + 2) % 3;
    fleet.ctl_on(server, &format!("machine remove {}", id(&fleet, 4)))?.ok()?;
    until("its units run elsewhere", || {
        let now = fleet.running(&units)?;
        Ok(now.one_each().is_ok() && now.on(4).is_empty())
    })?;
    fleet.running(&units)?.only_changed(&after, &removed)?;
    for server in fleet.servers() {
        until("it is no member any more", || {
            let members = get(&fleet, server, "members")?;
            Ok(members["members"].as_array().is_some_and(|all| all.len() == 1))
        })?;
    }

    // One that is out of reach: its presence is ended by the server that had its session.
    fleet.ctl_on(server, &format!("machine uncordon {}", id(&fleet, 3)))?.ok()?;
    let more: Vec<String> = (0..4).map(|number| format!("v{number}.service")).collect();
    let kept = fleet.start_all(&more, SLEEP)?.on(3);
    ensure!(!kept.is_empty(), "least loaded first");
    let there = server_of(&fleet, 3)?.context("no session")?;
    let host = fleet.cluster.host(3);
    host.run(["systemctl", "stop", "fleetd.service", "fleetd.socket"])?.ok()?;
    until("it has no session", || Ok(fleet.ctl_on(there, "machine list")?.stdout.contains("lost")))?;
    fleet.ctl_on((there + 1) % 3, &format!("machine remove {}", id(&fleet, 3)))?.ok()?;
    until("its units run elsewhere, and there, too", || {
        let now = fleet.running(&more)?;
        Ok(kept.iter().all(|unit| now.0[unit].len() == 2))
    })?;
    host.run(["systemctl", "start", "fleetd.service"])?.ok()?;
    let now = fleet.one_each(&more)?;
    ensure!(now.on(3).is_empty(), "{now:?}");
    Ok(())
}

#[test]
fn agents_find_another_server_when_theirs_is_gone() -> Result<()> {
    let fleet = Fleet::on_etcd("movers", 3, 2, "")?;
    // They are given the first one's address, and no other.
    for agent in [3, 4] {
        let host = fleet.cluster.host(agent);
        host.write("/etc/fleet/fleet.conf", format!("join=\"{}\"\n", fleet.host().ip()))?;
        host.run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    }
    until("they have their session with it", || {
        Ok((server_of(&fleet, 3)?, server_of(&fleet, 4)?) == (Some(0), Some(0)))
    })?;
    let units: Vec<String> = (0..10).map(|number| format!("u{number}.service")).collect();
    let before = fleet.start_all(&units, SLEEP)?;
    for agent in [3, 4] {
        let host = fleet.cluster.host(agent);
        until("the agent knows all servers", || {
            Ok(host.read("/var/lib/fleet/servers").unwrap_or_default().lines().count() == 3)
        })?;
    }
    let stay_dead = |server: usize| {
        let host = fleet.cluster.host(server);
        host.write("/run/systemd/system/fleetd.service.d/test.conf", "[Service]\nRestart=no\n")?;
        host.run(["systemctl", "daemon-reload"])?.ok()
    };

    // Killed: the kernel tells their agents at once.
    stay_dead(0)?;
    let begun = Instant::now();
    fleet.cluster.host(0).run(["systemctl", "kill", "-s", "KILL", "fleetd.service"])?.ok()?;
    let second = moved(&fleet, 3, 0)?;
    println!("with another server {} ms after theirs was killed", begun.elapsed().as_millis());
    ensure!(moved(&fleet, 4, 0)? == second, "both go to the next one");

    // An agent that begins anew finds one, though the server in its configuration is gone.
    fleet.cluster.host(3).run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    let unit = before.on(3).first().cloned().context("no unit")?;
    until("it answers there", || Ok(fleet.ctl_on(second, &format!("status {unit}"))?.success()))?;
    let second = server_of(&fleet, 3)?.context("no session")?;
    ensure!(second != 0);

    // Told to stop: it says so. The first is back, so that a majority of them is.
    fleet.cluster.host(0).start_fleet()?;
    stay_dead(second)?;
    let begun = Instant::now();
    fleet.cluster.host(second).run(["systemctl", "stop", "--no-block", "fleetd.service"])?.ok()?;
    let third = moved(&fleet, 3, second)?;
    println!("with another server {} ms after theirs was told to stop", begun.elapsed().as_millis());

    // Without power nobody says anything: keep-alive finds out. (The other servers are back, and so are all members of etcd.)
    fleet.cluster.host(second).start_fleet()?;
    let begun = Instant::now();
    fleet.cluster.host(third).kill()?;
    moved(&fleet, 3, third)?;
    println!(
        "with another server {} ms after the machine of theirs lost its power",
        begun.elapsed().as_millis()
    );

    // Nobody else took notice; machines whose fleetd was away for long count as gone.
    let touched = fleet.servers().flat_map(|server| before.on(server)).collect();
    fleet.running(&units)?.only_changed(&before, &touched)
}

#[test]
fn a_server_that_lost_its_registry_sends_its_agents_away() -> Result<()> {
    let fleet = Fleet::on_etcd("astray", 3, 2, "")?;
    let units: Vec<String> = (0..10).map(|number| format!("u{number}.service")).collect();
    let before = fleet.start_all(&units, SLEEP)?;
    let astray = server_of(&fleet, 3)?.context("no session")?;
    let other = (astray + 1) % 3;
    // The machines are well, and so is their network: only that server does not reach etcd.
    let wall = "OUTPUT -p tcp --dport 2379 -j DROP";
    fleet.cluster.host(astray).sh(&format!("iptables -I {wall}"))?.ok()?;
    let began = Instant::now();
    for agent in [3, 4] {
        moved(&fleet, agent, astray)?;
    }
    println!("sent away {} ms after the registry was lost", began.elapsed().as_millis());
    // Long after their presence would have run out.
    until("the machine of the server is given up", || {
        let said = fleet.ctl_on(other, "list-machines --no-legend --full")?;
        Ok(said.success() && !said.stdout.contains(id(&fleet, astray)))
    })?;
    let said = fleet.ctl_on(other, "list-machines --no-legend --full")?.ok()?.stdout;
    ensure!([3, 4].iter().all(|agent| said.contains(id(&fleet, *agent))), "{said}");
    fleet.running(&units)?.only_changed(&before, &before.on(astray))?;
    what_a_server_without_registry_says(&fleet, astray)?;
    fleet.cluster.host(astray).sh(&format!("iptables -D {wall}"))?.ok()?;
    fleet.one_each(&units).map(drop)
}

/// A server that starts and does not reach etcd: it goes on starting, and holds nobody up meanwhile.
fn what_a_server_without_registry_says(fleet: &Fleet, astray: usize) -> Result<()> {
    let host = fleet.cluster.host(astray);
    host.run(["systemctl", "restart", "--no-block", "fleetd.service"])?.ok()?;
    until("systemd sees it starting, and why", || {
        let seen = host.run(["systemctl", "show", "-p", "ActiveState,StatusText", "fleetd.service"])?.ok()?;
        Ok(seen.stdout.contains("ActiveState=activating") && seen.stdout.contains("StatusText=no registry"))
    })?;
    let said = fleet.ctl_on(astray, "list-units")?;
    ensure!(
        !said.success() && said.stderr.contains("fleet server has not read its registry yet"),
        "{said:?}"
    );
    // Agents and users are told at once that they have to go elsewhere.
    let other = fleet.cluster.host((astray + 1) % 3);
    let dialed = other.run(["bash", "-c", &format!("exec 3<>/dev/tcp/{}/4919", host.ip())])?;
    ensure!(!dialed.success() && dialed.stderr.contains("refused"), "{dialed:?}");
    Ok(())
}

#[test]
fn a_command_goes_on_when_its_server_dies() -> Result<()> {
    let fleet = Fleet::on_etcd("onward", 3, 0, "")?;
    let host = fleet.cluster.host(2);
    host.write("/root/token", fleet.ok("user create ops --role operator")?)?;
    let urls: Vec<_> =
        fleet.servers().map(|server| format!("https://{}:4919", fleet.cluster.host(server).ip())).collect();
    // It is up when somebody says so.
    let slow = format!(
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nTimeoutStartSec=infinity\n\
         ExecStart=/bin/sh -c 'until test -e /run/go; do sleep 0.1; done'\n[X-Fleet]\nMachineID={}\n",
        host.machine_id()
    );
    host.write("/root/slow.service", slow)?;
    let mut start = host.start_process([
        "fleetctl",
        "--token-file=/root/token",
        &format!("--endpoint={}", urls.join(",")),
        "start",
        "/root/slow.service",
    ])?;
    until("the unit is being started", || {
        Ok(host.run(["systemctl", "is-active", "slow.service"])?.stdout.trim() == "activating")
    })?;
    // The one that it follows the events of.
    let first = fleet.cluster.host(0);
    first.write("/run/systemd/system/fleetd.service.d/test.conf", "[Service]\nRestart=no\n")?;
    first.run(["systemctl", "daemon-reload"])?.ok()?;
    first.run(["systemctl", "kill", "-s", "KILL", "fleetd.service"])?.ok()?;
    until("it is dead", || Ok(!first.run(["systemctl", "is-active", "fleetd.service"])?.success()))?;
    host.write("/run/go", "")?;
    start.wait_for(&format!("Unit slow.service launched on {:.8}...", host.machine_id()), PATIENCE)?;
    start.finish(PATIENCE)?.ok().map(drop)
}
