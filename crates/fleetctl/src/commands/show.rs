//! Commands that only show something: cat, status, version, completion, man pages.
use crate::cli::Status;
use crate::context::{Context, is_global, misused, print, print_json, print_line, words};
use anyhow::Result;
use fleet_api::client::StateFilter;
use serde_json::json;
use std::path::Path;

/// What `fleetctl version` says.
pub(crate) fn version() -> String {
    format!("fleetctl version {}", env!("CARGO_PKG_VERSION"))
}

pub(crate) fn show_version(as_json: bool) -> Result<i32> {
    if as_json {
        print_json(&json!({"name": "fleetctl", "version": env!("CARGO_PKG_VERSION")}))?;
    } else {
        print(format!("{}\n", version()).as_bytes())?;
    }
    Ok(0)
}

/// `verify` does nothing since 1.0.
pub(crate) fn verify() -> i32 {
    eprintln!("Command \"verify\" is deprecated, DEPRECATED - No longer works");
    eprintln!("WARNING: The signed/verified units feature is DEPRECATED and cannot be used.");
    2
}

/// The file of a unit, byte for byte (golden/05-unit-text.txt).
pub(crate) async fn cat(context: &Context, arguments: &[String]) -> Result<i32> {
    let [argument] = arguments else {
        eprintln!("One unit file must be provided");
        return Ok(1);
    };
    let name = fleet_unit::name::from_argument(argument);
    let text = match context.client.unit(&name).await {
        Ok(None) => None,
        Ok(Some(_)) => match context.client.unit_file(&name).await {
            Ok(text) => text,
            Err(error) => return Ok(context.fail(&format!("Error retrieving Unit {name}: "), &error, "")),
        },
        Err(error) => return Ok(context.fail(&format!("Error retrieving Unit {name}: "), &error, "")),
    };
    let Some(text) = text else {
        eprintln!("Unit {name} not found");
        return Ok(1);
    };
    if context.json() {
        print_json(&json!({"name": name, "file": text}))?;
    } else {
        print(text.as_bytes())?;
    }
    Ok(0)
}

/// What systemctl status says of each unit on its machine, with its exit code
/// (golden/11-status-journal.txt). Global units are shown on every machine that has them.
pub(crate) async fn status(context: &Context, args: &Status) -> Result<i32> {
    if args.units.is_empty() {
        return misused("No units given");
    }
    let client = &context.client;
    let mut code = 0;
    let mut shown = 0;
    for argument in &args.units {
        let name = fleet_unit::name::from_argument(argument);
        let unit = match client.unit(&name).await {
            Ok(unit) => unit,
            Err(error) => return Ok(context.fail("Error retrieving unit: ", &error, "")),
        };
        let Some(unit) = unit else {
            eprintln!("Unit {name} does not exist.");
            return finish(context, 1);
        };
        let global = is_global(&unit);
        let machines = if global {
            let filter = StateFilter { unit: Some(name.clone()), machine: None };
            match client.states(&filter).await {
                Ok(states) => states.into_iter().map(|state| Some(state.machine_id)).collect(),
                Err(error) => {
                    return Ok(context.fail("Error retrieving machine state for global units: ", &error, ""));
                }
            }
        } else if unit.current_state == "inactive" {
            eprintln!("Unit {name} does not appear to be loaded.");
            return finish(context, 1);
        } else {
            vec![None]
        };
        for machine in machines {
            match client.status(&name, machine.as_deref()).await {
                Ok(status) if context.json() => context.remember(json!({
                    "name": name,
                    "machineID": status.machine_id.or(machine),
                    "exitCode": status.exit_code,
                    "status": String::from_utf8_lossy(&status.text),
                })),
                Ok(status) => {
                    if shown > 0 {
                        print(b"\n")?;
                    }
                    // systemctl does not say which machine it speaks of.
                    if let (true, Some(id)) = (global, status.machine_id.or(machine)) {
                        print_line(&format!("On {}:", context.legend(&id).await))?;
                    }
                    print(&status.text)?;
                    code = if code == 0 { status.exit_code } else { code };
                }
                Err(error) if error.is_unknown_resource() => {
                    eprintln!(
                        "This server cannot ask machines for their status: fleetctl ssh {name} systemctl status -l {name}"
                    );
                    return finish(context, 1);
                }
                Err(error) => {
                    code = context.fail(&format!("Error retrieving status of unit {name}: "), &error, "");
                }
            }
            shown += 1;
        }
    }
    finish(context, code)
}

fn finish(context: &Context, code: i32) -> Result<i32> {
    context.finish()?;
    Ok(code)
}

/// The script that completes commands in a shell.
pub(crate) fn completion(shell: clap_complete::Shell) -> Result<i32> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::cli::definition(), "fleetctl", &mut script);
    print(&script)?;
    Ok(0)
}

/// Writes fleetctl.1 and a page for every command.
pub(crate) fn man(directory: &Path) -> Result<i32> {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(crate::cli::definition(), directory)
    };
    if let Err(error) = write() {
        eprintln!("Cannot write man pages to {}: {}", directory.display(), words(&error));
        return Ok(1);
    }
    Ok(0)
}
