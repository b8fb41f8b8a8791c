//! journal: the last lines a unit has logged, and those to come (golden/11-status-journal.txt).
use crate::cli::Journal;
use crate::context::{Context, is_global, print};
use anyhow::Result;
use fleet_api::client::{Error, JournalQuery};
use tokio::signal::unix::{SignalKind, signal};

/// The exit code after Ctrl-C, as shells have it.
const INTERRUPTED: i32 = 130;

pub(crate) async fn run(context: &Context, args: &Journal) -> Result<i32> {
    let [argument] = args.unit.as_slice() else {
        eprintln!("One unit file must be provided.");
        return Ok(1);
    };
    let name = fleet_unit::name::from_argument(argument);
    let unit = match context.client.unit(&name).await {
        Ok(unit) => unit,
        Err(error) => return Ok(context.fail(&format!("Error retrieving unit {name}: "), &error, "")),
    };
    let refusal = match &unit {
        None => Some(format!("Unit {name} does not exist.")),
        Some(unit) if is_global(unit) => Some(format!("Unable to retrieve journal of global unit {name}.")),
        Some(unit) if unit.current_state == "inactive" => {
            Some(format!("Unit {name} does not appear to be running."))
        }
        Some(_) => None,
    };
    if let Some(text) = refusal {
        eprintln!("{text}");
        return Ok(1);
    }
    let query = JournalQuery { lines: args.lines, follow: args.follow, output: args.output.clone() };
    let mut journal = match context.client.journal(&name, &query).await {
        Ok(journal) => journal,
        // What journalctl complained of is passed on, as if it had run here.
        Err(Error::Refused { code: 400, message, exit_code }) => {
            eprintln!("{}", message.trim_end());
            return Ok(exit_code.unwrap_or(1));
        }
        Err(error) if error.is_unknown_resource() => {
            eprintln!("This server cannot read journals: fleetctl ssh {name} journalctl --unit {name}");
            return Ok(1);
        }
        Err(error) => {
            return Ok(context.fail(&format!("Error retrieving journal of unit {name}: "), &error, ""));
        }
    };
    let mut interrupts = signal(SignalKind::interrupt())?;
    loop {
        tokio::select! {
            _ = interrupts.recv() => return Ok(INTERRUPTED),
            piece = journal.next() => match piece {
                Ok(Some(piece)) => print(&piece)?,
                Ok(None) => return Ok(journal.exit_code().unwrap_or(0)),
                Err(error) => {
                    return Ok(context.fail(&format!("The journal of unit {name} broke off: "), &error, ""));
                }
            },
        }
    }
}
