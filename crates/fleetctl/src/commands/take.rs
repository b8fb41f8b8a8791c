//! stop, unload, destroy, restart (golden/06-load.txt, 09-stop-restart.txt, 10-destroy.txt).
use super::bring::{self, Bring};
use super::report;
use crate::cli::{Patience, Take};
use crate::context::{Context, is_global, misused, names};
use crate::source::Verb;
use crate::wait::tracker::Goal;
use crate::wait::{self, Limits};
use anyhow::Result;
use fleet_api::client::Error;
use fleet_api::types::{Unit, UnitChange};

/// Looks for the units that are named. `Err` is an exit code.
async fn known(context: &Context, arguments: &[String]) -> Result<Vec<Unit>, i32> {
    if arguments.is_empty() {
        return Err(misused("No units given").unwrap_or(1));
    }
    let units = context.client.find_units(&names(arguments)).await;
    units.map_err(|error| context.fail("", &error, ""))
}

async fn desire(context: &Context, unit: &Unit, state: &str) -> Result<bool, Error> {
    let (name, desired_state) = (unit.name.clone(), state.to_owned());
    context.client.put_unit(&Unit { name, desired_state, ..Unit::default() }).await
}

/// The names as Go prints a slice of them.
fn bracketed(units: &[String]) -> String {
    format!("[{}]", units.join(" "))
}

fn fresh_none(units: &[String]) -> Vec<(String, bool)> {
    units.iter().map(|name| (name.clone(), false)).collect()
}

/// What stop and unload differ in.
struct Way {
    word: &'static str,
    done: &'static str,
    doing: &'static str,
    desired: &'static str,
    goal: Goal,
}

const STOP: Way =
    Way { word: "stop", done: "stopped", doing: "stopping", desired: "loaded", goal: Goal::Stopped };
const UNLOAD: Way =
    Way { word: "unload", done: "unloaded", doing: "unloading", desired: "inactive", goal: Goal::Unloaded };

pub(crate) async fn stop(context: &Context, take: Take) -> Result<i32> {
    lower(context, take, &STOP).await
}

pub(crate) async fn unload(context: &Context, take: Take) -> Result<i32> {
    lower(context, take, &UNLOAD).await
}

async fn lower(context: &Context, take: Take, way: &Way) -> Result<i32> {
    let units = match known(context, &take.units).await {
        Ok(units) => units,
        Err(code) => return Ok(code),
    };
    if units.is_empty() {
        eprintln!("Units not found in registry");
        return Ok(0);
    }
    let mut to_lower = Vec::new();
    let mut refusal = None;
    for unit in &units {
        let global = is_global(unit);
        let inactive = unit.current_state == "inactive";
        if way.goal == Goal::Stopped && inactive && !global {
            refusal = Some(format!("Unable to stop unit {} in state inactive", unit.name));
            break;
        }
        // What is there already. A unit that is about to be started again is not.
        let settled = match way.goal {
            Goal::Stopped => unit.current_state == "loaded" && unit.desired_state != "launched",
            _ => inactive && unit.desired_state == "inactive",
        };
        if !settled || global {
            to_lower.push((unit, global));
        }
    }
    let mut lowered = Vec::new();
    let changes: Vec<UnitChange> = to_lower
        .iter()
        .map(|(unit, _)| UnitChange {
            name: unit.name.clone(),
            desired_state: way.desired.to_owned(),
            ..UnitChange::default()
        })
        .collect();
    let sent = context.client.change_units(&changes).await;
    for ((unit, global), sent) in to_lower.iter().zip(sent) {
        if let Err(error) = sent {
            let before =
                format!("Error {} units: failed setting the state of unit {}: ", way.doing, unit.name);
            return Ok(context.fail(&before, &error, ""));
        }
        if *global {
            context.say_triggered(&unit.name, true, way.word)?;
        } else {
            lowered.push(unit.name.clone());
        }
    }
    if let Some(text) = refusal {
        eprintln!("{text}");
        return Ok(1);
    }
    if take.no_block {
        for name in &lowered {
            context.say_triggered(name, false, way.word)?;
        }
    } else {
        let limits = Limits::of(take.patience);
        let outcome = wait::wait(context, way.goal, fresh_none(&lowered), limits, true).await?;
        if !outcome.is_good() {
            let timed_out =
                |text: &str| format!("Failed to {} units {}. err: {text}", way.word, bracketed(&lowered));
            return Ok(report::trouble(context, way.goal, &outcome, timed_out, way.word, &lowered).await);
        }
    }
    eprintln!("Successfully {} units {}.", way.done, bracketed(&lowered));
    context.finish()?;
    Ok(0)
}

pub(crate) async fn destroy(context: &Context, take: Take) -> Result<i32> {
    let units = match known(context, &take.units).await {
        Ok(units) => units,
        Err(code) => return Ok(code),
    };
    let mut code = 0;
    let mut destroyed = Vec::new();
    // Also those that are not shown: a record that the server can't read, or has not seen yet, is there to be destroyed. A fleetd 1.0
    // has no such, and says of all that they are destroyed.
    let mut names = names(&take.units);
    let shown = |name: &String| units.iter().any(|unit| unit.name == *name);
    if !names.iter().all(shown) && context.client.notices().await.is_err() {
        names.retain(shown);
    }
    let changes: Vec<UnitChange> = names
        .iter()
        .map(|name| UnitChange { name: name.clone(), destroy: true, ..UnitChange::default() })
        .collect();
    let sent = context.client.change_units(&changes).await;
    for (name, sent) in names.iter().zip(sent) {
        match sent {
            Ok(true) => destroyed.push(name.clone()),
            // It was not there, or someone else was faster.
            Ok(false) => {}
            // No unit can have that name.
            Err(error) if error.code() == Some(400) && !shown(name) => {}
            Err(error) => code = context.fail("Error destroying units: ", &error, ""),
        }
    }
    if units.is_empty() && destroyed.is_empty() && code == 0 {
        eprintln!("Units not found in registry");
        return Ok(0);
    }
    let mut missing: Vec<&String> = Vec::new();
    if !take.no_block {
        let limits = Limits::of(take.patience);
        let outcome = wait::wait(context, Goal::Gone, fresh_none(&destroyed), limits, false).await?;
        if !outcome.is_good() {
            let timed_out = |text: &str| format!("Error destroying units: {text}");
            code = report::trouble(context, Goal::Gone, &outcome, timed_out, "destroy", &destroyed).await;
            let unfinished = outcome.interrupted || outcome.lost.is_some();
            missing = destroyed
                .iter()
                .filter(|name| unfinished || outcome.late.iter().any(|(late, _)| late == *name))
                .collect();
        }
    }
    for name in destroyed.iter().filter(|name| !missing.contains(name)) {
        if context.json() {
            context.remember(serde_json::json!({"name": name, "destroyed": true}));
        } else {
            context.say(&format!("Destroyed {name}"))?;
        }
    }
    context.finish()?;
    Ok(code)
}

/// Stops each unit and starts it again, one after the other; units that are unknown are submitted
/// if there is a file, as in the original.
pub(crate) async fn restart(context: &Context, patience: Patience, arguments: Vec<String>) -> Result<i32> {
    let units = match known(context, &arguments).await {
        Ok(units) => units,
        Err(code) => return Ok(code),
    };
    let unknown: Vec<String> = arguments
        .iter()
        .filter(|argument| {
            let name = fleet_unit::name::from_argument(argument);
            !units.iter().any(|unit| unit.name == name)
        })
        .cloned()
        .collect();
    if !unknown.is_empty() {
        let submit = Bring { verb: Verb::Submit, replace: false, no_block: false, patience, units: unknown };
        let code = bring::run(context, submit).await?;
        if code != 0 {
            return Ok(code);
        }
    }
    let mut code = 0;
    for unit in &units {
        let name = &unit.name;
        if is_global(unit) {
            let one = restart_one(context, unit, patience, true).await?;
            if one != 0 {
                return Ok(one);
            }
            context.say_triggered(name, true, "restart")?;
            continue;
        }
        match unit.current_state.as_str() {
            "inactive" => {
                eprintln!("Unable to restart unit {name} in state inactive");
                code = 1;
                continue;
            }
            "loaded" if unit.desired_state != "launched" => {
                eprintln!("Unit({name}) already loaded, starting.");
                let one = step(context, unit, "launched", Goal::Launched, patience, true).await?;
                if one != 0 {
                    return Ok(one);
                }
            }
            _ => {
                let one = restart_one(context, unit, patience, false).await?;
                if one != 0 {
                    return Ok(one);
                }
                eprintln!("Unit({name}) was restarted.");
            }
        }
    }
    context.finish()?;
    Ok(code)
}

/// Stops a unit and starts it. A Global unit is stopped everywhere before it is started, and not
/// waited for after that.
async fn restart_one(context: &Context, unit: &Unit, patience: Patience, global: bool) -> Result<i32> {
    let code = step(context, unit, "loaded", Goal::Stopped, patience, !global).await?;
    if code != 0 {
        eprintln!("Unit({}) stays stopped: fleetctl start {}", unit.name, unit.name);
        return Ok(code);
    }
    if global {
        return Ok(match desire(context, unit, "launched").await {
            Ok(_) => 0,
            Err(error) => context.fail(&setting(unit), &error, ""),
        });
    }
    step(context, unit, "launched", Goal::Launched, patience, true).await
}

async fn step(
    context: &Context,
    unit: &Unit,
    desired: &str,
    goal: Goal,
    patience: Patience,
    say: bool,
) -> Result<i32> {
    if let Err(error) = desire(context, unit, desired).await {
        return Ok(context.fail(&setting(unit), &error, ""));
    }
    let waited = vec![(unit.name.clone(), false)];
    let outcome = wait::wait(context, goal, waited, Limits::of(patience), say).await?;
    let timed_out = |text: &str| format!("Error waiting for unit states, exit status: {text}");
    let word = if goal == Goal::Stopped { "stop" } else { "start" };
    Ok(report::trouble(context, goal, &outcome, timed_out, word, std::slice::from_ref(&unit.name)).await)
}

fn setting(unit: &Unit) -> String {
    format!("Error setting target state for unit {}: ", unit.name)
}
