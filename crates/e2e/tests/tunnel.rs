//! fleetctl from anywhere: `--tunnel`, `ssh` and `fd-forward` through real sshds, with the user's own ssh configuration, agent,
//! jump hosts and known hosts.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::Fleet;
use fleet_testbed::{Host, Output};
use std::time::Duration;

/// A server, a machine that joined it, and the machine somebody sits at, who has a key to log in to the others.
fn up(name: &str) -> Result<Fleet> {
    let fleet = Fleet::join_one_server(name, 3, "")?;
    let hosts = fleet.cluster.hosts();
    for host in &hosts[..2] {
        let key = host.start_sshd()?;
        hosts[2].copy_in(&key, "/root/key")?;
        // sshd's own limit, which drops connections at random when more than ten log in at a time.
        host.sh("usermod --append --groups fleet core; sed -i 's/^MaxStartups.*/MaxStartups 10:100:10/' /etc/ssh/sshd_config; systemctl restart ssh")?
            .ok()?;
    }
    hosts[2].sh("chmod 600 key; mkdir -p -m 700 .ssh")?.ok()?;
    Ok(fleet)
}

/// Runs a line of shell where the user sits; every wait in it is bounded, so it has to end.
fn here(fleet: &Fleet, script: &str) -> Result<Output> {
    fleet.cluster.host(2).command(["/bin/sh", "-c", script]).deadline(Duration::from_secs(60)).run()
}

fn ok(fleet: &Fleet, script: &str) -> Result<String> {
    Ok(here(fleet, script)?.ok()?.stdout)
}

fn short(host: &Host) -> &str {
    &host.machine_id()[..8]
}

#[test]
fn the_tunnel_is_the_users_own_ssh() -> Result<()> {
    let fleet = up("tunnel")?;
    let hosts = fleet.cluster.hosts();
    let (server, jump, me) = (&hosts[0], &hosts[1], &hosts[2]);
    let ip = server.ip();
    let machines = fleet.ok("list-machines")?;

    // Without any configuration: user core, the key from the agent. The key of the host is not known, and nobody is
    // there to be asked.
    let agent = |words: &str| format!("ssh-agent sh -c 'ssh-add -q key; fleetctl --tunnel={ip} {words}'");
    let out = here(&fleet, &agent("list-machines"))?;
    assert_eq!((out.code(), out.stdout.as_str()), (1, ""));
    assert!(out.stderr.contains("Host key verification failed."), "{}", out.stderr);
    assert!(out.stderr.contains(&format!("ssh to {ip} failed (exit code 255)")), "{}", out.stderr);
    assert_eq!(ok(&fleet, &agent("--strict-host-key-checking=false list-machines"))?, machines);
    assert!(!me.exists("/root/.fleetctl/known_hosts"), "a key that was not checked was kept");
    // A key that is known: in our file, in ssh's, or in one that is named.
    for file in [".fleetctl/known_hosts", ".ssh/known_hosts"] {
        ok(&fleet, &format!("mkdir -p .fleetctl; ssh-keyscan {ip} > {file} 2>/dev/null"))?;
        assert_eq!(ok(&fleet, &agent("list-machines"))?, machines, "{file}");
        ok(&fleet, &format!("mv {file} kh"))?;
    }
    assert_eq!(ok(&fleet, &agent("--known-hosts-file=/root/kh list-machines"))?, machines);
    ok(&fleet, &format!("echo {ip} $(ssh-keygen -y -f key) > kh2"))?;
    let out = here(&fleet, &agent("--known-hosts-file=/root/kh2 list-machines"))?;
    assert_eq!(out.code(), 1);
    assert!(out.stderr.contains("REMOTE HOST IDENTIFICATION HAS CHANGED"), "{}", out.stderr);
    // Somebody who may not log in.
    let out = here(&fleet, &agent("--strict-host-key-checking=false --ssh-username=nobody list-machines"))?;
    assert_eq!(out.code(), 1);
    assert!(out.stderr.contains("Permission denied"), "{}", out.stderr);

    // The configuration: an alias with user, key and known hosts, and one that is behind another: its address is only
    // right there.
    let config = format!(
        "Host box\n HostName {ip}\n User root\n Host *\n IdentityFile /root/key\n StrictHostKeyChecking accept-new\n\
         Host jump\n HostName {}\n User core\n Host far\n HostName {ip}\n Port 2200\n User root\n ProxyJump jump\n",
        jump.ip()
    );
    me.write("/root/.ssh/config", config)?;
    server
        .sh("printf 'Port 2200\\nListenAddress 0.0.0.0\\n' >> /etc/ssh/sshd_config; systemctl restart ssh")?
        .ok()?;
    // Only the jump host may go there.
    server.sh(&format!("ip rule add from {ip} to {} sport 2200 prohibit", me.ip()))?.ok()?;
    for host in ["box", "far"] {
        assert_eq!(ok(&fleet, &format!("fleetctl --tunnel={host} list-machines"))?, machines, "{host}");
        assert_eq!(
            ok(&fleet, &format!("FLEETCTL_TUNNEL={host} fleetctl list-machines"))?,
            machines,
            "{host}"
        );
    }
    assert!(
        me.read("/root/.fleetctl/known_hosts")?.contains(ip),
        "new keys are kept where the original kept them"
    );

    // Everything goes through it: many requests at a time, what is followed, and what is long.
    let units: Vec<String> = (0..20).map(|number| format!("many{number}.service")).collect();
    for unit in &units {
        me.write(format!("/root/{unit}"), SLEEP)?;
    }
    let all = units.join(" ");
    let started = ok(&fleet, &format!("fleetctl --tunnel=far start {all}"))?;
    assert_eq!(started.matches("launched on").count(), units.len(), "{started}");
    let status = ok(&fleet, &format!("fleetctl --tunnel=far status {all}"))?;
    assert_eq!(status.matches("active (running)").count(), units.len());
    hosts.iter().try_for_each(Host::sync_journal)?;
    let journal = ok(&fleet, &format!("fleetctl --tunnel=box journal --output=cat {all}"))?;
    assert_eq!(
        journal.matches(": Deactivated").count() + journal.matches("Started many").count(),
        units.len()
    );
    let destroyed = ok(&fleet, &format!("fleetctl --tunnel=box destroy {all}"))?;
    let expected: String = units.iter().map(|unit| format!("Destroyed {unit}\n")).collect();
    assert_eq!(destroyed, expected, "in the order of the command line");

    // Nothing there, nobody there, and somebody there who says nothing.
    let out = here(&fleet, "fleetctl --tunnel=box --endpoint=unix:///nonexistent.sock list-machines")?;
    assert_eq!(out.code(), 1);
    for text in
        ["dial unix /nonexistent.sock", "ssh to box ended with exit code 1", "Is fleetd running on box"]
    {
        assert!(out.stderr.contains(text), "{text:?} in {}", out.stderr);
    }
    let nobody = format!("{}.99", ip.rsplit_once('.').map_or("", |it| it.0));
    server
        .sh("systemd-run --quiet --socket-property=ListenStream=2222 --socket-property=Accept=yes --unit=mute sleep infinity")?
        .ok()?;
    for host in [nobody, format!("{ip}:2222"), format!("{ip}:2223")] {
        let out = here(&fleet, &format!("fleetctl --ssh-timeout=2 --tunnel={host} list-machines"))?;
        assert_eq!(out.code(), 1, "{host}");
        assert!(out.stderr.contains(&format!("ssh to {host} failed (exit code 255)")), "{}", out.stderr);
    }
    Ok(())
}

#[test]
fn ssh_to_machines_and_units() -> Result<()> {
    let fleet = up("ssh")?;
    let hosts = fleet.cluster.hosts();
    let (server, second) = (&hosts[0], &hosts[1]);
    let pin = format!("[X-Fleet]\nMachineID={}\n", second.machine_id());
    fleet.start("pinned.service", &format!("{SLEEP}{pin}"))?;
    fleet.start("global.service", &format!("{SLEEP}[X-Fleet]\nGlobal=true\n"))?;
    let config =
        format!("Host box\n HostName {}\n User root\n Host *\n IdentityFile /root/key\n", server.ip());
    hosts[2].write("/root/.ssh/config", config)?;
    // From outside, through the server; the machine's address need not be in reach from here.
    let run = |words: &str| {
        here(&fleet, &format!("fleetctl --strict-host-key-checking=false --tunnel=box ssh {words}"))
    };
    let id = second.machine_id();
    for words in [
        id.to_owned(),
        short(second).to_owned(),
        format!("--machine={}", short(second)),
        "pinned".to_owned(),
        "--unit=pinned.service".to_owned(),
        format!("global.service@{}", short(second)),
    ] {
        assert_eq!(run(&format!("{words} hostname"))?.ok()?.stdout.trim(), second.name(), "{words}");
    }
    assert_eq!(run("pinned whoami")?.stdout, "core\n");
    assert_eq!(
        here(
            &fleet,
            "fleetctl --strict-host-key-checking=false --tunnel=box --ssh-username=root ssh pinned whoami"
        )?
        .stdout,
        "root\n"
    );
    // The command: its words, its exit code, what it reads and writes.
    for (words, stdout, stderr, code) in [
        ("true", "", "", 0),
        ("exit 42", "", "", 42),
        ("'echo out; echo err >&2; exit 3'", "out\n", "err\n", 3),
        ("echo 'two  spaces' '$HOME'", "two spaces /home/core\n", "", 0),
        ("-- echo after dashes", "after dashes\n", "", 0),
        ("test -d / -a -n x", "", "", 0),
    ] {
        let out = run(&format!("pinned {words}"))?;
        assert_eq!((out.code(), out.stdout.as_str(), out.stderr.as_str()), (code, stdout, stderr), "{words}");
    }
    let typed = here(
        &fleet,
        "echo typed | fleetctl --strict-host-key-checking=false --tunnel=box ssh pinned cat; \
         printf 'hostname\\nexit 5\\n' | fleetctl --strict-host-key-checking=false --tunnel=box ssh pinned",
    )?;
    let expected = format!("typed\n{}\n", second.name());
    assert_eq!((typed.code(), typed.stdout), (5, expected));
    // With the agent forwarded, and without.
    let agent = "ssh-agent sh -c 'ssh-add -q key; fleetctl --strict-host-key-checking=false --tunnel=box ssh";
    assert_eq!(here(&fleet, &format!("{agent} -A pinned ssh-add -l | wc -l'"))?.ok()?.stdout, "1\n");
    assert!(!here(&fleet, &format!("{agent} pinned ssh-add -l'"))?.success());
    // What cannot be reached.
    for (words, code, text) in [
        ("--unit=global hostname", 1, "Unable to proceed: global units unsupported"),
        ("zzz hostname", 1, "Unable to proceed: could not find matching unit or machine"),
        ("--machine=zzz hostname", 1, "Unable to proceed: machine does not exist"),
        ("--ssh-port=2222 pinned hostname", 255, "ssh ended with 255: it could not log in as core@"),
    ] {
        let out = run(words)?;
        assert_eq!(out.code(), code, "{words}: {}", out.stderr);
        assert!(out.stderr.contains(text), "{words}: {}", out.stderr);
    }
    // Without a tunnel, from the server itself.
    server.copy_in(hosts[2].disk_path("/root/key"), "/root/.ssh/id_ed25519")?;
    server.sh("chmod 600 .ssh/id_ed25519")?.ok()?;
    assert_eq!(fleet.ok("--strict-host-key-checking=false ssh pinned hostname")?.trim(), second.name());

    // fd-forward: what it reads goes to the socket, what the socket says it writes.
    let request = "printf 'GET /fleet/v1/machines HTTP/1.0\\r\\n\\r\\n'; sleep 2";
    let answer = server.sh(&format!("({request}) | fleetctl fd-forward /run/fleet.sock"))?.ok()?.stdout;
    assert!(answer.starts_with("HTTP/1.0 200 OK") && answer.contains(id), "{answer}");
    let none = server.run(["fleetctl", "fd-forward", "/nonexistent.sock"])?;
    assert_eq!(none.code(), 1);
    assert!(
        none.stderr.starts_with("Failed dialing remote address: dial unix /nonexistent.sock"),
        "{}",
        none.stderr
    );
    Ok(())
}
