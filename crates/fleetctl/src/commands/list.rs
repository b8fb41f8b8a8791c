//! list-machines, list-units, list-unit-files (golden/03-list-machines.txt, 05-unit-text.txt,
//! 08-list-units.txt).
use crate::cli::{ListMachines, ListUnitFiles, ListUnits};
use crate::context::{Context, Machines, is_global, legend, print, print_json};
use crate::table::layout;
use crate::wait::reasons_in_words;
use anyhow::Result;
use fleet_api::client::{StateFilter, file_of_options};
use fleet_api::types::{Explanation, Machine, Unit, UnitState};
use futures_util::{StreamExt, stream};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The tutorial's columns. (1.0 had `target` in place of `tmachine`.)
const UNIT_FILE_FIELDS: &str = "unit,hash,dstate,state,tmachine";

/// How many units are asked about at the same time.
const AT_ONCE: usize = 16;

/// The columns that are asked for, if all of them exist. `Err` is the text to say.
fn columns<'a>(fields: &'a str, known: &[&str]) -> Result<Vec<&'a str>, String> {
    if fields.is_empty() {
        return Err("Must define output format".to_owned());
    }
    let columns: Vec<&str> = fields.split(',').collect();
    match columns.iter().find(|column| !known.contains(column)) {
        Some(unknown) => Err(format!("Invalid key in output format: {unknown:?}")),
        None => Ok(columns),
    }
}

/// Prints rows under the names of the columns.
pub(super) fn print_table(
    columns: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    no_legend: bool,
) -> Result<()> {
    let legend = columns.iter().map(|column| column.to_uppercase()).collect();
    let lines: Vec<Vec<String>> = (!no_legend).then_some(legend).into_iter().chain(rows).collect();
    print(layout(&lines).as_bytes())
}

pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// A hash, by its first 7 digits unless `full`.
fn shown_hash(hash: &str, full: bool) -> String {
    or_dash(&hash.chars().take(if full { usize::MAX } else { 7 }).collect::<String>())
}

/// A machine with its address.
fn place(id: &str, machines: &Machines, full: bool) -> String {
    if id.is_empty() {
        return "-".to_owned();
    }
    legend(id, machines.get(id).map(|machine| machine.primary_ip.as_str()).unwrap_or_default(), full)
}

pub(crate) async fn machines(context: &Context, args: &ListMachines) -> Result<i32> {
    let columns = match columns(&args.fields, &["machine", "ip", "metadata", "state"]) {
        Ok(columns) => columns,
        Err(text) => return refuse(&text),
    };
    let mut machines = match context.client.machines().await {
        Ok(machines) => machines,
        Err(error) => {
            let before = "Error retrieving list of active machines from fleet API (";
            let after = ")\nPossible issues:\n  etcd is unhealthy and/or lost quorum\n  \
                         connection cannot be established to any etcd servers";
            return Ok(context.fail(before, &error, after));
        }
    };
    machines.sort_by(|a, b| a.id.cmp(&b.id));
    if context.json() {
        print_json(&machines)?;
        return Ok(0);
    }
    let rows = machines.iter().map(|machine| {
        columns.iter().map(|column| machine_field(machine, column, args.table.full)).collect()
    });
    print_table(&columns, rows, args.table.no_legend)?;
    Ok(0)
}

/// How a machine that is there is.
pub(super) fn machine_state(machine: &Machine) -> &'static str {
    match (machine.draining, machine.cordoned) {
        (true, _) => "up,draining",
        (false, true) => "up,cordoned",
        (false, false) => "up",
    }
}

pub(super) fn machine_field(machine: &Machine, column: &str, full: bool) -> String {
    match column {
        "machine" => legend(&machine.id, "", full),
        "ip" => or_dash(&machine.primary_ip),
        "state" => machine_state(machine).to_owned(),
        _ => {
            let pairs: Vec<String> =
                machine.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
            or_dash(&pairs.join(","))
        }
    }
}

pub(crate) async fn units(context: &Context, args: &ListUnits) -> Result<i32> {
    let columns = match columns(&args.fields, &["unit", "machine", "load", "active", "sub", "hash"]) {
        Ok(columns) => columns,
        Err(text) => return refuse(&text),
    };
    let mut states = match context.client.states(&StateFilter::default()).await {
        Ok(states) => states,
        Err(error) => {
            return Ok(context.fail("Error retrieving list of units from repository: ", &error, ""));
        }
    };
    states.sort_by(|a, b| (&a.name, &a.machine_id).cmp(&(&b.name, &b.machine_id)));
    if context.json() {
        print_json(&states)?;
        return Ok(0);
    }
    let needed = columns.contains(&"machine") && !states.is_empty();
    let machines = if needed { context.machines().await } else { Arc::default() };
    let rows = states.iter().map(|state| {
        columns.iter().map(|column| state_field(state, column, &machines, args.table.full)).collect()
    });
    print_table(&columns, rows, args.table.no_legend)?;
    Ok(0)
}

fn state_field(state: &UnitState, column: &str, machines: &Machines, full: bool) -> String {
    match column {
        "unit" => state.name.clone(),
        "machine" => place(&state.machine_id, machines, full),
        "load" => state.systemd_load_state.clone(),
        "active" => state.systemd_active_state.clone(),
        "sub" => state.systemd_sub_state.clone(),
        _ => shown_hash(&state.hash, full),
    }
}

pub(crate) async fn unit_files(context: &Context, args: &ListUnitFiles) -> Result<i32> {
    let known = ["unit", "hash", "dstate", "state", "target", "tmachine", "global", "desc", "reason"];
    let columns = match columns(args.fields.as_deref().unwrap_or(UNIT_FILE_FIELDS), &known) {
        Ok(columns) => columns,
        Err(text) => return refuse(&text),
    };
    if args.fields.is_some() && columns.contains(&"tmachine") {
        eprintln!("WARNING: The \"tmachine\" field is deprecated. Use \"target\" instead");
    }
    let mut units = match context.client.units().await {
        Ok(units) => units,
        Err(error) => {
            return Ok(context.fail("Error retrieving list of units from repository: ", &error, ""));
        }
    };
    units.sort_by(|a, b| a.name.cmp(&b.name));
    if context.json() {
        print_json(&units)?;
        return Ok(0);
    }
    let placed = units.iter().any(|unit| !unit.machine_id.is_empty());
    let needed = placed && columns.iter().any(|column| matches!(*column, "target" | "tmachine"));
    let machines = if needed { context.machines().await } else { Arc::default() };
    let reasons = if columns.contains(&"reason") { reasons(context, &units).await } else { BTreeMap::new() };
    let rows = units.iter().map(|unit| {
        let reason = reasons.get(&unit.name).map(String::as_str).unwrap_or_default();
        let row = UnitRow::of(unit);
        columns.iter().map(|column| row.field(column, &machines, reason, args.table.full)).collect()
    });
    print_table(&columns, rows, args.table.no_legend)?;
    Ok(0)
}

/// What several columns are made of.
struct UnitRow<'a> {
    unit: &'a Unit,
    file: Option<fleet_unit::UnitFile>,
    global: bool,
}

impl<'a> UnitRow<'a> {
    fn of(unit: &'a Unit) -> Self {
        UnitRow { unit, file: file_of_options(&unit.options).ok(), global: is_global(unit) }
    }

    fn field(&self, column: &str, machines: &Machines, reason: &str, full: bool) -> String {
        let unit = self.unit;
        match column {
            "unit" => unit.name.clone(),
            "hash" => {
                let hash = self.file.as_ref().map(|file| file.hash().to_string());
                shown_hash(&hash.unwrap_or_default(), full)
            }
            "dstate" => or_dash(&unit.desired_state),
            "state" if self.global => "-".to_owned(),
            "state" => or_dash(&unit.current_state),
            "target" | "tmachine" if self.global => "global".to_owned(),
            "target" | "tmachine" => place(&unit.machine_id, machines, full),
            "global" => self.global.to_string(),
            "desc" => or_dash(self.file.as_ref().and_then(|file| file.description()).unwrap_or_default()),
            _ => or_dash(reason),
        }
    }
}

/// Why units are not what they should be, by name; only those of which that can be told.
async fn reasons(context: &Context, units: &[Unit]) -> BTreeMap<String, String> {
    let unsettled =
        units.iter().filter(|unit| unit.current_state != unit.desired_state || !unit.machine_id.is_empty());
    let asked = unsettled.map(|unit| async move {
        let explanation = context.client.explain(&unit.name).await.ok().flatten()?;
        let words = in_words(context, &explanation).await;
        Some((unit.name.clone(), words))
    });
    stream::iter(asked).buffered(AT_ONCE).filter_map(std::future::ready).collect().await
}

async fn in_words(context: &Context, explanation: &Explanation) -> String {
    let problems = reasons_in_words(context, &explanation.problems).await;
    let unplaced = reasons_in_words(context, &explanation.unplaced).await;
    let parts = [problems, explanation.delayed.clone(), unplaced];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

fn refuse(text: &str) -> Result<i32> {
    eprintln!("{text}");
    Ok(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_checked_in_the_originals_words() {
        let known = ["machine", "ip"];
        assert_eq!(columns("ip,machine,ip", &known), Ok(vec!["ip", "machine", "ip"]));
        for (fields, text) in [
            ("", "Must define output format"),
            ("bogus", "Invalid key in output format: \"bogus\""),
            ("machine,", "Invalid key in output format: \"\""),
            ("machine, ip", "Invalid key in output format: \" ip\""),
            ("Machine", "Invalid key in output format: \"Machine\""),
        ] {
            assert_eq!(columns(fields, &known), Err(text.to_owned()));
        }
    }

    fn machines_known() -> Machines {
        let id = "4a1e0c2fb7d94e6c8f3a51d2c07e9b11".to_owned();
        let metadata = [("region", "eu"), ("disk", "ssd")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let machine =
            Machine { id: id.clone(), metadata, primary_ip: "172.30.7.11".into(), ..Machine::default() };
        [(id, machine)].into()
    }

    /// golden/03-list-machines.txt
    #[test]
    fn machine_fields() {
        let machines = machines_known();
        let machine = machines.values().next().unwrap();
        assert_eq!(machine_field(machine, "machine", false), "4a1e0c2f...");
        assert_eq!(machine_field(machine, "machine", true), "4a1e0c2fb7d94e6c8f3a51d2c07e9b11");
        assert_eq!(machine_field(machine, "metadata", false), "disk=ssd,region=eu");
        let mut bare = Machine::default();
        assert_eq!(machine_field(&bare, "metadata", false), "-");
        assert_eq!(machine_field(&bare, "ip", false), "-");
        assert_eq!(machine_field(&bare, "state", false), "up");
        bare.cordoned = true;
        assert_eq!(machine_field(&bare, "state", false), "up,cordoned");
        bare.draining = true;
        assert_eq!(machine_field(&bare, "state", false), "up,draining");
    }

    /// golden/08-list-units.txt
    #[test]
    fn unit_file_fields() {
        let machines = machines_known();
        let file = fleet_unit::UnitFile::parse("[Unit]\nDescription=d\n[X-Fleet]\nGlobal=true\n").unwrap();
        let mut unit = Unit {
            name: "glob.service".into(),
            desired_state: "launched".into(),
            options: fleet_api::client::options_of_file(&file),
            ..Unit::default()
        };
        let row = |unit: &Unit| {
            let columns = ["unit", "global", "dstate", "state", "target", "desc"];
            columns.map(|column| UnitRow::of(unit).field(column, &machines, "", false)).join(" ")
        };
        assert_eq!(row(&unit), "glob.service true launched - global d");
        unit.options.pop();
        assert_eq!(row(&unit), "glob.service false launched - - d");
        unit.current_state = "inactive".into();
        unit.machine_id = "4a1e0c2fb7d94e6c8f3a51d2c07e9b11".into();
        assert_eq!(row(&unit), "glob.service false launched inactive 4a1e0c2f.../172.30.7.11 d");
        // A machine that is gone has no address.
        unit.machine_id = "c93b5f08e1ad47d2b6740e9f8a2d3c33".into();
        assert_eq!(UnitRow::of(&unit).field("tmachine", &machines, "", false), "c93b5f08...");
        assert_eq!(shown_hash("", false), "-");
        assert_eq!(shown_hash("86943ac9f3754cb90f8dd38bf6da7b0cad074592", false), "86943ac");
    }
}
