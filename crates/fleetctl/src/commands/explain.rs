//! explain: why units are not what they should be.
use crate::context::{Context, is_global, misused, names, print_line};
use anyhow::Result;
use fleet_api::client::StateFilter;
use fleet_api::types::{Explanation, UnitState};
use std::collections::BTreeMap;

pub(crate) async fn run(context: &Context, arguments: &[String]) -> Result<i32> {
    if arguments.is_empty() {
        return misused("No units given");
    }
    let client = &context.client;
    let mut code = 0;
    for name in names(arguments) {
        let unit = match client.unit(&name).await {
            Ok(Some(unit)) => unit,
            Ok(None) => {
                eprintln!("Unit {name} does not exist.");
                code = 1;
                continue;
            }
            Err(error) => return Ok(context.fail(&format!("Error retrieving unit {name}: "), &error, "")),
        };
        let explanation = match client.explain(&name).await {
            Ok(Some(explanation)) => explanation,
            Ok(None) => {
                eprintln!("Unit {name} does not exist.");
                code = 1;
                continue;
            }
            Err(error) if error.is_unknown_resource() => {
                eprintln!("This server does not explain; it is older than fleet 2.");
                return Ok(1);
            }
            Err(error) => return Ok(context.fail(&format!("Error retrieving unit {name}: "), &error, "")),
        };
        if context.json() {
            context.remember(serde_json::to_value(&explanation)?);
            continue;
        }
        let filter = StateFilter { unit: Some(name.clone()), machine: None };
        let states = match client.states(&filter).await {
            Ok(states) => states,
            Err(error) => return Ok(context.fail("Error retrieving unit states: ", &error, "")),
        };
        let mut legends = BTreeMap::new();
        let mentioned = states.iter().map(|state| &state.machine_id);
        let mentioned = mentioned.chain(explanation.problems.iter().map(|reason| &reason.machine_id));
        let mentioned = mentioned.chain(explanation.unplaced.iter().map(|reason| &reason.machine_id));
        for id in mentioned.chain([&explanation.machine_id]) {
            legends.insert(id.clone(), context.legend(id).await);
        }
        let place = |id: &str| legends.get(id).cloned().unwrap_or_default();
        for line in lines(&explanation, &states, is_global(&unit), place) {
            print_line(&line)?;
        }
    }
    context.finish()?;
    Ok(code)
}

/// The explanation of one unit, line by line.
fn lines(
    it: &Explanation,
    states: &[UnitState],
    global: bool,
    place: impl Fn(&str) -> String,
) -> Vec<String> {
    let on = |id: &str| if id.is_empty() { String::new() } else { format!(" on {}", place(id)) };
    let mut lines = Vec::new();
    lines.push(if global {
        format!("{}: global, should be {} on every machine that fits", it.name, it.desired_state)
    } else if it.current_state == it.desired_state {
        format!("{}: {} as it should be{}", it.name, it.current_state, on(&it.machine_id))
    } else {
        format!("{}: should be {}, is {}{}", it.name, it.desired_state, it.current_state, on(&it.machine_id))
    });
    for state in states {
        lines.push(format!(
            "  systemd{}: {}, {} ({})",
            on(&state.machine_id),
            state.systemd_load_state,
            state.systemd_active_state,
            state.systemd_sub_state
        ));
    }
    for problem in &it.problems {
        lines.push(format!("  problem{}: {}", on(&problem.machine_id), problem.reason));
    }
    if !it.delayed.is_empty() {
        lines.push(format!("  waits for a machine: {}", it.delayed));
    }
    if !it.unplaced.is_empty() {
        lines.push(format!("  {}:", if global { "not on" } else { "no machine can take it" }));
        for reason in &it.unplaced {
            let who = if reason.machine_id.is_empty() {
                String::new()
            } else {
                format!("{}: ", place(&reason.machine_id))
            };
            lines.push(format!("    {who}{}", reason.reason));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_api::types::Reason;

    fn reason(machine: &str, text: &str) -> Reason {
        Reason { machine_id: machine.into(), reason: text.into() }
    }

    #[test]
    fn what_is_said() {
        let mut it = Explanation {
            name: "a.service".into(),
            desired_state: "launched".into(),
            current_state: "inactive".into(),
            unplaced: vec![reason("m1", "disk=ssd is missing"), reason("", "one more")],
            ..Default::default()
        };
        let place = |id: &str| format!("<{id}>");
        assert_eq!(
            lines(&it, &[], false, place),
            [
                "a.service: should be launched, is inactive",
                "  no machine can take it:",
                "    <m1>: disk=ssd is missing",
                "    one more",
            ]
        );
        it.unplaced.clear();
        it.delayed = "many machines vanished".into();
        assert_eq!(lines(&it, &[], false, place)[1..], ["  waits for a machine: many machines vanished"]);
        it.delayed.clear();
        it.current_state = "launched".into();
        it.machine_id = "m2".into();
        it.problems = vec![reason("m2", "its start job failed")];
        let state = UnitState {
            machine_id: "m2".into(),
            systemd_load_state: "loaded".into(),
            systemd_active_state: "failed".into(),
            systemd_sub_state: "failed".into(),
            ..Default::default()
        };
        assert_eq!(
            lines(&it, &[state], false, place),
            [
                "a.service: launched as it should be on <m2>",
                "  systemd on <m2>: loaded, failed (failed)",
                "  problem on <m2>: its start job failed",
            ]
        );
    }
}
