//! Several servers on etcd: how they come up, and that any of them will do.

use super::SLEEP;
use anyhow::{Context, Result, ensure};
use fleet_e2e::{Fleet, until};
use std::collections::BTreeSet;

/// What `fleetctl servers` says.
#[derive(Debug, PartialEq)]
struct Servers {
    /// The machines of the servers.
    ids: BTreeSet<String>,
    /// Those of them that lead.
    leaders: BTreeSet<String>,
    /// Members of etcd.
    members: usize,
    /// Those of them that are well.
    well: usize,
}

fn servers(fleet: &Fleet, host: usize) -> Result<Servers> {
    let said = fleet.ctl_on(host, "--format=json servers")?;
    let said: serde_json::Value = serde_json::from_str(&said.stdout).with_context(|| format!("{said:?}"))?;
    let list = |key: &str| said[key].as_array().with_context(|| format!("no {key}: {said}"));
    let id = |server: &serde_json::Value| server["machineID"].as_str().unwrap_or_default().to_owned();
    let (servers, members) = (list("servers")?, list("registry")?);
    Ok(Servers {
        ids: servers.iter().map(id).collect(),
        leaders: servers.iter().filter(|server| server["leader"] == true).map(id).collect(),
        members: members.len(),
        well: members.iter().filter(|member| member["healthy"] == true).count(),
    })
}

#[test]
fn the_classic_layout_comes_up_by_starting_fleetd() -> Result<()> {
    let fleet = Fleet::classic("classic", 3, "metadata=\"disk=ssd\"")?;
    // Each server knows all, and all know the same leader.
    let ids: BTreeSet<_> = fleet.cluster.hosts().iter().map(|host| host.machine_id().to_owned()).collect();
    until("all servers say the same of the servers", || {
        let said = fleet.servers().map(|host| servers(&fleet, host)).collect::<Result<Vec<_>>>()?;
        let well =
            |said: &Servers| (said.leaders.len(), said.members, said.well) == (1, 3, 3) && said.ids == ids;
        Ok(said.iter().all(|other| well(other) && other == &said[0]))
    })?;
    let table = fleet.ok("servers")?;
    for host in fleet.cluster.hosts() {
        ensure!(table.contains(&format!("{}:4919", host.ip())), "{table}");
        ensure!(table.contains(&format!("http://{}:2379", host.ip())), "{table}");
    }

    // A unit through each, seen through each, whoever made it; they spread as ever.
    let units: Vec<String> = (0..6).map(|number| format!("u{number}.service")).collect();
    for (number, unit) in units.iter().enumerate() {
        let host = number % 3;
        fleet.cluster.host(host).write(format!("/root/{unit}"), SLEEP)?;
        fleet.ctl_on(host, &format!("start {unit}"))?.ok()?;
    }
    let running = fleet.one_each(&units)?;
    for host in fleet.servers() {
        ensure!(running.on(host).len() == 2, "least loaded first: {running:?}");
        until("each server knows that all of them run", || {
            let list = fleet.ctl_on(host, "list-units --no-legend --fields=unit,active,sub")?.ok()?.stdout;
            Ok(units.iter().all(|unit| list.contains(&format!("{unit}\tactive\trunning"))))
        })?;
    }
    // What one made another takes away.
    for (number, unit) in units.iter().enumerate() {
        let host = (number + 1) % 3;
        fleet.ctl_on(host, &format!("destroy {unit}"))?.ok()?;
    }
    for host in fleet.servers() {
        until("each server knows that they are gone", || {
            Ok(fleet.ctl_on(host, "list-unit-files --no-legend")?.ok()?.stdout.is_empty())
        })?;
    }
    Ok(())
}
