//! status: what systemctl status says of units on their machines, with its exit code (golden/11-status-journal.txt).
//! Global units are shown on every machine that has them, unless one is chosen. A server of fleet 1.0 does not ask machines:
//! then systemctl is run there over ssh, as fleetctl 1.0 did.
use crate::cli::Status;
use crate::context::{Context, is_global, misused, print, print_line};
use crate::copies::Selector;
use anyhow::Result;
use fleet_api::client::{self, Error};
use futures_util::{StreamExt, stream};
use serde_json::json;

/// How many machines are asked at the same time.
const AT_ONCE: usize = 16;

/// One status to show.
struct Wanted {
    unit: String,
    /// The machine to ask; none: the one the unit is on.
    machine: Option<String>,
    /// The machine that has it.
    place: String,
    /// It is one of several, so its machine has to be said: systemctl does not.
    named: bool,
}

pub(crate) async fn run(context: &Context, args: &Status) -> Result<i32> {
    if args.units.is_empty() {
        return misused("No units given");
    }
    let mut wanted = Vec::new();
    let mut missing = Ok(());
    for argument in &args.units {
        match find(context, argument, &args.machine).await {
            Ok(found) => wanted.extend(found),
            // As in the original: those before it are shown, then what is wrong with it is said.
            Err(refusal) => {
                missing = Err(refusal);
                break;
            }
        }
    }
    let mut code = show(context, &wanted, args.ssh_port).await?;
    if let Err(refusal) = missing {
        code = match refusal {
            Refusal::Misuse(text) => {
                eprintln!("{text}");
                crate::context::MISUSE
            }
            Refusal::Missing(text) => {
                eprintln!("{text}");
                1
            }
            Refusal::Failed(before, error) => context.fail(&before, &error, ""),
        };
    }
    context.finish()?;
    Ok(code)
}

/// Why there is nothing to show.
enum Refusal {
    Misuse(String),
    Missing(String),
    Failed(String, Error),
}

async fn find(context: &Context, argument: &str, flag: &str) -> Result<Vec<Wanted>, Refusal> {
    let selector = Selector::with_flag(argument, flag).map_err(Refusal::Misuse)?;
    let name = &selector.unit;
    let unit = context.client.unit(name).await;
    let unit = unit.map_err(|error| Refusal::Failed("Error retrieving unit: ".to_owned(), error))?;
    let Some(unit) = unit else { return Err(Refusal::Missing(format!("Unit {name} does not exist."))) };
    let global = is_global(&unit);
    if !global && unit.current_state == "inactive" {
        return Err(Refusal::Missing(format!("Unit {name} does not appear to be loaded.")));
    }
    if !global && selector.machine.is_none() {
        return Ok(vec![Wanted { unit: unit.name, machine: None, place: unit.machine_id, named: false }]);
    }
    let copies = selector.reported(context).await;
    let copies = copies.map_err(|error| {
        Refusal::Failed("Error retrieving machine state for global units: ".to_owned(), error)
    })?;
    let named = selector.machine.is_none();
    let wanted = |copy: crate::copies::Copy| Wanted {
        unit: copy.unit,
        machine: Some(copy.machine.clone()),
        place: copy.machine,
        named,
    };
    Ok(copies.map_err(Refusal::Missing)?.into_iter().map(wanted).collect())
}

/// Shows them in order, and gives the exit code: that of the first that is not active; 1 if one could not be asked.
async fn show(context: &Context, wanted: &[Wanted], ssh_port: Option<u16>) -> Result<i32> {
    let ask = |it: &Wanted| {
        let (client, unit, machine) = (context.client.clone(), it.unit.clone(), it.machine.clone());
        async move { client.status(&unit, machine.as_deref()).await }
    };
    let mut answers = stream::iter(wanted.iter().map(ask)).buffered(AT_ONCE);
    let (mut code, mut shown) = (0, 0);
    for it in wanted {
        let Some(answer) = answers.next().await else { break };
        match answer {
            Ok(status) => {
                code = if code == 0 { status.exit_code } else { code };
                if context.json() {
                    remember(context, it, &status);
                    continue;
                }
                if shown > 0 {
                    print(b"\n")?;
                }
                if let (true, Some(id)) = (it.named, status.machine_id.as_ref().or(it.machine.as_ref())) {
                    print_line(&format!("On {}:", context.legend(id).await))?;
                }
                print(&status.text)?;
                shown += 1;
            }
            Err(error) if error.is_unknown_resource() => {
                if shown > 0 {
                    print(b"\n")?;
                }
                if it.named {
                    print_line(&format!("On {}:", context.legend(&it.place).await))?;
                }
                let words = ["systemctl", "status", "-l", "--", &it.unit];
                let exit = crate::ssh::run_on(context, &it.place, ssh_port, &words).await?;
                code = if code == 0 { exit } else { code };
                shown += 1;
            }
            Err(error) => {
                let mut before = format!("Error retrieving status of unit {}", it.unit);
                if let Some(id) = &it.machine {
                    before.push_str(&format!(" on machine {}", context.legend(id).await));
                }
                code = context.fail(&format!("{before}: "), &error, "");
            }
        }
    }
    Ok(code)
}

fn remember(context: &Context, it: &Wanted, status: &client::Status) {
    context.remember(json!({
        "name": it.unit,
        "machineID": status.machine_id.as_ref().or(it.machine.as_ref()),
        "exitCode": status.exit_code,
        "status": String::from_utf8_lossy(&status.text),
    }));
}
