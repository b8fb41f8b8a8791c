//! Clusters of several machines: tokens, members, metadata, removal; units that are on all of them.
#![allow(clippy::unwrap_used)]
mod server;

use serde_json::{Value, json};
use server::Server;
use std::sync::{Arc, Mutex};

const FIRST: &str = "4a1e0c2fb7d94e6c8f3a51d2c07e9b11";
const SECOND: &str = "4a1e77d0a3c84b55a8e19d6f20b4c722";
const THIRD: &str = "c93b5f08e1ad47d2b6740e9f8a2d3c33";

/// A cluster of a server and two members, the second of which is gone; with what it was asked to
/// change.
fn cluster() -> (Server, Arc<Mutex<Vec<String>>>) {
    let changes: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = changes.clone();
    let mut members = vec![
        json!({"machineID": SECOND, "joined": 1_795_300_000, "connected": true}),
        json!({"machineID": THIRD, "joined": 1_795_200_000, "connected": false}),
    ];
    let server = Server::new(move |method, path, body| {
        if method != "GET" {
            log.lock().unwrap().push(format!("{method} {path} {body}"));
        }
        let missing = |message: &str| (404, json!({"error": {"code": 404, "message": message}}));
        match (method, path.split_once('/')) {
            ("GET", None) if path == "machines" => {
                let metadata = json!({"disk": "ssd", "region": "eu"});
                let first = json!({"id": FIRST, "primaryIP": "172.30.7.11"});
                let second = json!({"id": SECOND, "primaryIP": "172.30.7.12", "metadata": metadata});
                (200, json!({"machines": [first, second]}))
            }
            ("GET", None) if path == "members" => (200, json!({"members": members})),
            ("GET", None) if path == "notices" => (200, json!({"notices": []})),
            ("PUT" | "DELETE", Some(("machines", mark)))
                if mark.ends_with("/cordon") || mark.ends_with("/drain") =>
            {
                if mark.starts_with(THIRD) {
                    missing("machine is not in this cluster")
                } else {
                    (204, Value::Null)
                }
            }
            ("GET", Some(("machines", drain))) if drain.ends_with("/drain") => {
                let reasons = [
                    json!({"machineID": FIRST, "reason": "it is cordoned"}),
                    json!({"machineID": THIRD, "reason": "its metadata has no disk"}),
                ];
                let stuck = json!([{"name": "a.service", "reasons": reasons}]);
                let undrained = if drain.starts_with(SECOND) { stuck } else { json!([]) };
                (200, json!({"draining": true, "stopping": [], "toMove": [], "undrained": undrained}))
            }
            ("GET", None) if path == "join-tokens" => {
                let old =
                    json!({"id": "b2", "created": 1_795_200_000, "expires": 1_795_300_000, "usesLeft": 1});
                let eternal = json!({"id": "a1", "created": 1_795_300_000, "expires": 253_402_207_200_i64});
                (200, json!({"joinTokens": [eternal, old]}))
            }
            ("POST", None) if path == "join-tokens" => {
                (201, json!({"id": "a1", "token": "fleet1-secret", "expires": 1_795_300_000, "usesLeft": 1}))
            }
            ("DELETE", Some(("join-tokens", "a1"))) => (204, Value::Null),
            ("DELETE", Some(("join-tokens", _))) => missing("join token does not exist"),
            ("DELETE", Some(("machines", id))) => {
                let before = members.len();
                members.retain(|member| member["machineID"] != id);
                if members.len() < before { (204, Value::Null) } else { missing("machine is no member") }
            }
            ("PATCH", None) if path == "machines" => (204, Value::Null),
            ("GET", None) if path == "users" => {
                let ann = json!({"name": "ann", "role": "viewer", "created": 1_795_200_000, "expires": 1_795_300_000});
                (200, json!({"users": [ann]}))
            }
            ("POST", None) if path == "users" => {
                let asked: Value = serde_json::from_str(body).unwrap();
                let certificate = if asked["request"].is_null() { "" } else { "a certificate\n" };
                let made = json!({"ca": "a CA\n", "certificate": certificate, "name": asked["name"],
                    "role": asked["role"], "token": "fleetuser1-secret", "expires": 1_795_300_000});
                if asked["name"] == "bob" {
                    (409, json!({"error": {"code": 409, "message": "user bob exists already"}}))
                } else {
                    (201, made)
                }
            }
            ("PATCH", Some(("users", "ann"))) => {
                (200, json!({"name": "ann", "role": "operator", "created": 1, "expires": 2}))
            }
            ("DELETE", Some(("users", "ann"))) => (204, Value::Null),
            (_, Some(("users", _))) => missing("user does not exist"),
            other => panic!("{other:?}"),
        }
    });
    (server, changes)
}

fn taken(changes: &Mutex<Vec<String>>) -> Vec<String> {
    std::mem::take(&mut *changes.lock().unwrap())
}

/// What was printed on stdout by a command that had nothing to complain of.
#[track_caller]
fn good(server: &Server, arguments: &[&str]) -> String {
    let (out, err, code) = server.fleetctl(arguments);
    assert_eq!((err.as_str(), code), ("", 0), "{arguments:?}");
    out
}

#[test]
fn join_tokens() {
    let (server, changes) = cluster();
    assert_eq!(good(&server, &["join-token", "create"]), "fleet1-secret\n");
    assert_eq!(good(&server, &["join-token", "create", "--ttl", "1h30m", "--uses=2"]), "fleet1-secret\n");
    assert_eq!(
        taken(&changes),
        ["POST join-tokens {}", r#"POST join-tokens {"ttl":"1h30m","uses":2}"#].map(str::to_owned)
    );
    let made: Value = serde_json::from_str(&good(&server, &["join-token", "create", "-o", "json"])).unwrap();
    assert_eq!((&made["token"], &made["usesLeft"]), (&json!("fleet1-secret"), &json!(1)));
    for wrong in [["--ttl", "24"], ["--ttl", "0s"], ["--uses", "0"], ["--uses", "many"]] {
        let (out, _, code) = server.fleetctl(&[&["join-token", "create"], &wrong[..]].concat());
        assert_eq!((out.as_str(), code), ("", 2), "{wrong:?}");
    }
    let list = good(&server, &["join-token", "list"]);
    let lines: Vec<Vec<&str>> =
        list.lines().map(|line| line.split('\t').filter(|cell| !cell.is_empty()).collect()).collect();
    assert_eq!(lines[0], ["ID", "CREATED", "EXPIRES", "USES"]);
    // The older one comes first; how far away the dates are depends on today.
    assert_eq!(lines[1][..2], ["b2", "2026-11-20 18:40 UTC"]);
    assert!(lines[1][2].starts_with("2026-11-21 22:26 UTC ("), "{list}");
    assert_eq!(lines[1][3], "1 left");
    assert!(lines[2][2].starts_with("9999-12-30 22:00 UTC (in "), "{list}");
    assert_eq!(lines[2][3], "unlimited");
    assert!(good(&server, &["join-token", "list", "--no-legend"]).starts_with("b2\t"));
    let tokens: Value = serde_json::from_str(&good(&server, &["join-token", "list", "-o=json"])).unwrap();
    assert_eq!(tokens[1], json!({"created": 1_795_300_000, "expires": 253_402_207_200_i64, "id": "a1"}));
    taken(&changes);
    assert_eq!(
        server.fleetctl(&["join-token", "revoke", "b3", "a1"]),
        ("Revoked join token a1\n".into(), "Join token b3 does not exist.\n".into(), 1)
    );
    assert_eq!(taken(&changes), ["DELETE join-tokens/b3 ", "DELETE join-tokens/a1 "].map(str::to_owned));
    assert_eq!(
        server.fleetctl(&["join-token", "revoke"]),
        (String::new(), "No join tokens given\n".into(), 2)
    );
}

#[test]
fn users() {
    let (server, changes) = cluster();
    assert_eq!(good(&server, &["user", "create", "ann", "--role", "viewer"]), "fleetuser1-secret\n");
    assert_eq!(
        good(&server, &["user", "create", "--ttl=24h", "ann", "--role=admin", "--cert", "a/ann"]),
        "fleetuser1-secret\n"
    );
    let asked = taken(&changes);
    assert_eq!(asked[0], r#"POST users {"name":"ann","role":"viewer"}"#);
    let asked: Value = serde_json::from_str(asked[1].trim_start_matches("POST users ")).unwrap();
    assert!(asked["request"].as_str().unwrap().starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
    assert_eq!((&asked["role"], &asked["ttl"]), (&json!("admin"), &json!("24h")));
    let read = |name: &str| std::fs::read_to_string(server.directory().join("a/ann").join(name)).unwrap();
    assert_eq!((read("cert.pem").as_str(), read("ca.pem").as_str()), ("a certificate\n", "a CA\n"));
    let key = read("key.pem");
    assert!(key.starts_with("-----BEGIN PRIVATE KEY-----") && !asked.to_string().contains(&key[30..60]));
    // A key that is there is not replaced, and nobody is asked.
    let (out, err, code) = server.fleetctl(&["user", "create", "ann", "--role=admin", "--cert", "a/ann"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert_eq!(err, "Error creating user ann: write a/ann/key.pem: file exists\n");
    assert!(taken(&changes).is_empty());
    // Where no user was made no key is left.
    let (out, err, code) = server.fleetctl(&["user", "create", "bob", "--role=admin", "--cert", "bob"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert_eq!(err, "Error creating user bob: googleapi: Error 409: user bob exists already\n");
    assert!(!server.directory().join("bob/key.pem").exists());
    taken(&changes);
    for wrong in
        [&["ann"][..], &["ann", "--role", "king"], &["--role", "viewer"], &["a", "--role=viewer", "--ttl=0s"]]
    {
        let (out, _, code) = server.fleetctl(&[&["user", "create"], wrong].concat());
        assert_eq!((out.as_str(), code), ("", 2), "{wrong:?}");
    }
    let list = good(&server, &["user", "list"]);
    let cells: Vec<Vec<&str>> =
        list.lines().map(|line| line.split('\t').filter(|cell| !cell.is_empty()).collect()).collect();
    assert_eq!(cells[0], ["NAME", "ROLE", "CREATED", "EXPIRES", "CERTIFICATE"]);
    assert_eq!(cells[1][..3], ["ann", "viewer", "2026-11-20 18:40 UTC"]);
    assert_eq!(good(&server, &["user", "role", "ann", "operator"]), "User ann is operator now\n");
    assert_eq!(
        server.fleetctl(&["user", "role", "cid", "viewer"]),
        (String::new(), "User cid does not exist.\n".into(), 1)
    );
    assert_eq!(
        server.fleetctl(&["user", "remove", "cid", "ann"]),
        ("Removed user ann\n".into(), "User cid does not exist.\n".into(), 1)
    );
    assert_eq!(
        taken(&changes),
        [
            r#"PATCH users/ann {"role":"operator"}"#,
            r#"PATCH users/cid {"role":"viewer"}"#,
            "DELETE users/cid ",
            "DELETE users/ann "
        ]
        .map(str::to_owned)
    );
    assert_eq!(server.fleetctl(&["user", "remove"]), (String::new(), "No users given\n".into(), 2));
}

/// What a command line says that has no way to the server.
#[test]
fn https_needs_to_know_whom_to_trust() {
    let (server, _) = cluster();
    let says = |arguments: &[&str]| {
        let (out, err, code) =
            server.fleetctl(&[&["--endpoint=https://127.0.0.1:1", "list-machines"], arguments].concat());
        assert_eq!((out.as_str(), code), ("", 1), "{arguments:?}");
        err
    };
    assert_eq!(
        says(&[]),
        "Unable to initialize client: https needs to know whom to trust: a user token or the file of a CA \
         (--token-file, FLEETCTL_TOKEN, or --ca-file)\n"
    );
    std::fs::write(server.directory().join("no-token"), "fleet1-secretsecretsecret\n").unwrap();
    assert_eq!(
        says(&["--token-file=no-token"]),
        "Unable to initialize client: not a user token: those begin with \"fleetuser1-\" (fleetctl user create makes one)\n"
    );
    assert_eq!(
        says(&["--token-file=none"]),
        "Unable to initialize client: open none: no such file or directory\n"
    );
    assert_eq!(
        says(&["--cert-file=no-token"]),
        "Unable to initialize client: --cert-file and --key-file belong together\n"
    );
    assert!(says(&["--ca-file=no-token"]).contains("the file of the CA has no certificate that can be used"));
}

/// The first of several endpoints is dead, the second not.
#[test]
fn several_endpoints() {
    let (server, _) = cluster();
    let socket = format!("unix://{}", server.directory().join("fleet.sock").display());
    let endpoints = format!("--endpoint=http://127.0.0.1:1, {socket}");
    assert!(good(&server, &[&endpoints, "list-machines"]).contains("172.30.7.11"));
    let (out, err, code) =
        server.fleetctl(&["--endpoint=http://127.0.0.1:1,unix:///none.sock", "list-machines"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert!(err.contains("http://127.0.0.1:1: dial tcp 127.0.0.1:1: connect: connection refused; "), "{err}");
    assert!(err.contains("unix:///none.sock: dial unix /none.sock: connect: no such file"), "{err}");
    assert_eq!(server.fleetctl(&["--endpoint=http://127.0.0.1:1,", "list-machines"]).2, 1);
}

#[test]
fn machines_are_listed() {
    let (server, _) = cluster();
    assert_eq!(
        good(&server, &["machine", "list"]),
        "MACHINE\t\tIP\t\tMETADATA\t\tJOINED\t\t\tSTATE\n\
         4a1e0c2f...\t172.30.7.11\t-\t\t\t-\t\t\tup\n\
         4a1e77d0...\t172.30.7.12\tdisk=ssd,region=eu\t2026-11-21 22:26 UTC\tup\n\
         c93b5f08...\t-\t\t-\t\t\t2026-11-20 18:40 UTC\tgone\n"
    );
    assert!(good(&server, &["machine", "list", "-l", "--no-legend"]).starts_with(&format!("{FIRST}\t")));
    let machines: Value = serde_json::from_str(&good(&server, &["machine", "list", "-o", "json"])).unwrap();
    assert_eq!(
        machines[2],
        json!({"connected": false, "joined": 1_795_200_000, "machineID": THIRD, "state": "gone"})
    );
}

#[test]
fn machines_are_removed() {
    let (server, changes) = cluster();
    let (out, err, code) = server.fleetctl(&["machine", "remove", "c9", "4a1e", "x"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert_eq!(
        err,
        format!(
            "4a1e is the beginning of 2 machines: {FIRST}, {SECOND}\nMachine x does not exist.\nNo machine was removed.\n"
        )
    );
    assert!(taken(&changes).is_empty());
    let (out, err, code) = server.fleetctl(&["machine", "remove", "4a1e7", SECOND, "c9"]);
    assert_eq!(
        out,
        "Removed machine 4a1e77d0.../172.30.7.12: its credentials are revoked\n\
         Removed machine c93b5f08...: its credentials are revoked\n"
    );
    assert!(err.contains("units are placed elsewhere") && code == 0, "{err}");
    assert_eq!(taken(&changes), [SECOND, THIRD].map(|id| format!("DELETE machines/{id} ")));
    // Still there until its presence ends, but no member any more.
    let (out, err, code) = server.fleetctl(&["machine", "remove", "4a1e7"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert!(err.starts_with("Machine 4a1e77d0.../172.30.7.12 has no credentials to revoke"), "{err}");
    assert_eq!(server.fleetctl(&["machine", "remove"]).2, 2);
}

#[test]
fn machines_are_cordoned() {
    let (server, changes) = cluster();
    assert_eq!(
        good(&server, &["machine", "cordon", "4a1e7", FIRST]),
        "Machine 4a1e0c2f.../172.30.7.11 is cordoned: it takes no new units, what is there stays\n\
         Machine 4a1e77d0.../172.30.7.12 is cordoned: it takes no new units, what is there stays\n"
    );
    assert_eq!(taken(&changes), [FIRST, SECOND].map(|id| format!("PUT machines/{id}/cordon ")));
    assert_eq!(
        good(&server, &["machine", "uncordon", "4a1e7"]),
        "Machine 4a1e77d0.../172.30.7.12 takes new units\n"
    );
    assert_eq!(taken(&changes), [format!("DELETE machines/{SECOND}/cordon ")]);
    let said: Value =
        serde_json::from_str(&good(&server, &["-o=json", "machine", "cordon", "4a1e7"])).unwrap();
    assert_eq!(said, json!([{"machineID": SECOND, "cordoned": true}]));
    let (out, err, code) = server.fleetctl(&["machine", "cordon", "4a1e7", "4a"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert!(err.ends_with("No machine was cordoned.\n"), "{err}");
    let (_, err, code) = server.fleetctl(&["machine", "uncordon", "c9"]);
    assert_eq!((err.as_str(), code), ("Machine c93b5f08... is not in the cluster (any more).\n", 1));
    assert_eq!(server.fleetctl(&["machine", "cordon"]).2, 2);
}

#[test]
fn what_cannot_be_drained_is_listed() {
    let (server, changes) = cluster();
    assert_eq!(
        good(&server, &["machine", "drain", "4a1e0"]),
        "Machine 4a1e0c2f.../172.30.7.11 is drained: 0 units moved\n"
    );
    assert_eq!(taken(&changes), [format!("PUT machines/{FIRST}/drain ")]);
    let (out, err, code) = server.fleetctl(&["machine", "drain", "4a1e7", "--deadline=1m"]);
    assert_eq!((out.as_str(), code), ("", 1));
    assert_eq!(
        err,
        "Machine 4a1e77d0.../172.30.7.12 is not drained: 1 unit is left that can't go anywhere else:\n  \
         a.service: it is cordoned (4a1e0c2f.../172.30.7.11); its metadata has no disk (c93b5f08...)\n\
         It goes on being drained: no unit comes, and those that can go later will. \
         fleetctl machine uncordon 4a1e77d0 ends that.\n"
    );
    let (out, _, code) = server.fleetctl(&["machine", "drain", "4a1e7", "-o", "json"]);
    let said: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&said[0]["name"], &said[0]["moved"], code), (&json!("a.service"), &json!(false), 1));
    assert_eq!(said[0]["reasons"][0], json!({"machineID": FIRST, "reason": "it is cordoned"}));
    assert_eq!(
        good(&server, &["machine", "drain", "4a1e7", "--no-block"]),
        "Triggered drain of machine 4a1e77d0.../172.30.7.12\n"
    );
    assert_eq!(server.fleetctl(&["machine", "drain", "c9"]).2, 1);
    assert_eq!(server.fleetctl(&["machine", "drain"]).2, 2);
}

#[test]
fn metadata_is_edited() {
    let (server, changes) = cluster();
    assert_eq!(
        good(&server, &["machine", "metadata", "4a1e7", "disk=hdd", "region-"]),
        "Metadata of machine 4a1e77d0.../172.30.7.12: set disk=hdd, removed region\n"
    );
    assert_eq!(
        taken(&changes),
        [format!(
            r#"PATCH machines [{{"op":"add","path":"/{SECOND}/metadata/disk","value":{{"value":"hdd"}}}},{{"op":"remove","path":"/{SECOND}/metadata/region","value":null}}]"#
        )]
    );
    let said = good(&server, &["-o", "json", "machine", "metadata", "4a1e7", "disk=hdd", "region-"]);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said, json!([{"machineID": SECOND, "changes": {"disk": "hdd", "region": null}}]));
    taken(&changes);
    for (wrong, code) in [
        (&["4a1e7", "disk"][..], 2),
        (&["4a1e7", "disk="], 2),
        (&["4a1e7", "disk=ssd", "a/b-"], 2),
        (&["4a1e7"], 2),
        (&[], 2),
        (&["4a1e", "disk=ssd"], 1),
        (&["x", "disk=ssd"], 1),
    ] {
        let (out, err, got) = server.fleetctl(&[&["machine", "metadata"], wrong].concat());
        assert_eq!((out.as_str(), got), ("", code), "{wrong:?}: {err}");
    }
    assert!(taken(&changes).is_empty());
}

/// The original's server knows machines, but none of the rest.
#[test]
fn an_old_server_cannot() {
    let server = Server::new(|method, path, _| match (method, path) {
        ("GET", "machines") => (200, json!({"machines": [{"id": FIRST, "primaryIP": "172.30.7.11"}]})),
        _ => (404, json!({"error": {"code": 404, "message": ""}})),
    });
    assert_eq!(good(&server, &["machine", "list", "--no-legend"]), "4a1e0c2f...\t172.30.7.11\t-\t-\tup\n");
    for (arguments, text) in [
        (&["join-token", "create"][..], "Error creating join token: this server knows no join tokens; "),
        (&["join-token", "list"], "Error retrieving list of join tokens: this server knows no "),
        (&["join-token", "revoke", "a"], "Error revoking join token a: this server knows no join tokens; "),
        (&["user", "list"], "Error retrieving list of users: this server knows no users; "),
        (&["machine", "remove", "4"], "Error removing machine 4a1e0c2f.../172.30.7.11: this server cannot"),
    ] {
        let (out, err, code) = server.fleetctl(arguments);
        assert_eq!((out.as_str(), code), ("", 1));
        assert!(err.starts_with(text), "{err}");
    }
}

/// However many machines there are, a line stays a line.
#[test]
fn reasons_of_many_machines_are_told_shortly() {
    let server = Server::new(|_, path, _| match path.split('?').next().unwrap() {
        "machines" => (200, json!({})),
        "units" => (
            200,
            json!({"units": [{"name": "a.service", "desiredState": "launched", "currentState": "inactive"}]}),
        ),
        "units/a.service/explain" => {
            let reason = |n: usize| match n {
                0..500 => "its metadata has no disk".to_owned(),
                n => format!("it conflicts with u{n}.service"),
            };
            let unplaced: Vec<Value> =
                (0..1000).map(|n| json!({"machineID": format!("{n:032x}"), "reason": reason(n)})).collect();
            (200, json!({"name": "a.service", "unplaced": unplaced}))
        }
        other => panic!("{other}"),
    });
    let said = good(&server, &["list-unit-files", "--no-legend", "--fields=unit,reason"]);
    assert!(
        said.starts_with(
            "a.service\tits metadata has no disk (00000000... and 499 more); it conflicts with "
        ),
        "{said}"
    );
    assert!(said.ends_with("; 498 more machines for other reasons\n"), "{said}");
}

/// A machine that the server did not know at first may have come since.
#[test]
fn machines_may_come_meanwhile() {
    let mut asked = 0;
    let server = Server::new(move |_, path, _| match path.split('?').next().unwrap() {
        "machines" => {
            asked += 1;
            let second = json!({"id": SECOND, "primaryIP": "172.30.7.12"});
            let all = if asked == 1 { vec![] } else { vec![second] };
            (200, json!({"machines": all}))
        }
        "units/a.service" => (200, json!({"name": "a.service", "currentState": "launched"})),
        "units/a.service/explain" => {
            let problems =
                [FIRST, SECOND, FIRST].map(|id| json!({"machineID": id, "reason": format!("no {asked}")}));
            (200, json!({"name": "a.service", "problems": problems}))
        }
        "state" => (200, json!({})),
        other => panic!("{other}"),
    });
    let said = good(&server, &["explain", "a"]);
    assert!(said.contains("problem on 4a1e77d0.../172.30.7.12: "), "{said}");
    assert_eq!(said.matches("problem on 4a1e0c2f...: ").count(), 2, "{said}");
}

#[test]
fn the_status_of_a_global_unit_names_the_machines() {
    let server = Server::new(|_, path, _| match path {
        "machines" => (200, json!({"machines": [{"id": FIRST, "primaryIP": "172.30.7.11"}]})),
        "units/g.service" => {
            let options = [
                json!({"section": "Service", "name": "ExecStart", "value": "/bin/true"}),
                json!({"section": "X-Fleet", "name": "Global", "value": "true"}),
            ];
            (200, json!({"name": "g.service", "options": options}))
        }
        "state?unitName=g.service" => {
            let states = [FIRST, SECOND].map(|id| json!({"name": "g.service", "machineID": id}));
            (200, json!({"states": states}))
        }
        _ if path.starts_with("units/g.service/status?machine=") => (200, json!("status")),
        other => panic!("{other}"),
    });
    assert_eq!(
        good(&server, &["status", "g"]),
        "On 4a1e0c2f.../172.30.7.11:\n\"status\"\nOn 4a1e77d0...:\n\"status\""
    );
}
