//! Copies of units: which machines have a unit, and which of them an argument means. `UNIT@MACHINE` chooses one, as
//! `--machine` does; MACHINE is what its ID begins with.
use crate::context::Context;
use fleet_api::client::{Error, StateFilter};
use fleet_unit::name::{UnitType, from_argument};

/// A unit on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// Its name.
    pub(crate) unit: String,
    /// The ID of its machine.
    pub(crate) machine: String,
}

/// What an argument names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selector {
    /// The unit.
    pub(crate) unit: String,
    /// What the ID of the machine begins with, if one was named.
    pub(crate) machine: Option<String>,
}

impl Selector {
    /// Reads an argument. The machine follows the unit's type, so that the `@` of a template or instance is never taken for
    /// it: `web@1.service@4a1e`. What ends in a type is a name as a whole.
    pub(crate) fn parse(argument: &str) -> Self {
        if let Some((unit, machine)) = argument.rsplit_once('@')
            && has_type(unit)
            && !has_type(machine)
            && !machine.contains('/')
        {
            return Selector { unit: from_argument(unit), machine: Some(machine.to_owned()) };
        }
        Selector { unit: from_argument(argument), machine: None }
    }

    /// Reads an argument of a command that was also given `--machine` (empty: it was not). The error says what is wrong.
    pub(crate) fn with_flag(argument: &str, flag: &str) -> Result<Self, String> {
        let mut selector = Selector::parse(argument);
        match &selector.machine {
            Some(_) if !flag.is_empty() => {
                Err(format!("Both --machine={flag} and {argument} name a machine, please specify only one."))
            }
            Some(_) => Ok(selector),
            None => {
                selector.machine = (!flag.is_empty()).then(|| flag.to_owned());
                Ok(selector)
            }
        }
    }

    /// The copies that this means, of those the cluster reports, by machine: all, or the one on the machine that was named.
    pub(crate) async fn reported(&self, context: &Context) -> Result<Result<Vec<Copy>, String>, Error> {
        let filter = StateFilter { unit: Some(self.unit.clone()), machine: None };
        let states = context.client.states(&filter).await?;
        let mut there: Vec<String> = states.into_iter().map(|state| state.machine_id).collect();
        there.sort_unstable();
        there.dedup();
        let copy = |machine| Copy { unit: self.unit.clone(), machine };
        let Some(prefix) = &self.machine else { return Ok(Ok(there.into_iter().map(copy).collect())) };
        let fitting = fitting(there.iter().map(String::as_str), prefix);
        Ok(match fitting.as_slice() {
            [machine] => Ok(vec![copy((*machine).to_owned())]),
            [] => {
                let machines = context.machines().await;
                let known = self::fitting(machines.keys().map(String::as_str), prefix);
                Err(nowhere(&self.unit, prefix, &known, &there))
            }
            several => Err(format!(
                "{prefix:?} begins the IDs of several machines that have unit {}: {}",
                self.unit,
                several.join(", ")
            )),
        })
    }
}

/// The IDs that begin so. Nothing begins all of them.
fn fitting<'a>(ids: impl Iterator<Item = &'a str>, prefix: &str) -> Vec<&'a str> {
    let prefix = prefix.to_ascii_lowercase();
    ids.filter(|id| !prefix.is_empty() && id.starts_with(&prefix)).collect()
}

/// Why a unit is not on the machine that was named.
fn nowhere(unit: &str, prefix: &str, known: &[&str], there: &[String]) -> String {
    let mut text = match known {
        [] => format!("No machine's ID begins with {prefix:?}."),
        [machine] => format!("Unit {unit} is not on machine {machine}."),
        several => format!("Unit {unit} is on none of the machines {}.", several.join(", ")),
    };
    match there {
        [] => text.push_str(&format!(" Unit {unit} is on no machine.")),
        there => text.push_str(&format!(" Unit {unit} is on: {}", there.join(", "))),
    }
    text
}

fn has_type(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, suffix)| UnitType::from_suffix(suffix).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[track_caller]
    fn parsed(argument: &str, unit: &str, machine: Option<&str>) {
        let expected = Selector { unit: unit.to_owned(), machine: machine.map(str::to_owned) };
        assert_eq!(Selector::parse(argument), expected, "{argument}");
    }

    #[test]
    fn the_machine_follows_the_type() {
        parsed("web", "web.service", None);
        parsed("web.service", "web.service", None);
        parsed("web.service@4a1e", "web.service", Some("4a1e"));
        parsed("web.service@", "web.service", Some(""));
        parsed("dir/web.timer@4A1E", "web.timer", Some("4A1E"));
        // Templates and instances.
        parsed("hello@1.service", "hello@1.service", None);
        parsed("hello@.service", "hello@.service", None);
        parsed("hello@1", "hello@1.service", None);
        parsed("hello@1.service@4a1e", "hello@1.service", Some("4a1e"));
        parsed("hello@a@b.socket@c93b", "hello@a@b.socket", Some("c93b"));
        // Odd, but a name of systemd's: prefix `web.service`, instance `x`.
        parsed("web.service@x.service", "web.service@x.service", None);
        parsed("web.conf@x", "web.conf@x.service", None);
    }

    #[test]
    fn one_way_to_name_the_machine_is_enough() {
        let parse = Selector::with_flag;
        assert_eq!(parse("a.service", "4a").unwrap().machine.as_deref(), Some("4a"));
        assert_eq!(parse("a.service", "").unwrap().machine, None);
        assert_eq!(parse("a.service@4a", "").unwrap().machine.as_deref(), Some("4a"));
        assert!(parse("a.service@4a", "4a").unwrap_err().contains("only one"));
    }

    #[test]
    fn prefixes() {
        let ids = ["4a1e0c", "4a1e77", "c93b5f"];
        let fit = |prefix: &str| fitting(ids.into_iter(), prefix);
        assert_eq!(fit("4a1e7"), ["4a1e77"]);
        assert_eq!(fit("4A1E"), ["4a1e0c", "4a1e77"]);
        assert!(fit("zzz").is_empty() && fit("").is_empty());
    }

    #[test]
    fn why_not_there() {
        let there = ["4a1e".to_owned()];
        assert_eq!(
            nowhere("a.service", "zz", &[], &there),
            "No machine's ID begins with \"zz\". Unit a.service is on: 4a1e"
        );
        assert_eq!(
            nowhere("a.service", "c", &["c93b"], &[]),
            "Unit a.service is not on machine c93b. Unit a.service is on no machine."
        );
    }

    proptest! {
        /// Whatever comes after the unit's type and `@` is the machine, unless it makes a longer name.
        #[test]
        fn a_unit_and_a_machine_come_apart_again(stem in "[a-z]{1,5}(@[a-z0-9]{0,4})?", machine in "[0-9a-f]{1,32}") {
            let unit = format!("{stem}.service");
            let expected = Selector { unit: unit.clone(), machine: Some(machine.clone()) };
            prop_assert_eq!(Selector::parse(&format!("{unit}@{machine}")), expected);
            prop_assert_eq!(Selector::parse(&unit), Selector { unit: unit.clone(), machine: None });
        }
    }
}
