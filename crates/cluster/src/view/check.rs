//! Recomputes every index of a view from its records, the plain way, to compare.
use super::*;

impl View {
    /// Compares every index with one computed from scratch; the error says what differs. Slow: for tests and
    /// the simulator.
    pub fn check(&self) -> Result<(), String> {
        let ids: BTreeSet<_> = self
            .machines()
            .map(|(id, _)| id)
            .chain(self.entries.values().filter_map(|entry| entry.place.as_ref().map(|(id, _)| id)))
            .chain(self.entries.values().filter_map(|entry| entry.leaving.as_ref().map(|(id, _)| id)))
            .chain(self.entries.values().flat_map(|entry| entry.reports.keys()))
            .cloned()
            .collect();
        same("machines", &self.hosts.keys().cloned().collect(), &ids)?;
        if let Some(id) = self.left.iter().find(|id| self.machine(id).is_some()) {
            return Err(format!("{id} is there and counts as having left"));
        }
        if let Some((name, _)) = self.entries.iter().find(|(_, entry)| entry.is_empty()) {
            return Err(format!("an empty entry is kept: {name}"));
        }
        let named = |which: &dyn Fn(&UnitName, &Unit) -> bool| -> BTreeSet<UnitName> {
            self.units().filter(|(name, unit)| which(name, unit)).map(|(name, _)| name.clone()).collect()
        };
        let globals = named(&is_active_global);
        same("globals", &self.globals, &globals)?;
        let picky = |unit: &Unit| !unit.requirements.conflicts.is_empty();
        same(
            "picky globals",
            &self.picky_globals,
            &named(&|name, unit| globals.contains(name) && picky(unit)),
        )?;
        let replaces = |unit: &Unit| !unit.requirements.replaces.is_empty();
        same("replacers", &self.replacers, &named(&|_, unit| replaces(unit)))?;
        let mut followers: BTreeMap<String, BTreeSet<UnitName>> = BTreeMap::new();
        for (name, unit) in self.units() {
            for target in &unit.requirements.machine_of {
                followers.entry(target.clone()).or_default().insert(name.clone());
            }
        }
        same("followers", &self.followers, &followers)?;
        let mut ranking = Ranking::default();
        for (id, host) in &self.hosts {
            let on = |entry: &Entry| entry.place.as_ref().is_some_and(|(place, _)| place == id);
            let scheduled =
                self.entries.iter().filter(|(_, entry)| on(entry)).map(|(name, _)| name.clone()).collect();
            same("schedule of a machine", &host.scheduled, &scheduled)?;
            let leaves = |entry: &Entry| entry.leaving.as_ref().is_some_and(|(from, _)| from == id);
            let leaving = self
                .entries
                .iter()
                .filter(|(_, entry)| leaves(entry))
                .map(|(name, _)| name.clone())
                .collect();
            same("units leaving a machine", &host.leaving, &leaving)?;
            let reported = self.entries.iter().filter(|(_, entry)| entry.reports.contains_key(id));
            same("reports of a machine", &host.reported, &reported.map(|(name, _)| name.clone()).collect())?;
            let held = named(&|name, unit| scheduled.contains(name) && is_placeable(name, unit));
            let mut wanted: Vec<&UnitName> = Vec::new();
            for global in &globals {
                let (Some(unit), Some(machine)) = (self.unit(global), &host.machine) else { continue };
                let suits =
                    unit.requirements.metadata.iter().all(|(key, values)| {
                        values.iter().any(|value| machine.metadata.get(key) == Some(value))
                    });
                let clash = |other: &&UnitName| {
                    let forbids = |unit: &Unit, name: &UnitName| {
                        unit.requirements.conflicts.iter().any(|glob| glob.matches(name.as_str()))
                    };
                    forbids(unit, other) || self.unit(other).is_some_and(|unit| forbids(unit, global))
                };
                if suits && !held.iter().any(|name| clash(&name)) && !wanted.iter().any(clash) {
                    wanted.push(global);
                }
            }
            let site = Site {
                picky: named(&|name, unit| held.contains(name) && picky(unit)),
                replacers: named(&|name, unit| held.contains(name) && replaces(unit)),
                globals: wanted.into_iter().cloned().collect(),
                held,
            };
            same("units of a machine", &host.site, &site)?;
            if let Some(machine) = host.machine.as_ref().filter(|machine| machine.takes_new_units()) {
                ranking.insert(machine, (site.load(), id.clone()));
            }
        }
        same("ranking", &self.ranking, &ranking)
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, kept: &T, computed: &T) -> Result<(), String> {
    if kept == computed { Ok(()) } else { Err(format!("{what}: kept {kept:?}, computed {computed:?}")) }
}
