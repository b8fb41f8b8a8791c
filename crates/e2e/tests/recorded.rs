//! The requests of fleetctl 1.0, recorded (with the server of 1.0) command by command in `golden/requests.json`, are sent to our fleetd
//! over the unix socket and over TCP, and are answered the same.
//!
//! A client of 1.0 that waits asks again and again. Of such requests the last one is recorded, with the answer that it waited for:
//! it is repeated here, too.

use anyhow::{Context, Result, ensure};
use fleet_e2e::{Fleet, until};
use serde_json::Value;

const REQUESTS: &str = include_str!("../golden/requests.json");
/// As its client library says who it is.
const AGENT: &str = "google-api-go-client/0.5";

/// Sends a request as fleetctl 1.0 did; the status and the body of the answer.
fn send(fleet: &Fleet, base: &str, request: &Value) -> Result<(u64, Value)> {
    let word = |key: &str| request[key].as_str().with_context(|| format!("{key} of {request}"));
    let mut line = vec!["curl", "-sS", "-A", AGENT, "-w", "\n%{http_code}", "-X", word("method")?];
    line.extend(base.split(' '));
    let url = format!("{}{}", line.pop().context("a URL")?, word("path")?);
    line.push(&url);
    let body = match &request["body"] {
        Value::Null => String::new(),
        body => {
            line.extend(["-H", "Content-Type: application/json", "--data-binary", "@-"]);
            body.to_string()
        }
    };
    let output = fleet.host().command(line).stdin(body).run()?.ok()?.stdout;
    let (text, status) = output.rsplit_once('\n').context("a status")?;
    let text = text.replace(fleet.host().machine_id(), "<MACHINE>").replace(fleet.host().ip(), "<ADDRESS>");
    let answer =
        if text.trim().is_empty() { Value::Null } else { serde_json::from_str(&text).context(text)? };
    Ok((status.parse()?, answer))
}

fn replay(fleet: &Fleet, base: &str) -> Result<()> {
    let commands: Value = serde_json::from_str(REQUESTS)?;
    for command in commands.as_array().context("a list of commands")? {
        let name = command["command"].as_str().context("a command")?;
        for request in command["requests"].as_array().context("a list of requests")? {
            let expected = (request["status"].as_u64().context("a status")?, request["answer"].clone());
            let mut got = Default::default();
            if request["method"] == "GET" {
                until("the answer that fleetctl 1.0 waits for", || {
                    got = send(fleet, base, request)?;
                    Ok(got == expected)
                })
            } else {
                got = send(fleet, base, request)?;
                Ok(())
            }
            .with_context(|| format!("{name}: {request}\nwas answered: {got:?}"))?;
            ensure!(got == expected, "{name}: {request}\nwas answered: {got:?}");
        }
    }
    Ok(())
}

#[test]
fn requests_of_the_originals_fleetctl_are_answered_as_ever() -> Result<()> {
    let fleet = Fleet::up("requests")?;
    // As its documentation puts the API on TCP.
    fleet.host().write(
        "/etc/systemd/system/fleet.socket.d/30-ListenStream.conf",
        "[Socket]\nListenStream=127.0.0.1:49153\n",
    )?;
    let restart = "systemctl daemon-reload; systemctl stop fleet.service; systemctl restart fleet.socket; systemctl start fleet.service";
    fleet.host().sh(restart)?.ok()?;
    for base in ["--unix-socket /var/run/fleet.sock http://domain-sock", "http://127.0.0.1:49153"] {
        replay(&fleet, base).context(base)?;
    }
    Ok(())
}
