//! What runs where, as the systemd of every host says: to check that exactly one copy of each unit runs, that what should not be
//! touched was not, and that there never were two copies.

use crate::{Fleet, until};
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};

/// A service that runs until it is stopped, and writes down when it ran: see [`Fleet::never_two`].
///
/// The start is written before its main process begins and the stop after that has ended, so that runs on different hosts overlap
/// on paper whenever they did in truth. All hosts of a testbed have one clock.
pub const RECORDED: &str = "[Service]\n\
    ExecStartPre=/bin/sh -c 'mkdir -p /var/log/runs; echo start $$(date +%%s%%N) >> /var/log/runs/%n'\n\
    ExecStart=/bin/sleep infinity\n\
    ExecStopPost=/bin/sh -c 'echo stop $$(date +%%s%%N) >> /var/log/runs/%n'\n";

/// A run of a unit on a host. Two are the same only if nothing was restarted in between.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// The host, by index.
    pub host: usize,
    /// The main process; 0 when there is none (any more).
    pub pid: u32,
    /// systemd's ID of this run.
    pub invocation: String,
}

/// What runs at one moment: for every unit asked about, its runs; also those that are being started or stopped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Running(pub BTreeMap<String, Vec<Run>>);

impl Running {
    /// Fails unless exactly one copy of each unit runs.
    pub fn one_each(&self) -> Result<()> {
        for (unit, runs) in &self.0 {
            if runs.len() != 1 {
                bail!("{unit} runs {} times: {runs:?}", runs.len());
            }
        }
        Ok(())
    }

    /// The units that do not run (only) where and as they did before.
    pub fn changed_since(&self, before: &Running) -> BTreeSet<String> {
        let units = self.0.keys().chain(before.0.keys());
        units.filter(|unit| self.0.get(*unit) != before.0.get(*unit)).cloned().collect()
    }

    /// Fails if a unit was restarted or moved that is not among these.
    pub fn only_changed(&self, before: &Running, may: &BTreeSet<String>) -> Result<()> {
        let touched: Vec<_> = self.changed_since(before).difference(may).cloned().collect();
        if !touched.is_empty() {
            bail!("touched without need: {touched:?}; before: {before:?}; now: {self:?}");
        }
        Ok(())
    }

    /// The units on a host.
    pub fn on(&self, host: usize) -> BTreeSet<String> {
        let there = |runs: &Vec<Run>| runs.iter().any(|run| run.host == host);
        self.0.iter().filter(|(_, runs)| there(runs)).map(|(unit, _)| unit.clone()).collect()
    }

    /// The host of a unit, if it has one.
    pub fn host_of(&self, unit: &str) -> Option<usize> {
        self.0.get(unit)?.first().map(|run| run.host)
    }
}

impl Fleet {
    /// What runs of these units on all hosts that are up.
    pub fn running<U: AsRef<str>>(&self, units: &[U]) -> Result<Running> {
        let mut running: BTreeMap<String, Vec<Run>> =
            units.iter().map(|unit| (unit.as_ref().to_owned(), Vec::new())).collect();
        for (index, host) in self.cluster.hosts().iter().enumerate().filter(|(_, host)| host.is_up()) {
            let words = ["systemctl", "show", "-p", "Id,ActiveState,MainPID,InvocationID"];
            let shown = host.run(words.into_iter().chain(units.iter().map(AsRef::as_ref)))?.ok()?.stdout;
            for block in shown.split("\n\n") {
                let values: BTreeMap<&str, &str> =
                    block.lines().filter_map(|line| line.split_once('=')).collect();
                let value = |key: &str| values.get(key).copied().unwrap_or_default();
                if matches!(value("ActiveState"), "inactive" | "failed") {
                    continue;
                }
                let runs = running.get_mut(value("Id")).with_context(|| format!("not asked for: {block}"))?;
                let (pid, invocation) = (value("MainPID").parse().unwrap_or(0), value("InvocationID"));
                runs.push(Run { host: index, pid, invocation: invocation.to_owned() });
            }
        }
        Ok(Running(running))
    }

    /// Waits until exactly one copy of each unit runs; what runs then.
    pub fn one_each<U: AsRef<str>>(&self, units: &[U]) -> Result<Running> {
        let mut found = Running::default();
        until("exactly one copy of each unit runs", || {
            found = self.running(units)?;
            found.one_each().map(|()| true)
        })?;
        Ok(found)
    }

    /// Writes files of one text for all units and starts them; what runs then.
    pub fn start_all<U: AsRef<str>>(&self, units: &[U], text: &str) -> Result<Running> {
        for unit in units {
            self.file(unit.as_ref(), text)?;
        }
        let names: Vec<&str> = units.iter().map(AsRef::as_ref).collect();
        self.ok(&format!("start {}", names.join(" ")))?;
        self.one_each(units)
    }

    /// Fails if two copies of a unit made of [`RECORDED`] ever ran at the same time. A run on a host that lost its power has no
    /// end: do not ask about units that were on such a host.
    pub fn never_two<U: AsRef<str>>(&self, units: &[U]) -> Result<()> {
        for unit in units.iter().map(AsRef::as_ref) {
            let mut runs: Vec<(u128, u128, usize)> = Vec::new();
            for (index, host) in self.cluster.hosts().iter().enumerate() {
                let path = host.disk_path(format!("/var/log/runs/{unit}"));
                let Ok(log) = std::fs::read_to_string(path) else { continue };
                for line in log.lines() {
                    let (what, at) = line.split_once(' ').context("a line of a run")?;
                    let at: u128 = at.parse().with_context(|| format!("{unit}: {line:?}"))?;
                    match (what, runs.last_mut()) {
                        ("start", _) => runs.push((at, u128::MAX, index)),
                        (_, Some((_, end, _))) => *end = at,
                        (_, None) => bail!("{unit}: a stop without a start on host {index}"),
                    }
                }
            }
            if runs.is_empty() {
                bail!("{unit} has no record of its runs");
            }
            runs.sort_unstable();
            for pair in runs.windows(2) {
                if pair[1].0 < pair[0].1 {
                    bail!("two copies of {unit} at the same time (start, stop, host): {runs:?}");
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(runs: &[(&str, usize, &str)]) -> Running {
        let mut all = BTreeMap::<String, Vec<Run>>::new();
        for &(unit, host, invocation) in runs {
            let run = Run { host, pid: 1, invocation: invocation.into() };
            all.entry(unit.into()).or_default().push(run);
        }
        Running(all)
    }

    #[test]
    fn restarts_and_second_copies_are_found() {
        let before = running(&[("a", 0, "x"), ("b", 1, "y")]);
        assert!(before.one_each().is_ok());
        assert!(running(&[("a", 0, "x"), ("a", 1, "z")]).one_each().is_err());
        assert!(Running([("a".to_owned(), Vec::new())].into()).one_each().is_err());
        let after = running(&[("a", 0, "x"), ("b", 1, "z")]);
        assert_eq!(after.changed_since(&before), BTreeSet::from(["b".to_owned()]));
        assert!(after.only_changed(&before, &BTreeSet::new()).is_err());
        assert!(after.only_changed(&before, &BTreeSet::from(["b".to_owned()])).is_ok());
        assert_eq!(after.on(1), BTreeSet::from(["b".to_owned()]));
        assert_eq!(after.host_of("a"), Some(0));
    }
}
