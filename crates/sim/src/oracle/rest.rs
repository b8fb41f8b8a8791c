//! What has to be so once everything works again (G3).

use super::*;

impl Oracle {
    /// What is not yet as it should be, once everything works again; `None` if all is.
    pub(crate) fn unsettled<'m>(
        &self,
        machines: impl Iterator<Item = (usize, Vec<(&'m UnitName, Option<&'m str>, Phase, Option<Hash>)>)>,
    ) -> Option<String> {
        if let Some(id) = self.ids.iter().find(|id| self.view.machine(id).is_none()) {
            return Some(format!("{id} is not there"));
        }
        for (name, unit) in self.view.units() {
            let meant =
                unit.desired >= DesiredState::Loaded && !unit.requirements.global && !name.is_template();
            match self.view.place(name) {
                Some((_, _)) if !meant => return Some(format!("{name} is still on the schedule")),
                Some((id, _)) => {
                    if let Err(misfit) = placement::fits(&self.view, name, id) {
                        return Some(format!("{name} does not fit on {id}: {misfit}"));
                    }
                }
                None if meant && placement::explain(&self.view, name).is_none() => {
                    return Some(format!("{name} fits somewhere and is nowhere"));
                }
                None => {}
            }
        }
        // One that is held there as a Global unit meanwhile has not to be said to have stopped.
        let left = self.view.all_leaving().find(|(name, id)| self.view.wanted(id, name).is_none());
        if let Some((name, id)) = left {
            return Some(format!("{id} has not said yet that {name} has stopped"));
        }
        for id in &self.ids {
            let drain = drain_status(&self.view, id);
            if self.view.machine(id).is_some_and(|machine| machine.draining) && !drain.is_at_rest() {
                return Some(format!("{id} is not drained: {drain:?}"));
            }
        }
        for (host, units) in machines {
            if let Some(unsettled) = self.unsettled_on(host, &units) {
                return Some(unsettled);
            }
        }
        None
    }

    fn unsettled_on(
        &self,
        host: usize,
        units: &[(&UnitName, Option<&str>, Phase, Option<Hash>)],
    ) -> Option<String> {
        let id = &self.ids[host];
        let mut wanted = self.view.all_wanted(id);
        for (name, text, phase, hash) in units {
            let Some(wanted) = wanted.remove(*name) else {
                let left = phase.is_live() || text.is_some();
                if left {
                    return Some(format!("{name} is still on host {host} ({phase:?})"));
                }
                continue;
            };
            if *text != Some(wanted.file.text()) {
                return Some(format!("{name} has another file on host {host}"));
            }
            let passing = matches!(phase, Phase::Activating | Phase::Deactivating);
            let started = *hash == Some(wanted.file.hash());
            if passing || (wanted.state == DesiredState::Launched && !started) {
                return Some(format!("{name} is {phase:?} on host {host}, started with {hash:?}"));
            }
            let stopped = self.runs.get(&(host, (*name).clone())).is_some_and(|run| run.stopped);
            if wanted.state == DesiredState::Launched && !phase.is_live() && stopped {
                return Some(format!("{name} was stopped on host {host}, and was not started again"));
            }
            if wanted.state == DesiredState::Loaded && phase.is_live() {
                return Some(format!("{name} runs on host {host} and is to be loaded"));
            }
            let report = self.view.reports_of(name).find(|(on, _)| *on == id).map(|(_, report)| report);
            let (active, _) = phase.words();
            if report.is_none_or(|report| report.systemd.active != active || report.current != wanted.state) {
                return Some(format!("{name} is {active} on host {host} and reported as {report:?}"));
            }
        }
        wanted.into_keys().next().map(|name| format!("{name} is not on host {host}"))
    }
}

/// Whether two views show the same; the error says what differs.
pub(crate) fn same_views(one: &View, other: &View) -> Result<(), String> {
    fn same<'v, T: PartialEq + std::fmt::Debug>(
        what: &str,
        mut one: impl Iterator<Item = T> + 'v,
        mut other: impl Iterator<Item = T> + 'v,
    ) -> Result<(), String> {
        loop {
            match (one.next(), other.next()) {
                (None, None) => return Ok(()),
                (one, other) if one == other => {}
                (one, other) => return Err(format!("{what}: true is {one:?}, known is {other:?}")),
            }
        }
    }
    same("units", one.units(), other.units())?;
    same("schedule", one.schedule(), other.schedule())?;
    same("machines", one.machines(), other.machines())?;
    same("reports", one.reports(), other.reports())
}
