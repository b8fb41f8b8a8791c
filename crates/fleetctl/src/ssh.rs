//! ssh, through the user's own OpenSSH with its configuration and agent: logging in to machines
//! (golden/12-ssh.txt), running there what a server of fleet 1.0 can't answer, and the tunnel that `--tunnel` asks for.
mod options;
mod tunnel;

pub(crate) use tunnel::{AT_ONCE, Tunnel};

use crate::cli::Ssh;
use crate::context::{Context, is_global, words};
use crate::copies::Selector;
use anyhow::{Context as _, Result};
use fleet_api::client::Error;
use options::{configured, host_and_port, options, port_options, proxy_command, quoted, user};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

/// ssh's own exit code for its own failures.
const SSH_FAILED: i32 = 255;

/// Where a search led.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// At this address; empty when it is not known.
    At(String),
    /// Nowhere: why.
    Nowhere(String),
    /// The server could not be asked.
    Unasked(Error),
}

pub(crate) async fn run(context: &Context, args: Ssh) -> Result<i32> {
    if !args.unit.is_empty() && !args.machine.is_empty() {
        eprintln!("Both machine and unit flags provided, please specify only one.");
        return Ok(1);
    }
    let mut words = args.words.as_slice();
    let place = if !args.machine.is_empty() {
        by_machine(context, &args.machine).await
    } else if !args.unit.is_empty() {
        by_unit(context, &args.unit).await
    } else if let [target, rest @ ..] = words {
        words = rest;
        by_either(context, target).await
    } else {
        Place::Nowhere("one machine or unit must be provided".to_owned())
    };
    let address = match place {
        Place::At(address) if address.is_empty() => {
            eprintln!("Could not determine address of machine.");
            return Ok(1);
        }
        Place::At(address) => address,
        Place::Nowhere(why) => {
            eprintln!("Unable to proceed: {why}");
            return Ok(1);
        }
        Place::Unasked(error) => return Ok(context.fail("Unable to proceed: ", &error, "")),
    };
    if let [first, rest @ ..] = words
        && first == "--"
    {
        words = rest;
    }
    login(context, &Login { port: args.ssh_port, forward_agent: args.forward_agent }, &address, words).await
}

/// How to log in.
struct Login {
    port: Option<u16>,
    forward_agent: bool,
}

/// Runs a command on a machine, as fleetctl 1.0 did for status and journal: here if it is this one, else over ssh. The
/// command's exit code.
pub(crate) async fn run_on(
    context: &Context,
    machine: &str,
    port: Option<u16>,
    words: &[&str],
) -> Result<i32> {
    let here = std::fs::read_to_string("/etc/machine-id");
    if here.is_ok_and(|id| id.trim_end() == machine) {
        let (program, arguments) = words.split_first().context("a command")?;
        let _interrupts = signal(SignalKind::interrupt())?;
        let status = Command::new(program).args(arguments).status().await;
        return Ok(exit_code(status.with_context(|| format!("{program} cannot be started"))?));
    }
    let address = match by_machine(context, machine).await {
        Place::At(address) if !address.is_empty() => address,
        Place::Unasked(error) => return Ok(context.fail("Error getting machine IP: ", &error, "")),
        _ => {
            eprintln!("Error getting machine IP: {}", context.legend(machine).await);
            return Ok(1);
        }
    };
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    login(context, &Login { port, forward_agent: false }, &address, &words).await
}

/// Runs ssh in the foreground and passes its exit code on.
async fn login(context: &Context, how: &Login, address: &str, words: &[String]) -> Result<i32> {
    let globals = &context.globals;
    let port = how.port.map(|port| port.to_string());
    let there = configured(globals, address, port.as_deref()).await;
    let mut ssh = Command::new("ssh");
    ssh.args(options(globals, &there)).args(port_options(port.as_deref()));
    if how.forward_agent {
        ssh.arg("-A");
    }
    if !globals.tunnel.is_empty() {
        let (host, port) = host_and_port(&globals.tunnel);
        let proxy = proxy_command(globals, &configured(globals, host, port).await);
        ssh.arg("-o").arg(format!("ProxyCommand={proxy}"));
    }
    ssh.arg("--").arg(address).args(words);
    // Ctrl-C is for what runs on the machine; ssh deals with it.
    let _interrupts = signal(SignalKind::interrupt())?;
    let status = match ssh.status().await {
        Ok(status) => status,
        Err(error) => {
            eprintln!("Failed building SSH client: {}", not_started(&error));
            return Ok(1);
        }
    };
    let code = exit_code(status);
    if code == SSH_FAILED {
        let user = user(globals, &there);
        eprintln!(
            "ssh ended with 255: it could not log in as {user}@{address} (--ssh-username, --ssh-port), or what ran \
             there ended so."
        );
    }
    Ok(code)
}

async fn by_machine(context: &Context, prefix: &str) -> Place {
    let machines = match context.client.machines().await {
        Ok(machines) => machines,
        Err(error) => return Place::Unasked(error),
    };
    let mut fitting = machines.iter().filter(|machine| machine.id.starts_with(prefix));
    match (fitting.next(), fitting.next()) {
        (Some(machine), None) => Place::At(machine.primary_ip.clone()),
        (None, _) => Place::Nowhere("machine does not exist".to_owned()),
        (Some(_), Some(_)) => Place::Nowhere("found more than one machine".to_owned()),
    }
}

async fn by_unit(context: &Context, argument: &str) -> Place {
    let selector = Selector::parse(argument);
    let unit = match context.client.unit(&selector.unit).await {
        Ok(Some(unit)) => unit,
        Ok(None) => return Place::Nowhere("unit does not exist".to_owned()),
        Err(error) => return Place::Unasked(error),
    };
    let id = if selector.machine.is_some() {
        match selector.reported(context).await {
            Ok(Ok(copies)) => copies.into_iter().next().map(|copy| copy.machine).unwrap_or_default(),
            Ok(Err(text)) => return Place::Nowhere(text),
            Err(error) => return Place::Unasked(error),
        }
    } else if is_global(&unit) {
        return Place::Nowhere("global units unsupported".to_owned());
    } else {
        unit.machine_id
    };
    let machines = context.machines().await;
    Place::At(machines.get(&id).map(|machine| machine.primary_ip.clone()).unwrap_or_default())
}

async fn by_either(context: &Context, lookup: &str) -> Place {
    if lookup.is_empty() {
        return Place::Nowhere("could not find matching unit or machine".to_owned());
    }
    choose(lookup, by_machine(context, lookup).await, by_unit(context, lookup).await)
}

/// What a word means that may be the beginning of a machine's ID or the name of a unit.
fn choose(lookup: &str, machine: Place, unit: Place) -> Place {
    let known = |place: &Place| matches!(place, Place::At(address) if !address.is_empty());
    match (known(&machine), known(&unit)) {
        (true, true) => Place::Nowhere(format!(
            "ambiguous argument, both machine and unit found for `{lookup}`.\n\
             Please use flag `-m` or `-u` to refine the search"
        )),
        (true, false) => machine,
        (false, true) => unit,
        (false, false) => {
            if let Place::Unasked(error) = machine {
                eprintln!("{error}");
            }
            Place::Nowhere("could not find matching unit or machine".to_owned())
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn not_started(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "ssh is not installed here (package openssh-client)".to_owned(),
        _ => format!("ssh cannot be started: {}", words(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str) -> Place {
        Place::At(address.to_owned())
    }

    fn nowhere() -> Place {
        Place::Nowhere("does not exist".to_owned())
    }

    /// golden/12-ssh.txt
    #[test]
    fn machine_or_unit() {
        assert_eq!(choose("c93", at("1"), nowhere()), at("1"));
        assert_eq!(choose("c93", nowhere(), at("2")), at("2"));
        let unclear = "could not find matching unit or machine";
        assert_eq!(choose("c93", nowhere(), nowhere()), Place::Nowhere(unclear.to_owned()));
        // A unit that is on no machine.
        assert_eq!(choose("c93", nowhere(), at("")), Place::Nowhere(unclear.to_owned()));
        let Place::Nowhere(text) = choose("c93", at("1"), at("2")) else { panic!("ambiguous") };
        assert!(text.starts_with("ambiguous argument, both machine and unit found for `c93`.\nPlease use"));
    }

    #[test]
    fn a_signal_is_an_exit_code() {
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
        assert_eq!(exit_code(ExitStatus::from_raw(42 << 8)), 42);
    }
}
