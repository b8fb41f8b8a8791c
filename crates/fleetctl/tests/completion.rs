//! What a shell is told when somebody presses the tab key.
#![allow(clippy::unwrap_used)]
mod server;

use serde_json::{Value, json};
use server::Server;
use std::process::Command;

/// The candidates for the last word of a line.
fn complete(server: &Server, line: &[&str]) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_fleetctl"))
        .env("FLEETCTL_COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", (line.len()).to_string())
        .env("_CLAP_IFS", "\n")
        .env("FLEETCTL_ENDPOINT", format!("unix://{}", server.directory().join("fleet.sock").display()))
        .args(["--", "fleetctl"])
        .args(line)
        .current_dir(server.directory())
        .output()
        .unwrap();
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn commands_units_machines_and_files() {
    let server = Server::new(|_, path, _| match path.split('?').next() {
        Some("units") => {
            let unit =
                |name: &str| json!({"name": name, "currentState": "inactive", "desiredState": "inactive"});
            (200, json!({"units": [unit("hello.service"), unit("help@1.service"), unit("other.service")]}))
        }
        Some("machines") => (
            200,
            json!({"machines": [{"id": "4a1e0c2fb7d94e6c8f3a51d2c07e9b11", "primaryIP": "172.30.7.11"}]}),
        ),
        _ => (404, Value::Null),
    });
    std::fs::write(server.directory().join("held.service"), "").unwrap();
    assert_eq!(complete(&server, &["list-un"]), ["list-unit-files", "list-units"]);
    assert_eq!(complete(&server, &["stop", "--no-bl"]), ["--no-block"]);
    assert_eq!(complete(&server, &["stop", "hel"]), ["hello.service", "help@1.service"]);
    assert_eq!(complete(&server, &["start", "hel"]), ["hello.service", "help@1.service", "held.service"]);
    assert_eq!(complete(&server, &["status", "o"]), ["other.service"]);
    assert_eq!(complete(&server, &["machine", "drain", "4a"]), ["4a1e0c2fb7d94e6c8f3a51d2c07e9b11"]);
    assert_eq!(complete(&server, &["machine", "drain", "5"]), [""; 0]);
}

#[test]
fn nobody_waits_for_a_cluster_that_is_away() {
    let server = Server::new(|_, _, _| (503, json!({"error": {"code": 503, "message": "away"}})));
    assert_eq!(complete(&server, &["stop", "hel"]), [""; 0]);
    std::fs::remove_file(server.directory().join("fleet.sock")).unwrap();
    assert_eq!(complete(&server, &["stop", "hel"]), [""; 0]);
}

#[test]
fn every_shell_has_a_script() {
    let server = Server::new(|_, _, _| (404, Value::Null));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (script, _, _) = server.fleetctl(&["completion", shell]);
        assert!(script.contains("FLEETCTL_COMPLETE") && script.contains("fleetctl"), "{shell}: {script}");
    }
}
