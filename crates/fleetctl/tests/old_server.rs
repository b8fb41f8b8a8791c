//! The program against a server that knows only what the original's did: no events, no texts, no
//! explanations. It has to get along by asking again and again.
#![allow(clippy::unwrap_used)]
mod server;

use serde_json::{Value, json};
use server::Server;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

const MACHINE: &str = "4a1e0c2fb7d94e6c8f3a51d2c07e9b11";

/// What the server knows: units by name, and how often each was looked at since it was changed, so
/// that every change takes its time.
#[derive(Default)]
struct Cluster {
    units: BTreeMap<String, (Value, usize)>,
}

impl Cluster {
    fn answer(&mut self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let path = path.split('?').next().unwrap();
        match (method, path.split_once('/')) {
            ("GET", None) if path == "machines" => {
                (200, json!({"machines": [{"id": MACHINE, "primaryIP": "172.30.7.11"}]}))
            }
            ("GET", None) if path == "state" => {
                let loaded = self.units.values().filter(|(unit, _)| unit["currentState"] != "inactive");
                let states: Vec<Value> = loaded
                    .map(|(unit, _)| {
                        let active = if unit["currentState"] == "launched" { "active" } else { "inactive" };
                        json!({"name": unit["name"], "machineID": MACHINE, "systemdLoadState": "loaded",
                               "systemdActiveState": active, "systemdSubState": "sub"})
                    })
                    .collect();
                (200, json!({"states": states}))
            }
            ("GET", Some(("units", name))) if !name.contains('/') => match self.units.get_mut(name) {
                None => (404, json!({"error": {"code": 404, "message": "unit does not exist"}})),
                Some((unit, looks)) => {
                    *looks += 1;
                    if *looks > 1 {
                        unit["currentState"] = unit["desiredState"].clone();
                        let placed = unit["desiredState"] != "inactive";
                        unit["machineID"] = if placed { MACHINE.into() } else { "".into() };
                    }
                    (200, unit.clone())
                }
            },
            ("PUT", Some(("units", name))) => {
                let wanted: Value = serde_json::from_str(body).unwrap();
                let new = json!({"name": name, "currentState": "inactive", "machineID": ""});
                let (unit, looks) = self.units.entry(name.to_owned()).or_insert((new, 0));
                for key in ["desiredState", "options"] {
                    if !wanted[key].is_null() {
                        unit[key] = wanted[key].clone();
                    }
                }
                *looks = 0;
                (201, Value::Null)
            }
            ("DELETE", Some(("units", name))) => {
                self.units.remove(name);
                (204, Value::Null)
            }
            _ => (404, json!({"error": {"code": 404, "message": ""}})),
        }
    }
}

#[test]
fn a_unit_s_life() {
    let mut cluster = Cluster::default();
    let server = Server::new(move |method, path, body| cluster.answer(method, path, body));
    let file = server.directory().join("a.service");
    std::fs::write(file, "[Service]\nExecStart=/bin/sleep infinity\n").unwrap();
    let run = |arguments: &[&str]| server.fleetctl(arguments);
    let on = "on 4a1e0c2f.../172.30.7.11";
    assert_eq!(run(&["submit", "a"]), ("Unit a.service inactive\n".into(), String::new(), 0));
    assert_eq!(run(&["load", "a"]), (format!("Unit a.service loaded {on}\n"), String::new(), 0));
    assert_eq!(run(&["start", "a"]), (format!("Unit a.service launched {on}\n"), String::new(), 0));
    assert_eq!(run(&["start", "a"]), (String::new(), String::new(), 0));
    assert_eq!(run(&["cat", "a"]).0, "[Service]\nExecStart=/bin/sleep infinity\n");
    assert_eq!(
        run(&["list-units"]).0,
        "UNIT\t\tMACHINE\t\t\tACTIVE\tSUB\na.service\t4a1e0c2f.../172.30.7.11\tactive\tsub\n"
    );
    // What it can't answer is asked on the machine, as fleetctl 1.0 did.
    let ssh = server.directory().join("ssh");
    std::fs::write(
        &ssh,
        "#!/bin/sh\n[ \"$1\" = -G ] && exit 1\nwhile [ \"$1\" != -- ]; do shift; done; echo \"$@\"; exit 3\n",
    )
    .unwrap();
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(
        run(&["status", "a"]),
        ("-- 172.30.7.11 systemctl status -l -- a.service\n".into(), String::new(), 3)
    );
    assert_eq!(
        run(&["journal", "--sudo", "-f", "--lines=3", "a"]).0,
        "-- 172.30.7.11 sudo journalctl --unit a.service --no-pager -n 3 --output short -f\n"
    );
    assert_eq!(
        run(&["stop", "a"]),
        (format!("Unit a.service loaded {on}\n"), "Successfully stopped units [a.service].\n".into(), 0)
    );
    assert_eq!(
        run(&["unload", "a"]),
        ("Unit a.service inactive\n".into(), "Successfully unloaded units [a.service].\n".into(), 0)
    );
    assert_eq!(run(&["destroy", "a", "nonsuch"]), ("Destroyed a.service\n".into(), String::new(), 0));
    assert_eq!(run(&["destroy", "a"]), (String::new(), "Units not found in registry\n".into(), 0));
    assert_eq!(run(&["start"]), (String::new(), "No units given\n".into(), 2));
    // Of several it is asked one by one.
    for name in ["b", "c"] {
        let file = server.directory().join(format!("{name}.service"));
        std::fs::write(file, "[Service]\nExecStart=/bin/true\n").unwrap();
    }
    let both = "Unit b.service inactive\nUnit c.service inactive\n";
    assert_eq!(run(&["submit", "b", "c"]), (both.into(), String::new(), 0));
    let (_, err, code) = run(&["unload", "b", "c"]);
    assert_eq!((err.as_str(), code), ("Successfully unloaded units [].\n", 0));
    let (out, err, code) = run(&["start", "b", "c"]);
    assert_eq!((out.lines().count(), err.as_str(), code), (2, "", 0), "{out}");
    let both = "Destroyed b.service\nDestroyed c.service\n";
    assert_eq!(run(&["destroy", "b", "c"]), (both.into(), String::new(), 0));
}
