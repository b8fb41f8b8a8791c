//! Several servers on etcd: how they come up, and that any of them will do.

use super::SLEEP;
use anyhow::{Context, Result, ensure};
use fleet_e2e::{Fleet, Http, PATIENCE, base64, until, until_within};
use fleet_testbed::{Cluster, Etcd, EtcdOptions, Host, Options, bin_dir};
use serde_json::json;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::time::Duration;

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

#[test]
fn the_leader_keeps_etcd_compacted() -> Result<()> {
    // The shortest there is.
    let shortest = Duration::from_secs(60);
    let fleet = Fleet::on_etcd("compact", 1, 0, "etcd_compaction=\"1m\"")?;
    let first = json!({"key": base64(b"k"), "revision": "2"});
    let compacted = || match fleet.members().call(0, "kv/range", &first) {
        Ok(_) => Ok(false),
        Err(error) if format!("{error:#}").contains("required revision has been compacted") => Ok(true),
        Err(error) => Err(error),
    };
    ensure!(!compacted()?, "the history since the first write is there");
    fleet.start("before.service", SLEEP)?;
    until_within(2 * shortest + PATIENCE, "it is compacted", compacted)?;
    fleet.start("after.service", SLEEP)?;
    let list = fleet.ok("list-units --no-legend --fields=unit,sub")?;
    ensure!(list == "after.service\trunning\nbefore.service\trunning\n", "{list}");
    Ok(())
}

/// Waits until a server refuses what is in etcd, and says so with every answer to a write and in its log.
fn refuses(fleet: &Fleet, server: usize, reason: &str) -> Result<()> {
    until(&format!("server {server} refuses the registry"), || {
        let said = fleet.ctl_on(server, "destroy u0.service")?;
        Ok(!said.success()
            && said.stderr.contains(reason)
            && said.stderr.contains("fleetctl registry accept"))
    })?;
    until("its log says so", || Ok(log(fleet.cluster.host(server))?.contains("the registry is refused")))
}

fn log(host: &Host) -> Result<String> {
    host.journal(Some("fleetd.service"))
}

#[test]
fn an_etcd_that_lost_its_data_is_refused_until_it_is_accepted() -> Result<()> {
    let fleet = Fleet::on_etcd("lost", 3, 1, "agent_ttl=\"15s\"")?;
    let units: Vec<String> = (0..8).map(|number| format!("u{number}.service")).collect();
    let before = fleet.start_all(&units, SLEEP)?;
    fleet.members().wipe()?;
    for server in fleet.servers() {
        refuses(&fleet, server, "etcd has no registry at /_coreos.com/fleet/ any more")?;
        let list = fleet.ctl_on(server, "list-units --no-legend")?.ok()?.stdout;
        ensure!(list.lines().count() == units.len(), "reads are answered from what was known: {list}");
    }
    // It is remembered over a restart, and nobody took the empty etcd for an empty cluster.
    fleet.cluster.host(1).run(["systemctl", "restart", "--no-block", "fleetd.service"])?.ok()?;
    until("the restarted server refuses it, too", || {
        let log = log(fleet.cluster.host(1))?;
        Ok(log.rsplit("Starting fleetd").next().is_some_and(|log| log.contains("the registry is refused")))
    })?;
    let answer = fleet.http_on(1)?.get("/fleet/v1/units")?;
    ensure!(answer.status == 503 && answer.body.contains("has not read its registry yet"), "{answer:?}");
    ensure!(fleet.running(&units)? == before, "nothing was touched");

    // Somebody has to say so, and is told first what that means.
    let asked = fleet.ctl("registry accept")?;
    ensure!(asked.code() == 1 && asked.stderr.contains("registry accept --yes"), "{asked:?}");
    ensure!(fleet.running(&units)? == before, "nothing was touched");
    for server in fleet.servers() {
        until("it is accepted", || fleet.ctl_on(server, "registry accept --yes")?.ok().map(|_| true))?;
    }
    for server in fleet.servers() {
        until("each server knows all servers' machines", || {
            let list = fleet.ctl_on(server, "list-machines --no-legend")?;
            ensure!(list.stdout.lines().count() == 3, "{list:?}\n{}", log(fleet.cluster.host(server))?);
            Ok(true)
        })?;
    }
    // What the registry does not know is stopped by those who trust it; the machine that joined has no servers that know it, and no orders.
    until("only the machine without orders runs units", || {
        let now = fleet.running(&units)?;
        Ok((0..3).all(|host| now.on(host).is_empty()) && now.on(3) == before.on(3))
    })?;
    fleet.start("new.service", SLEEP)?;
    fleet.one_each(&["new.service"])?;
    Ok(())
}

#[test]
fn an_etcd_restored_from_a_backup_is_refused_until_it_is_accepted() -> Result<()> {
    let fleet = Fleet::on_etcd("restored", 1, 1, "agent_ttl=\"15s\"")?;
    let units: Vec<String> = (0..4).map(|number| format!("u{number}.service")).collect();
    let kept = fleet.start_all(&units, SLEEP)?;
    let members = fleet.members();
    members.kill(&[0])?;
    members.copy_data(false)?;
    members.boot_all()?;
    let late = ["late0.service", "late1.service"];
    until("writes are taken again", || Ok(fleet.start_all(&late, SLEEP).is_ok()))?;
    let lost = fleet.running(&late)?;
    members.kill(&[0])?;
    members.copy_data(true)?;
    members.boot_all()?;
    refuses(&fleet, 0, "has gone back from revision")?;
    ensure!(fleet.running(&units)? == kept && fleet.running(&late)? == lost, "nothing was touched");
    until("it is accepted", || fleet.ctl("registry accept --yes")?.ok().map(|_| true))?;
    until("what the backup does not know is gone", || {
        Ok(fleet.running(&late)?.0.values().all(Vec::is_empty) && fleet.machines()? == 2)
    })?;
    ensure!(fleet.running(&units)? == kept, "what it knows was not touched");
    Ok(())
}

/// An etcd of the time of fleet 1.0, as far as it gets: it speaks HTTP/1 and has no API v3.
fn old_etcd(address: &str) -> Result<String> {
    let listener = TcpListener::bind((address, 0))?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(|stream| stream.ok()) {
            let mut start = [0; 16];
            let _ = stream.read(&mut start);
            let _ =
                stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            // Closed with something unread it would be reset, and the answer may be lost.
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    Ok(endpoint)
}

#[test]
fn what_is_wrong_with_an_etcd_is_said_while_fleetd_starts() -> Result<()> {
    let cluster = Cluster::up(Options::for_test("wrong", 1).fleet(bin_dir()?))?;
    let (host, gateway) = (cluster.host(0), cluster.gateway());
    let options = EtcdOptions { members: 1, tls: None, arguments: Vec::new() };
    let etcd = Etcd::start_with(options, &[gateway.parse()?])?;
    let good = etcd.endpoint(0);
    let put = |key: &str, value: &str| {
        let body = json!({"key": base64(key.as_bytes()), "value": base64(value.as_bytes())});
        etcd.api(0, "kv/put", &body, None).map(drop)
    };
    put("/someone/elses", "data")?;
    put("/newer/v3/registry", r#"{"format":99,"id":"x"}"#)?;
    put("/damaged/v3/registry", "garbage")?;
    let old = old_etcd(&gateway)?;
    let nobody = format!("http://{gateway}:1");
    let servers = |endpoint: &str| format!("etcd_servers=[\"{endpoint}\"]");
    let prefix = |prefix: &str| format!("{}\netcd_key_prefix=\"{prefix}\"", servers(&good));
    let login = "etcd_username=\"fleet\"\netcd_password=\"not-the-one\"";
    for (conf, server, says) in [
        (servers(&nobody), &nobody, "connection refused"),
        (servers(&old), &old, "no etcd API v3"),
        (servers(&good.replace("http:", "https:")), &good, "is its URL http://"),
        (
            prefix("/someone/"),
            &good,
            "data of something else at etcd_key_prefix /someone/: the key /someone/elses",
        ),
        (prefix("/newer/"), &good, "/newer/v3/registry says format 99"),
        (prefix("/damaged/"), &good, "/damaged/v3/registry can't be read"),
        // Last, since it needs users, whom nobody has given a password before.
        (format!("{}\n{login}", servers(&good)), &good, "does not take the user name and password"),
    ] {
        if conf.contains("password") {
            for (path, body) in [
                ("role/add", json!({"name": "root"})),
                ("user/add", json!({"name": "root", "password": "root"})),
                ("user/grant", json!({"user": "root", "role": "root"})),
                ("enable", json!({})),
            ] {
                etcd.api(0, &format!("auth/{path}"), &body, None)?;
            }
        }
        host.write("/etc/fleet/fleet.conf", format!("{conf}\n"))?;
        host.run(["systemctl", "restart", "--no-block", "fleetd.socket", "fleetd.service"])?.ok()?;
        let text = |property: &str| -> Result<String> {
            Ok(host.run(["systemctl", "show", "--value", "-p", property, "fleetd.service"])?.ok()?.stdout)
        };
        let told = || -> Result<bool> {
            let log = log(host)?;
            let said = log.rsplit("Starting fleetd").next().unwrap_or_default();
            let said = said.lines().find(|line| line.contains(says));
            let server = server.trim_start_matches("http");
            Ok(said.is_some_and(|line| line.contains(server)) && text("StatusText")?.contains(says))
        };
        until(&format!("it is said: {says}"), told).with_context(|| {
            format!("{}\n{}", text("StatusText").unwrap_or_default(), log(host).unwrap_or_default())
        })?;
        ensure!(text("ActiveState")? == "activating\n", "systemd sees that it is starting");
        let answer = Http::new(host.root_path("/run/fleet.sock")?).get("/fleet/v1/machines")?;
        ensure!(answer.status == 503, "{answer:?}");
    }
    ensure!(!log(host)?.contains("not-the-one"), "a secret is in the log");

    // What is wrong was said once each, or once a minute; it does not keep fleetd from stopping; and put right, it starts.
    let attempts = log(host)?.matches("connection refused").count();
    ensure!(attempts <= 2, "said {attempts} times");
    let root = "etcd_username=\"root\"\netcd_password=\"root\"\netcd_key_prefix=\"/fresh/\"";
    host.write("/etc/fleet/fleet.conf", format!("{}\n{root}\n", servers(&good)))?;
    host.run(["systemctl", "stop", "fleetd.service"])?.ok()?;
    host.start_fleet()?;
    let list = || host.run(["fleetctl", "list-machines", "--no-legend"]);
    until("it serves", || Ok(list()?.stdout.lines().count() == 1))
}

#[test]
fn records_changed_by_hand_cost_only_themselves() -> Result<()> {
    let fleet = Fleet::on_etcd("damaged", 1, 1, "agent_ttl=\"15s\"")?;
    let units: Vec<String> = (0..6).map(|number| format!("u{number}.service")).collect();
    let mut before = fleet.start_all(&units, SLEEP)?;
    let machine = fleet.cluster.host(1).machine_id();
    let members = fleet.members();
    let keys = [
        ("unit/u0.service".to_owned(), "garbage"),
        ("unit/u1.service".to_owned(), r#"{"format":99,"file":"[Service]","desired":"inactive"}"#),
        ("schedule/u2.service".to_owned(), "\u{0}\u{1}"),
        (format!("machine/{machine}"), r#"{"format":99}"#),
        (format!("presence/{machine}"), "[]"),
        (format!("states/{machine}"), "null"),
        ("unit/no unit".to_owned(), "{}"),
        ("nonsense".to_owned(), "{}"),
    ];
    for (key, value) in &keys {
        members.put_by_hand(key, value)?;
    }
    for (key, _) in &keys[..6] {
        until("the record is named", || Ok(log(fleet.host())?.contains(&format!("registry record {key}"))))?;
    }
    let said = fleet.ctl("stop u0.service")?;
    ensure!(!said.success() && said.stderr.contains("can't be read"), "{said:?}");
    // The others can be worked with, and a restart of everybody changes nothing.
    fleet.ok("stop u5.service")?;
    fleet.ok("start u5.service")?;
    fleet.start("y.service", SLEEP)?;
    let explained = fleet.ok("explain u1.service")?;
    ensure!(explained.contains("can't be read by this server"), "{explained:?}");
    before.0.insert("u5.service".to_owned(), fleet.running(&["u5.service"])?.0["u5.service"].clone());
    for host in fleet.cluster.hosts() {
        host.run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    }
    // Whatever their names: the engine goes through units in that order.
    fleet.start("new.service", SLEEP)?;
    fleet.start("z.service", SLEEP)?;
    until("both machines are there", || Ok(fleet.machines()? == 2))?;
    ensure!(
        fleet.running(&units)? == before,
        "nothing was touched: {before:?}, now {:?}",
        fleet.running(&units)?
    );
    // What can't be read is said, and can be taken away.
    let said = fleet.ctl("start u0.service")?;
    ensure!(!said.success() && said.stderr.contains("can't be read"), "{said:?}");
    fleet.ok("destroy u0.service u1.service")?;
    until("they are gone", || {
        let left = fleet.running(&units[..2])?;
        ensure!(left.0.values().all(Vec::is_empty), "{left:?}\n{}", log(fleet.host())?);
        Ok(true)
    })?;
    fleet.start("u0.service", SLEEP)?;
    fleet.one_each(&units[2..])?;
    Ok(())
}
