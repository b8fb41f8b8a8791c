//! Ignition: files and units are there before the machine boots for the first time. What it reads is made of Butane's files.

use super::{example, list, mode, only, put, text, with_etcd, with_one_server, yaml};
use anyhow::{Context, Result, bail, ensure};
use fleet_testbed::Host;
use serde_json::{Value, json};

const NAMES: [&str; 3] = ["server", "machine", "etcd"];

/// Percent-encodes all but letters, digits and `-._~`.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// The bytes of a `data:,` URL.
fn decoded(url: &str) -> Result<Vec<u8>> {
    let mut rest =
        url.strip_prefix("data:,").with_context(|| format!("{url} is not understood here"))?.bytes();
    let mut bytes = Vec::new();
    while let Some(byte) = rest.next() {
        let byte = match byte {
            b'%' => {
                let digits: Vec<u8> = rest.by_ref().take(2).collect();
                u8::from_str_radix(std::str::from_utf8(&digits)?, 16)?
            }
            byte => byte,
        };
        bytes.push(byte);
    }
    Ok(bytes)
}

/// What `butane` makes of a file of ours.
fn ignition(butane: &str) -> Result<Value> {
    let config = yaml(butane)?;
    only(&config, &["variant", "version", "storage", "systemd"])?;
    ensure!((text(&config, "variant")?, text(&config, "version")?) == ("flatcar", "1.1.0"));
    let mut files = Vec::new();
    for file in list(&config["storage"], "files")? {
        only(file, &["path", "mode", "contents"])?;
        let contents = match (file["contents"]["inline"].as_str(), file["contents"]["source"].as_str()) {
            (Some(inline), None) => {
                json!({"compression": "", "source": format!("data:,{}", encoded(inline))})
            }
            (None, Some(source)) => json!({"source": source}),
            _ => bail!("{:?} is neither inline nor a source", file["contents"]),
        };
        files.push(json!({"path": text(file, "path")?, "contents": contents, "mode": mode(&file["mode"])?}));
    }
    let mut units = Vec::new();
    for unit in list(&config["systemd"], "units")? {
        only(unit, &["name", "enabled", "contents"])?;
        let enabled = unit["enabled"].as_bool().context("enabled")?;
        units.push(
            json!({"name": text(unit, "name")?, "enabled": enabled, "contents": text(unit, "contents")?}),
        );
    }
    Ok(json!({"ignition": {"version": "3.4.0"}, "storage": {"files": files}, "systemd": {"units": units}}))
}

#[test]
fn ignition_files_are_made_of_butane_files() -> Result<()> {
    for name in NAMES {
        let made: Value = serde_json::from_str(&example(&format!("ignition/{name}.ign"))?)?;
        assert_eq!(made, ignition(&example(&format!("ignition/{name}.bu"))?)?, "{name}");
    }
    Ok(())
}

/// Ignition's part, and the first boot.
fn apply(host: &Host, config: &str) -> Result<()> {
    let config: Value = serde_json::from_str(config)?;
    let entries = |parent: &str, key: &str| config[parent][key].as_array().cloned().unwrap_or_default();
    let string = |entry: &Value, key: &str| {
        entry[key].as_str().map(str::to_owned).with_context(|| format!("{key} of {entry}"))
    };
    for file in entries("storage", "files") {
        let source = string(&file["contents"], "source")?;
        let bytes = match source.strip_prefix("file://") {
            Some(path) => std::fs::read(host.disk_path(path))?,
            None => decoded(&source)?,
        };
        put(host, &string(&file, "path")?, &bytes, u32::try_from(file["mode"].as_u64().context("a mode")?)?)?;
    }
    for unit in entries("systemd", "units") {
        let name = string(&unit, "name")?;
        host.write(format!("/etc/systemd/system/{name}"), string(&unit, "contents")?)?;
        if unit["enabled"].as_bool().context("enabled")? {
            host.run(["systemctl", "enable", &name])?.ok()?;
        }
    }
    host.reboot()
}

#[test]
fn ignition_makes_machines_that_join() -> Result<()> {
    with_one_server("ign", ["ignition/server.ign", "ignition/machine.ign"], apply)
}

#[test]
fn ignition_makes_machines_on_etcd() -> Result<()> {
    with_etcd("ignetcd", "ignition/etcd.ign", apply)
}
