//! fleetctl from anywhere: users, roles and https, from a machine that is no server; and several endpoints.

use super::SLEEP;
use anyhow::{Context, Result};
use fleet_e2e::{Fleet, PATIENCE, until};
use fleet_testbed::{Host, Output};
use std::time::Duration;

/// A command line of the second host, where users sit.
fn there(fleet: &Fleet, script: &str) -> Result<Output> {
    let script = script.replace("SERVER", fleet.host().ip());
    fleet.cluster.host(1).command(["sh", "-c", &script]).deadline(Duration::from_secs(180)).run()
}

fn copy(from: &Host, to: &Host, path: &str, new: &str) -> Result<()> {
    to.write(new, from.read(path)?)
}

/// Makes a user on the server, and puts the token into a file on the second host.
fn user(fleet: &Fleet, name: &str, words: &str) -> Result<String> {
    let out = fleet.ok(&format!("user create {name} {words}"))?;
    let token = out.trim_end().to_owned();
    assert!(token.starts_with("fleetuser1-") && !token.contains(char::is_whitespace), "alone on stdout");
    fleet.cluster.host(1).write(format!("/root/{name}.token"), &out)?;
    Ok(token)
}

/// fleetctl over https with the token of a user.
fn by_token(fleet: &Fleet, name: &str, words: &str) -> Result<Output> {
    there(fleet, &format!("fleetctl --endpoint https://SERVER:4919 --token-file /root/{name}.token {words}"))
}

fn refused(output: &Output, says: &str) {
    assert_ne!(output.code(), 0, "{output:?}");
    assert!(output.stderr.contains(says), "{says}: {output:?}");
}

#[test]
fn users_reach_the_cluster_from_anywhere() -> Result<()> {
    let fleet = Fleet::join_one_server("users", 2, "verbosity=2")?;
    let (server, other) = (fleet.host(), fleet.cluster.host(1));
    let mut secrets = Vec::new();
    for role in ["viewer", "operator", "admin"] {
        secrets.push(user(&fleet, role, &format!("--role {role} --cert /root/{role}"))?);
        for file in ["key.pem", "cert.pem", "ca.pem"] {
            copy(server, other, &format!("/root/{role}/{file}"), &format!("/root/{role}/{file}"))?;
        }
        let key = server.read(format!("/root/{role}/key.pem"))?;
        secrets.push(key.lines().nth(1).context("a key")?.to_owned());
    }
    other.write("/root/a.service", SLEEP)?;
    other.write("/root/b.service", SLEEP)?;

    // Each role does what it may: by token, by certificate, by the environment.
    for (role, unit) in [("operator", "a"), ("admin", "b")] {
        by_token(&fleet, role, &format!("start /root/{unit}.service"))?.ok()?;
    }
    let certificate =
        "--ca-file /root/ROLE/ca.pem --cert-file /root/ROLE/cert.pem --key-file /root/ROLE/key.pem";
    let by_certificate = |role: &str, words: &str| {
        let files = certificate.replace("ROLE", role);
        there(&fleet, &format!("fleetctl --endpoint https://SERVER:4919 {files} {words}"))
    };
    fleet.cluster.hosts().iter().try_for_each(|host| host.sync_journal())?;
    for role in ["viewer", "operator", "admin"] {
        for words in ["list-machines --no-legend", "list-units --no-legend", "list-unit-files --no-legend"] {
            for out in [by_token(&fleet, role, words)?, by_certificate(role, words)?] {
                assert_eq!(out.ok()?.stdout.lines().count(), 2, "{role}: {words}");
            }
        }
        assert!(by_token(&fleet, role, "status a b")?.ok()?.stdout.contains("active (running)"));
        assert!(by_certificate(role, "journal b")?.ok()?.stdout.contains("Started b.service"));
        assert_eq!(by_certificate(role, "cat a")?.ok()?.stdout, SLEEP);
    }
    let environment = "FLEETCTL_ENDPOINT=https://SERVER:4919 FLEETCTL_TOKEN=$(cat /root/viewer.token)";
    there(&fleet, &format!("{environment} fleetctl explain a"))?.ok()?;

    // And not what it may not.
    let id = other.machine_id();
    for words in [
        "stop a",
        "destroy a",
        "start /root/a.service /root/c.service",
        &format!("machine metadata {id} a=b"),
    ] {
        other.write("/root/c.service", SLEEP)?;
        for out in [by_token(&fleet, "viewer", words)?, by_certificate("viewer", words)?] {
            refused(&out, "user viewer has the role viewer; this takes the role operator");
        }
    }
    by_token(&fleet, "operator", &format!("machine metadata {id} a=b"))?.ok()?;
    for words in [
        "join-token create",
        "join-token list",
        "user list",
        "user create x --role admin",
        &format!("machine remove {id}"),
    ] {
        for role in ["viewer", "operator"] {
            let out = by_certificate(role, words)?;
            refused(&out, &format!("user {role} has the role {role}; this takes the role admin"));
            assert_eq!(out.stdout, "");
        }
    }
    let list = by_token(&fleet, "admin", "user list --no-legend")?.ok()?.stdout;
    assert_eq!(list.lines().count(), 3, "{list}");
    secrets.push(by_token(&fleet, "admin", "join-token create")?.ok()?.stdout.trim().to_owned());
    assert_eq!(fleet.state("a.service")?.as_deref(), Some("active running"), "nobody stopped it");

    // curl, with its own idea of the protocol and without one; a token, a certificate.
    for version in ["", "--http1.1", "--no-alpn"] {
        let curl = format!("curl -sS {version} --cacert /root/admin/ca.pem");
        let url = "https://SERVER:4919/fleet/v1/machines";
        let bearer = "-H \"Authorization: Bearer $(cat /root/viewer.token)\"";
        let shown = "--cert /root/viewer/cert.pem --key /root/viewer/key.pem";
        for how in [bearer, shown] {
            let answer = there(&fleet, &format!("{curl} {how} {url}"))?.ok()?.stdout;
            assert!(answer.contains(id), "{version} {how}: {answer}");
        }
        let answer = there(&fleet, &format!("{curl} {url}"))?.ok()?.stdout;
        assert!(answer.contains("\"code\":401") && !answer.contains(id), "{answer}");
    }
    // A machine is no user.
    let identity = "/var/lib/fleet/identity";
    let answer = there(
        &fleet,
        &format!(
            "curl -sS --cacert {identity}/ca.pem --cert {identity}/machine.pem --key {identity}/machine.key \
             https://SERVER:4919/fleet/v1/machines"
        ),
    )?;
    assert!(answer.ok()?.stdout.contains("machines are no users"));

    // The wrong door.
    refused(
        &there(&fleet, "fleetctl --endpoint http://SERVER:4919 list-units")?,
        "this port of fleetd speaks https, not http",
    );
    refused(
        &there(
            &fleet,
            "fleetctl --endpoint https://127.0.0.1:4919 --token-file /root/viewer.token list-units",
        )?,
        "connection refused",
    );
    refused(&there(&fleet, "fleetctl list-units")?, "is an agent only");
    there(&fleet, "fleetctl --endpoint unix:///run/fleet.sock,https://SERVER:4919 --token-file /root/viewer.token list-units")?.ok()?;

    // Another cluster.
    let foreign = Fleet::up("users-foreign")?;
    let token = foreign.ok("user create ann --role admin --cert /root/ann")?;
    other.write("/root/foreign.token", token)?;
    refused(&by_token(&fleet, "foreign", "list-units")?, "its certificate is not of this cluster");
    for file in ["key.pem", "cert.pem", "ca.pem"] {
        copy(foreign.host(), other, &format!("/root/ann/{file}"), &format!("/root/foreign/{file}"))?;
    }
    refused(&by_certificate("foreign", "list-units")?, "its certificate is not of this cluster");
    other.write("/root/foreign/ca.pem", other.read("/root/admin/ca.pem")?)?;
    refused(&by_certificate("foreign", "list-units")?, "it does not take our certificate");

    // Who is removed is out at once, also of what is open.
    let mut follow = other
        .command([
            "sh",
            "-c",
            &format!(
                "exec fleetctl --endpoint https://{} --token-file /root/viewer.token journal -f a",
                server.ip().to_owned() + ":4919"
            ),
        ])
        .start()?;
    follow.wait_for("Started a.service", PATIENCE)?;
    let mut events = other
        .command(["sh", "-c", &format!("exec curl -sSN --cacert /root/viewer/ca.pem --cert /root/viewer/cert.pem --key /root/viewer/key.pem 'https://{}:4919/fleet/v1/events?snapshot=1'", server.ip())])
        .start()?;
    events.wait_for("event: ready", PATIENCE)?;
    fleet.ok("user remove viewer")?;
    let followed = follow.finish(PATIENCE)?;
    assert_eq!(followed.code(), 1, "{followed:?}");
    assert_ne!(events.finish(PATIENCE)?.code(), 0);
    refused(&by_token(&fleet, "viewer", "list-units")?, "the user token is wrong");
    refused(&by_certificate("viewer", "list-units")?, "the certificate of user viewer is not valid any more");
    // A role counts at once; so does the end of the time.
    fleet.ok("user role operator viewer")?;
    refused(&by_token(&fleet, "operator", "stop a")?, "has the role viewer");
    secrets.push(user(&fleet, "brief", "--role viewer --ttl 1s")?);
    until("the access expires", || {
        Ok(by_token(&fleet, "brief", "list-units")?.stderr.contains("the access of user brief has expired"))
    })?;

    // The log says who was refused, and has no secret.
    let log = server.journal(Some("fleetd.service"))?;
    for says in [
        &format!("refused {}:", other.ip()),
        "user viewer, viewer, asks for what takes the role operator",
        "it does not speak TLS; is it http where https is due?",
        "its certificate is not of this cluster",
        "removed user viewer",
    ] {
        assert!(log.contains(says), "{says}");
    }
    for host in fleet.cluster.hosts() {
        let log = host.journal(None)?;
        for secret in &secrets {
            assert!(!log.contains(&secret[secret.len() - 40..]), "a secret is in the log of {}", host.name());
        }
    }
    Ok(())
}

#[test]
fn the_next_endpoint_serves_when_one_dies() -> Result<()> {
    let fleet = Fleet::join_one_server("endpoints", 2, "")?;
    let other = fleet.cluster.host(1);
    user(&fleet, "ops", "--role operator")?;
    let relay = "systemd-run --quiet --collect --unit=relay systemd-socket-activate -l 127.0.0.1:5000 \
                 /lib/systemd/systemd-socket-proxyd SERVER:4919";
    let ctl = |endpoints: &str, words: &str| {
        there(&fleet, &format!("fleetctl --endpoint {endpoints} --token-file /root/ops.token {words}"))
    };
    let both = "https://127.0.0.1:5000,https://SERVER:4919";

    // The first is not there.
    assert_eq!(ctl(both, "list-machines --no-legend")?.ok()?.stdout.lines().count(), 2);

    // The first dies while a command waits for a unit. It is the one that is used: there is no other way at first.
    there(&fleet, relay)?.ok()?;
    until("the relay is there", || Ok(ctl("https://127.0.0.1:5000", "list-machines")?.success()))?;
    let gate = "[Service]\nExecStartPre=/bin/sh -c 'until test -e /run/gate; do sleep 0.1; done'\nExecStart=/bin/sleep infinity\n";
    other.write("/root/gate.service", gate)?;
    let line =
        format!("exec fleetctl --endpoint {both} --token-file /root/ops.token start /root/gate.service");
    let start = other.command(["sh", "-c", &line.replace("SERVER", fleet.host().ip())]).start()?;
    until(
        "it is on its way",
        || Ok(fleet.state("gate.service")?.as_deref() == Some("activating start-pre")),
    )?;
    other.run(["systemctl", "kill", "--signal=KILL", "relay.service"])?.ok()?;
    for host in fleet.cluster.hosts() {
        host.write("/run/gate", "")?;
    }
    let started = start.finish(PATIENCE)?.ok()?;
    assert!(started.stdout.contains("Unit gate.service launched on "), "{started:?}");

    // Nobody.
    let out = ctl("https://127.0.0.1:5000,https://SERVER:1,unix:///run/fleet.sock", "list-machines")?;
    refused(
        &out,
        "no server answers (https://127.0.0.1:5000: dial tcp 127.0.0.1:5000: connect: connection refused; ",
    );
    refused(&out, "unix:///run/fleet.sock: googleapi: Error 503: fleetd on this machine is an agent only");
    Ok(())
}
