//! journal: the last lines that units have logged, and those to come (golden/11-status-journal.txt). A server of fleet 1.0 has no
//! journals: then journalctl is run on the machine over ssh, as fleetctl 1.0 did.
use crate::cli::{Format, Journal};
use crate::context::{Context, INTERRUPTED, is_global, print};
use crate::copies::{Copy, Selector};
use crate::logs::{self, look::Form};
use anyhow::Result;
use fleet_api::client::{Error, JournalQuery};
use tokio::signal::unix::{SignalKind, signal};

pub(crate) async fn run(context: &Context, args: &Journal) -> Result<i32> {
    if args.units.is_empty() {
        eprintln!("One unit file must be provided.");
        return Ok(1);
    }
    let (mut copies, mut code) = (Vec::new(), 0);
    for argument in &args.units {
        match find(context, argument, &args.machine).await {
            Ok(found) => copies.extend(found),
            Err(failed) => code = failed,
        }
    }
    let mut seen = Vec::new();
    copies.retain(|copy| {
        !seen.contains(copy) && {
            seen.push(copy.clone());
            true
        }
    });
    let json = context.globals.format == Format::Json && args.output == "short";
    let output = if json { "json".to_owned() } else { args.output.clone() };
    let mut query = JournalQuery { lines: args.lines, follow: args.follow, output, machine: None };
    match copies.as_slice() {
        [] => Ok(code),
        [copy] if args.units.len() == 1 => {
            query.machine = Some(copy.machine.clone());
            one(context, copy, &query, args).await
        }
        copies => {
            let several = several(context, copies, query).await?;
            Ok(if code == 0 { several } else { code })
        }
    }
}

/// The copies of a unit that are meant; where there are none, says why and gives the exit code.
async fn find(context: &Context, argument: &str, flag: &str) -> Result<Vec<Copy>, i32> {
    let refuse = |text: String| {
        eprintln!("{text}");
        Err(1)
    };
    let selector = match Selector::with_flag(argument, flag) {
        Ok(selector) => selector,
        Err(text) => {
            eprintln!("{text}");
            return Err(crate::context::MISUSE);
        }
    };
    let name = &selector.unit;
    let unit = match context.client.unit(name).await {
        Ok(Some(unit)) => unit,
        Ok(None) => return refuse(format!("Unit {name} does not exist.")),
        Err(error) => return Err(context.fail(&format!("Error retrieving unit {name}: "), &error, "")),
    };
    let global = is_global(&unit);
    if !global && unit.current_state == "inactive" {
        return refuse(format!("Unit {name} does not appear to be running."));
    }
    if !global && selector.machine.is_none() {
        return Ok(vec![Copy { unit: unit.name, machine: unit.machine_id }]);
    }
    match selector.reported(context).await {
        Ok(Ok(copies)) if copies.is_empty() => refuse(format!("Unit {name} is on no machine.")),
        Ok(Ok(copies)) => Ok(copies),
        Ok(Err(text)) => refuse(text),
        Err(error) => Err(context.fail(&format!("Error retrieving the states of unit {name}: "), &error, "")),
    }
}

/// The journal of several copies as one.
async fn several(context: &Context, copies: &[Copy], mut query: JournalQuery) -> Result<i32> {
    let form = match Form::parse(&query.output) {
        Ok(form) => form,
        Err(text) => {
            eprintln!("{text}");
            return Ok(1);
        }
    };
    if query.lines < 0 {
        eprintln!("lines must be a number of lines");
        return Ok(1);
    }
    if copies.len() > logs::MOST {
        eprintln!(
            "The journals of {} copies are too many; {} can be shown at a time.",
            copies.len(),
            logs::MOST
        );
        return Ok(1);
    }
    query.output = form.wire().output().to_owned();
    logs::show(context, copies, form, &query).await
}

/// The journal of one copy, as journalctl prints it on its machine.
async fn one(context: &Context, copy: &Copy, query: &JournalQuery, args: &Journal) -> Result<i32> {
    let name = &copy.unit;
    let on = || async { format!("unit {name} on machine {}: ", context.legend(&copy.machine).await) };
    let mut journal = match context.client.journal(name, query).await {
        Ok(journal) => journal,
        // What journalctl complained of is passed on, as if it had run here.
        Err(Error::Refused { code: 400, message, exit_code }) => {
            eprintln!("{}", message.trim_end());
            return Ok(exit_code.unwrap_or(1));
        }
        Err(error) if error.is_unknown_resource() => {
            let lines = query.lines.to_string();
            let mut words =
                vec!["journalctl", "--unit", name, "--no-pager", "-n", &lines, "--output", &query.output];
            if args.sudo {
                words.insert(0, "sudo");
            }
            if query.follow {
                words.push("-f");
            }
            return crate::ssh::run_on(context, &copy.machine, args.ssh_port, &words).await;
        }
        Err(error) => {
            return Ok(context.fail(&format!("Error retrieving journal of {}", on().await), &error, ""));
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
                    return Ok(context.fail(&format!("The journal broke off of {}", on().await), &error, ""));
                }
            },
        }
    }
}
