//! fleetd as the documentation of fleet 1.0 configures it: sockets of systemd, fleet.conf, variables, flags.

use crate::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};

/// The way to put a change of the socket into effect, from its documentation.
const RESTART: &str = "systemctl daemon-reload; systemctl stop fleet.service; systemctl restart fleet.socket; systemctl start fleet.service";

#[test]
fn the_api_is_on_every_socket_that_systemd_hands_over() -> Result<()> {
    let fleet = Fleet::up("sockets")?;
    let host = fleet.host();
    let sockets =
        "[Socket]\nListenStream=/run/second.sock\nListenStream=127.0.0.1:49153\nListenStream=49154\n";
    host.write("/etc/systemd/system/fleet.socket.d/30-ListenStream.conf", sockets)?;
    host.sh(RESTART)?.ok()?;
    until("the machine is there again", || Ok(fleet.machines()? == 1))?;
    let machines = fleet.ok("list-machines")?;
    for endpoint in [
        "unix:///run/fleet.sock".to_owned(),
        "unix:///var/run/fleet.sock".to_owned(),
        "file:///run/second.sock".to_owned(),
        "http://127.0.0.1:49153".to_owned(),
        "http://127.0.0.1:49154".to_owned(),
        format!("http://{}:49154", host.ip()),
    ] {
        assert_eq!(fleet.ok(&format!("--endpoint={endpoint} list-machines"))?, machines, "{endpoint}");
        let with_variable = format!("FLEETCTL_ENDPOINT={endpoint} fleetctl list-machines");
        assert_eq!(host.sh(&with_variable)?.ok()?.stdout, machines, "{endpoint}");
    }
    assert!(!fleet.ctl(&format!("--endpoint=http://{}:49153 list-machines", host.ip()))?.success());
    // Who can reach it can do everything: that is said of the one, and of no other.
    let log = host.journal(Some("fleetd.service"))?;
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("without encryption")).collect();
    assert!(matches!(warnings[..], [line] if line.contains(":49154")), "{warnings:?}");
    Ok(())
}

#[test]
fn without_systemds_sockets_fleetd_makes_its_own() -> Result<()> {
    let fleet = Fleet::installed("alias")?;
    let host = fleet.host();
    // A system on which /var/run is no link; D-Bus is where the programs look for it.
    host.sh("rm -f /var/run && mkdir /var/run && ln -s /run/dbus /var/run/dbus && mkdir -p /run/fleet")?
        .ok()?;
    let mut fleetd = host.start_process(["fleetd"])?;
    until("it answers", || {
        anyhow::ensure!(fleetd.is_running()?, "fleetd has ended");
        Ok(fleet.ctl("list-machines --no-legend")?.stdout.lines().count() == 1)
    })?;
    assert_eq!(
        host.sh("readlink /var/run/fleet.sock; stat -c %a:%G /run/fleet.sock")?.ok()?.stdout,
        "/run/fleet.sock\n660:fleet\n"
    );
    drop(fleetd);
    Ok(())
}

#[test]
fn every_option_of_fleet_1_0_counts() -> Result<()> {
    let fleet = Fleet::installed("options")?;
    let host = fleet.host();
    let log = || host.journal(Some("fleetd.service"));
    // The lines of its sample, with other values; in a file of its own, as `--config` allows.
    host.write(
        "/etc/other.conf",
        "# This config file is INI-formatted\n\
         verbosity=1\n\
         etcd_request_timeout=2.5\n\
         etcd_key_prefix=/x/\n\
         public_ip=\"10.9.8.7\"\n\
         metadata='region=us-west,az=us-west-1'\n\
         agent_ttl=\"45s\"\n\
         engine_reconcile_interval=5\n\
         token_limit=2\n\
         units_directory=/run/other/units/\n\
         enable_grpc=true\n\
         disable_watches=true\n\
         verify_units=true\n\
         authorized_keys_file=/root/.ssh/authorized_keys\n",
    )?;
    host.write(
        "/etc/systemd/system/fleetd.service.d/10-config.conf",
        "[Service]\nExecStart=\nExecStart=/usr/bin/fleetd --config /etc/other.conf\n",
    )?;
    host.sh("systemctl daemon-reload")?.ok()?;
    host.start_fleet()?;
    let machine = || fleet.ok("list-machines --no-legend --fields=ip,metadata");
    until("the file counts", || Ok(machine()? == "10.9.8.7\taz=us-west-1,region=us-west\n"))?;
    for unit in ["a.service", "b.service", "c.service"] {
        fleet.start(unit, SLEEP)?;
    }
    assert!(host.exists("/run/other/units/a.service") && !host.exists("/run/fleet/units/a.service"));
    let page: serde_json::Value = serde_json::from_str(&fleet.http()?.get("/fleet/v1/units")?.body)?;
    assert_eq!(page["units"].as_array().map(Vec::len), Some(2), "token_limit");
    assert!(page["nextPageToken"].is_string());
    let said = log()?;
    for expected in [
        "Using provided config file /etc/other.conf",
        "enable_grpc has no effect",
        "disable_watches has no effect",
        "Config option verify_units is no longer supported - ignoring",
        "Config option authorized_keys_file is no longer supported - ignoring",
        "HTTP PUT /fleet/v1/units/a.service",
    ] {
        assert!(said.contains(expected), "{expected:?} is not in the log:\n{said}");
    }

    // The same by variables, which count over the file; in a drop-in of the old name.
    host.write(
        "/etc/systemd/system/fleet.service.d/20-cloudinit.conf",
        "[Service]\nEnvironment=\"FLEET_PUBLIC_IP=10.9.8.8\"\nEnvironment=\"FLEET_METADATA=region=eu\"\n\
         Environment=\"FLEET_TOKEN_LIMIT=3\"\nEnvironment=\"FLEET_DISABLE_ENGINE=true\"\nEnvironment=\"FLEET_AGENT_TTL=1m\"\n",
    )?;
    host.sh("systemctl daemon-reload; systemctl restart fleet.service")?.ok()?;
    until("the variables count", || Ok(machine()? == "10.9.8.8\tregion=eu\n"))?;
    let page: serde_json::Value = serde_json::from_str(&fleet.http()?.get("/fleet/v1/units")?.body)?;
    assert_eq!(page["units"].as_array().map(Vec::len), Some(3));
    // No engine, no placement; what runs goes on.
    fleet.file("d.service", SLEEP)?;
    assert!(!fleet.ctl("start --timeout=3s d.service")?.success());
    assert_eq!(fleet.copies("d.service")?, [0; 0]);
    assert_eq!(fleet.copies("a.service")?, [0]);

    for version in ["fleetd --version", "fleetd -version", "fleetd version"] {
        let out = host.sh(version)?.ok()?.stdout;
        assert!(out.starts_with("fleetd version ") && out.lines().count() == 1, "{version}: {out}");
    }
    let missing = host.sh("fleetd --config /nonexistent")?;
    assert!(!missing.success() && missing.stderr.contains("/nonexistent"), "{}", missing.stderr);
    Ok(())
}
