//! What a registry in etcd was at every revision, read from etcd's own history, and what that says of the cluster: whether an
//! acknowledged command was lost, why units moved, and how often each was to be started where.
//!
//! etcd tells every change since the beginning in order, whatever happened to members, servers and networks meanwhile. So nothing here
//! compares times: a check is about the order of revisions.

use crate::etcd::ENTRIES;
use crate::{Members, base64, from_base64, until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// When.
    pub revision: u64,
    /// Of which key of the registry.
    pub key: String,
    /// The record that is there now; `None`: it is gone.
    pub value: Option<String>,
}

/// All changes so far.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    changes: Vec<Change>,
    /// Up to here everything is known.
    revision: u64,
}

/// What a command is to make of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// What it was, for people.
    pub what: String,
    /// The key of the record.
    pub key: String,
    /// What the record is to say, as `says` puts it.
    pub says: String,
    /// Whether it was acknowledged; else it may have been carried out, or not.
    pub acknowledged: bool,
}

/// What commands see of a record: of a unit its desired state and file, of a machine its metadata edits; `gone` if there is none.
fn says(key: &str, value: Option<&str>) -> String {
    let Some(value) = value else { return "gone".to_owned() };
    let Ok(record) = serde_json::from_str::<Value>(value) else { return format!("unreadable: {value}") };
    match key.split_once('/') {
        Some(("unit", _)) => launched_says(&record["desired"], &record["file"]),
        Some(("machine", _)) => record["metadata"].to_string(),
        _ => value.to_owned(),
    }
}

fn launched_says(desired: &Value, file: &Value) -> String {
    format!("{} {}", desired.as_str().unwrap_or("?"), file.as_str().unwrap_or("?"))
}

/// What a unit's record says with this desired state (`inactive`, `loaded`, `launched`) and file.
pub fn unit_says(desired: &str, file: &str) -> String {
    format!("{desired} {file}")
}

impl Ledger {
    /// Reads on to where etcd is now. Fails when it has forgotten what was not read yet.
    pub fn read_on(&mut self, members: &Members<'_>) -> Result<()> {
        // An etcd whose leader has just changed may refuse a call or two.
        until("etcd tells its history", || self.try_read_on(members).map(|()| true))
    }

    fn try_read_on(&mut self, members: &Members<'_>) -> Result<()> {
        let now = members.call(0, "kv/range", &json!({"key": base64(b"x"), "count_only": true}))?;
        let now = number(&now["header"]["revision"])?;
        if now <= self.revision {
            return Ok(());
        }
        // All keys there are: so each revision up to that one comes.
        let start = (self.revision + 1).to_string();
        let watch = json!({"create_request": {"key": "AA==", "range_end": "AA==", "start_revision": start}});
        let (mut reached, mut changes) = (self.revision, Vec::new());
        members.follow(0, "watch", &watch, |answer| {
            let result = &answer["result"];
            ensure!(result["canceled"] != true, "etcd has forgotten changes: {answer}");
            for event in result["events"].as_array().into_iter().flatten() {
                reached = reached.max(number(&event["kv"]["mod_revision"])?);
                changes.extend(read(event)?);
            }
            Ok(reached < now)
        })?;
        self.changes.extend(changes);
        self.revision = reached;
        Ok(())
    }

    /// The changes of keys that begin so, in order.
    pub fn changes<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a Change> {
        self.changes.iter().filter(move |change| change.key.starts_with(prefix))
    }

    /// The commands that were acknowledged, and whose effect is not there: never was, or is undone in the end without a command. `commands` of
    /// one key have to be in the order in which they were given, each after the one before was answered.
    pub fn lost(&self, commands: &[Command]) -> Vec<String> {
        let mut by_key: BTreeMap<&str, Vec<&Command>> = BTreeMap::new();
        for command in commands {
            by_key.entry(&command.key).or_default().push(command);
        }
        let mut lost = Vec::new();
        for (key, commands) in by_key {
            let mut states = vec![says(key, None)];
            states.extend(
                self.changes.iter().filter(|change| change.key == key).map(|c| says(key, c.value.as_deref())),
            );
            let mut at = 0;
            // What the record may say in the end: what was acknowledged last, or what may still have been carried out.
            let mut may = BTreeSet::from([states[0].clone()]);
            for command in commands {
                if !command.acknowledged {
                    may.insert(command.says.clone());
                    continue;
                }
                match states[at..].iter().position(|state| *state == command.says) {
                    Some(further) => {
                        // Where something was changed, an older command is refused by its guard.
                        if further > 0 {
                            may.clear();
                        }
                        may.insert(command.says.clone());
                        at += further;
                    }
                    None => lost.push(format!(
                        "{} was acknowledged, and {key} never came to that after {:?}",
                        command.what, states[at]
                    )),
                }
            }
            let last = &states[states.len() - 1];
            if !may.contains(last) {
                lost.push(format!(
                    "{key} is {last:?} in the end, and nobody asked for that; expected was one of {may:?}"
                ));
            }
        }
        lost
    }

    /// What is wrong with the schedule itself: a unit that went from one machine straight to another which was still there, and a place
    /// that was given while nobody led.
    pub fn wrong_moves(&self) -> Vec<String> {
        let (mut places, mut present) = (BTreeMap::<&str, String>::new(), BTreeSet::new());
        let (mut leads, mut wrong) = (false, Vec::new());
        // Changes of one revision belong together: what ended in it counts before what was decided in it.
        for change in &self.changes {
            let Change { revision, key, value } = change;
            match (key.split_once('/'), value) {
                (None, value) if key == "leader" => leads = value.is_some(),
                (Some(("presence", machine)), Some(_)) => drop(present.insert(machine)),
                (Some(("presence", machine)), None) => drop(present.remove(machine)),
                (Some(("schedule", unit)), None) => drop(places.remove(unit)),
                (Some(("schedule", unit)), Some(value)) => {
                    let to = machine_of(value);
                    if !leads {
                        wrong.push(format!("{unit} was placed at revision {revision}, where nobody led"));
                    }
                    let from = places.insert(unit, to.clone());
                    if let Some(from) = from.filter(|from| *from != to && present.contains(from.as_str())) {
                        wrong.push(format!(
                            "{unit} went from {from}, which was there, to {to} at revision {revision}"
                        ));
                    }
                }
                _ => {}
            }
        }
        wrong
    }

    /// On which machines a unit was, in this order.
    pub fn places(&self, unit: &str) -> Vec<Option<String>> {
        let key = format!("schedule/{unit}");
        let places = self.changes.iter().filter(|change| change.key == key);
        places.map(|change| change.value.as_deref().map(machine_of)).collect()
    }

    /// How often each unit was decided to be started on each machine: it was placed there, and was to be launched, and one of both, or its
    /// file, was different before. That is how many runs it can have had there.
    pub fn starts(&self) -> BTreeMap<(String, String), usize> {
        let mut units: BTreeMap<&str, (String, Option<String>)> = BTreeMap::new();
        let mut starts = BTreeMap::new();
        for Change { key, value, .. } in &self.changes {
            let Some((kind @ ("unit" | "schedule"), unit)) = key.split_once('/') else { continue };
            let state = units.entry(unit).or_insert_with(|| ("gone".to_owned(), None));
            let before = state.clone();
            match kind {
                "unit" => state.0 = says(key, value.as_deref()),
                _ => state.1 = value.as_deref().map(machine_of),
            }
            if let (true, Some(machine)) = (*state != before && state.0.starts_with("launched "), &state.1) {
                *starts.entry((unit.to_owned(), machine.clone())).or_default() += 1;
            }
        }
        starts
    }
}

fn machine_of(value: &str) -> String {
    let record: Value = serde_json::from_str(value).unwrap_or_default();
    record["machine"].as_str().unwrap_or("?").to_owned()
}

/// etcd's numbers are texts in JSON, since they may be larger than JavaScript's.
fn number(value: &Value) -> Result<u64> {
    match value {
        Value::String(text) => text.parse().with_context(|| format!("no number: {text}")),
        other => other.as_u64().with_context(|| format!("no number: {other}")),
    }
}

/// The change that an event tells, if it is one of fleet's registry.
fn read(event: &Value) -> Result<Option<Change>> {
    let text = |value: &Value| -> Result<String> {
        Ok(String::from_utf8_lossy(&from_base64(value.as_str().unwrap_or_default())?).into_owned())
    };
    let kv = &event["kv"];
    let key = text(&kv["key"])?;
    let Some(key) = key.strip_prefix(ENTRIES) else { return Ok(None) };
    let value = if event["type"] == "DELETE" { None } else { Some(text(&kv["value"])?) };
    Ok(Some(Change { revision: number(&kv["mod_revision"])?, key: key.to_owned(), value }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(changes: &[(&str, &str)]) -> Ledger {
        let change = |(index, (key, value)): (usize, &(&str, &str))| Change {
            revision: index as u64 + 1,
            key: (*key).to_owned(),
            value: (!value.is_empty()).then(|| (*value).to_owned()),
        };
        Ledger { changes: changes.iter().enumerate().map(change).collect(), revision: changes.len() as u64 }
    }

    fn unit(desired: &str) -> String {
        json!({"format": 1, "file": "f", "desired": desired}).to_string()
    }

    fn command(says: &str, acknowledged: bool) -> Command {
        Command { what: format!("to {says}"), key: "unit/a".into(), says: says.into(), acknowledged }
    }

    #[test]
    fn a_command_that_was_lost_is_found() {
        let (loaded, launched) = (unit("loaded"), unit("launched"));
        let all = ledger(&[("unit/a", &launched), ("unit/a", &loaded), ("unit/a", "")]);
        let [launch, load, destroy] = ["launched f", "loaded f", "gone"].map(|says| command(says, true));
        assert_eq!(all.lost(&[launch.clone(), load.clone(), destroy.clone()]), [""; 0]);
        // What changed nothing is there, too.
        assert_eq!(all.lost(&[launch.clone(), launch.clone(), load.clone(), destroy.clone()]), [""; 0]);
        // Not carried out at all; and in another order than that of the answers.
        assert_eq!(
            all.lost(&[launch.clone(), command("inactive f", true), load.clone(), destroy.clone()]).len(),
            1
        );
        assert_eq!(all.lost(&[load.clone(), launch.clone(), destroy.clone()]).len(), 1);
        // Undone by nobody's command.
        assert_eq!(all.lost(&[launch.clone(), load.clone()]).len(), 1);
        // Whose answer was not known may have been carried out, or not; but not when something else was done after it.
        let maybe = command("gone", false);
        assert_eq!(all.lost(&[launch.clone(), load.clone(), maybe.clone()]), [""; 0]);
        assert_eq!(all.lost(&[launch.clone(), command("loaded f", false), maybe.clone()]), [""; 0]);
        assert_eq!(all.lost(&[launch, maybe, load]).len(), 1);
    }

    #[test]
    fn moves_without_a_reason_are_found() {
        let [a, b] = ["a", "b"].map(|machine| json!({"format": 1, "machine": machine}).to_string());
        let begin = [("leader", "x"), ("presence/a", "x"), ("presence/b", "x"), ("schedule/u", &a)];
        let and = |more: &[(&str, &str)]| ledger(&[&begin[..], more].concat()).wrong_moves();
        assert_eq!(and(&[("presence/a", ""), ("schedule/u", &b)]), [""; 0]);
        assert_eq!(and(&[("schedule/u", ""), ("schedule/u", &b)]), [""; 0]);
        assert_eq!(and(&[("schedule/u", &b)]).len(), 1);
        assert_eq!(and(&[("schedule/u", ""), ("leader", ""), ("schedule/u", &b)]).len(), 1);
    }

    #[test]
    fn starts_are_counted() {
        let [a, b] = ["a", "b"].map(|machine| json!({"format": 1, "machine": machine}).to_string());
        let (launched, loaded) = (unit("launched"), unit("loaded"));
        let ledger = ledger(&[
            ("unit/u", &launched),
            ("schedule/u", &a),
            // The same once more is nothing.
            ("unit/u", &launched),
            ("unit/u", &loaded),
            ("unit/u", &launched),
            ("schedule/u", &b),
            ("schedule/u", ""),
            ("unit/u", ""),
        ]);
        let starts = ledger.starts();
        let of = |machine: &str| starts.get(&("u".to_owned(), machine.to_owned())).copied();
        assert_eq!((of("a"), of("b"), starts.len()), (Some(2), Some(1), 2));
        assert_eq!(ledger.places("u"), [Some("a".to_owned()), Some("b".to_owned()), None]);
    }
}
