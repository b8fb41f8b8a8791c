//! The checks. What they hold fleet to is written in docs/RELIABILITY.md; here is how they tell.
//!
//! - **G1**: what a server tells of a unit, and how it is in the end, was written by a command that no acknowledged one came after.
//! - **G2**: a unit is started and stopped on a host only if a command, or the schedule, said so since it was last touched there, or the
//!   host was down, or its processes were killed, or it has OnIsolation=stop and the host could not be heard of. And it is
//!   taken from a machine only if that could not be heard of, or is drained, or does not fit any more.
//! - **G3**: in the end everything is where and as it is to be, or says why not.
//! - **G4**: in the end a unit runs where it is placed and nowhere else; one with OnIsolation=stop never ran twice at a time.
//! - **states**: what servers report in the end is what systemd says.
//! - **order**: what a server tells never goes back to an older revision.
//!
//! Where something was not seen, because no event stream stood at that time, fleet is believed, if there is a reason to.

use super::{
    Actual, Command, Effect, End, Fault, FaultKind, File, History, Known, Millis, Outcome, Run, Seen,
    Violation, seconds,
};
use std::collections::{BTreeMap, BTreeSet};

/// How long news may be on their way on a busy machine without being broken.
const LAG: Millis = 10_000;
/// How long a drain may go on.
const DRAIN: Millis = 60_000;

type Found = Vec<Violation>;

/// A value that commands write: a file's hash or a desired state; none: there is no such unit.
type Value<'h> = Option<&'h str>;

impl History {
    /// What must not be.
    pub fn check(&self) -> Vec<Violation> {
        let checker = Checker::new(self);
        let mut found = Found::new();
        checker.check_order(&mut found);
        checker.check_seen(&mut found);
        checker.check_starts_and_stops(&mut found);
        checker.check_moves(&mut found);
        checker.check_copies(&mut found);
        found.extend(self.check_end());
        found.sort_by_key(|violation| violation.at);
        found
    }

    /// What is not as it is to be in the end.
    pub fn check_end(&self) -> Vec<Violation> {
        let mut found = Found::new();
        if let Some(end) = &self.end {
            Checker::new(self).check_end(end, &mut found);
        }
        found
    }
}

/// The history, and what is asked of it often.
struct Checker<'h> {
    history: &'h History,
    /// Commands by unit that may have been carried out.
    about: BTreeMap<&'h str, Vec<&'h Command>>,
    /// What was seen, by unit.
    seen: BTreeMap<&'h str, Vec<&'h Seen>>,
}

impl std::ops::Deref for Checker<'_> {
    type Target = History;

    fn deref(&self) -> &History {
        self.history
    }
}

impl<'h> Checker<'h> {
    fn new(history: &'h History) -> Self {
        let mut about: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for command in
            history.commands.iter().filter(|command| !matches!(command.outcome, Outcome::Refused(_)))
        {
            if let Some(unit) = command.effect.unit() {
                about.entry(unit).or_default().push(command);
            }
        }
        let mut seen: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for one in &history.seen {
            seen.entry(one.unit.as_str()).or_default().push(one);
        }
        Checker { history, about, seen }
    }

    // ---- G1

    fn check_order(&self, found: &mut Found) {
        let mut last: BTreeMap<usize, u64> = BTreeMap::new();
        for seen in &self.history.seen {
            let last = last.entry(seen.server).or_default();
            if seen.revision < *last {
                let what = format!("server {} told revision {} after {last}", seen.server, seen.revision);
                found.push(Violation { check: "order", at: seen.at, what });
            }
            *last = seen.revision.max(*last);
        }
    }

    fn check_seen(&self, found: &mut Found) {
        for seen in &self.history.seen {
            let known = seen.state.as_ref();
            self.check_known(&seen.unit, known, seen.revision, seen.at, found);
        }
    }

    /// G1 for one unit, as it was told at `at` to be at a revision or a later one.
    fn check_known(&self, unit: &str, known: Option<&Known>, revision: u64, at: Millis, found: &mut Found) {
        let file = known.map(|known| known.hash.as_str());
        let desired = known.map(|known| known.desired.as_str());
        for (what, value, writes) in [
            ("file", file, &file_of as &dyn Fn(&Effect) -> Option<(Value<'_>, bool)>),
            ("desired state", desired, &desired_of),
        ] {
            let may = self.may_be(unit, revision, at, writes);
            if !may.contains(&value) {
                let (value, may) = (value.unwrap_or("none"), may.into_iter().map(|v| v.unwrap_or("none")));
                let may: Vec<_> = may.collect();
                let what = format!(
                    "the {what} of {unit} is {value} at revision {revision}, and can only be {may:?}"
                );
                found.push(Violation { check: "G1", at, what });
                // A unit that is gone is not told twice.
                return;
            }
        }
    }

    /// What of a unit may be true at `at`, and at that revision or later.
    fn may_be(
        &self,
        unit: &str,
        revision: u64,
        at: Millis,
        writes: &dyn for<'e> Fn(&'e Effect) -> Option<(Value<'e>, bool)>,
    ) -> BTreeSet<Value<'h>> {
        let about: Vec<&Command> = self.about(unit).filter(|command| command.start <= at).collect();
        // Commands whose effect is certainly in what was told.
        let done: Vec<_> = about
            .iter()
            .filter(|command| match command.outcome {
                Outcome::Acknowledged { revision: Some(told) } => told <= revision,
                Outcome::Acknowledged { revision: None } => command.end.is_some_and(|end| end + LAG < at),
                _ => false,
            })
            .filter_map(|command| Some((command, writes(&command.effect)?)))
            .collect();
        let over = |value: Value<'_>, end: Option<Millis>| {
            done.iter().any(|(after, (_, always))| {
                end.is_some_and(|end| end < after.start) && (*always || value.is_none())
            })
        };
        let mut may = BTreeSet::new();
        // In the beginning there was nothing.
        if !over(None, Some(0)) {
            may.insert(None);
        }
        for command in &about {
            let Some((value, _)) = writes(&command.effect) else { continue };
            if !over(value, self.over(command)) {
                may.insert(value);
            }
        }
        may
    }

    /// Commands about a unit that may have been carried out.
    fn about(&self, unit: &str) -> impl Iterator<Item = &'h Command> {
        self.about.get(unit).into_iter().flatten().copied()
    }

    // ---- G2

    fn check_starts_and_stops(&self, found: &mut Found) {
        let mut runs: BTreeMap<(&str, usize), Vec<&Run>> = BTreeMap::new();
        for run in &self.runs {
            runs.entry((&run.unit, run.host)).or_default().push(run);
        }
        for ((unit, host), mut runs) in runs {
            runs.sort_by_key(|run| run.start);
            let mut before: Option<&Run> = None;
            for run in runs {
                let at = run.start;
                let lost = before.is_some_and(|before| self.end_of(before).is_none_or(|end| end > at));
                if lost {
                    let what = format!("{unit} was started on host {host} while it ran there");
                    found.push(Violation { check: "G4", at, what });
                } else if !self.start_is_explained(run, before) {
                    let what = format!("{unit} was started on host {host} without a decision");
                    found.push(Violation { check: "G2", at, what });
                }
                if let Some(stop) = run.stop.filter(|stop| !self.stop_is_explained(run, *stop)) {
                    let ran = seconds(stop.saturating_sub(run.start));
                    let what = format!(
                        "{unit} was stopped on host {host} without a decision after {ran:.2} s ({})",
                        run.how
                    );
                    found.push(Violation { check: "G2", at: stop, what });
                }
                before = Some(run);
            }
        }
    }

    fn stop_is_explained(&self, run: &Run, at: Millis) -> bool {
        let (unit, host, file) = (run.unit.as_str(), run.host, self.file_of_run(run));
        if file.is_none_or(|(_, file)| file.ends) {
            return true;
        }
        let since = self.reach(host, run.start).max(self.rest(at));
        self.faults_on(host).any(|fault| match fault.kind {
            FaultKind::Down => fault.start <= at && fault.end.is_none_or(|end| at <= end),
            FaultKind::Kills => fault.start <= at && fault.end.is_none_or(|end| at <= end + LAG),
            _ => false,
        }) || self.about(unit).any(|command| {
            let stops = match &command.effect {
                Effect::Put { file: to, desired, .. } => {
                    desired != "launched"
                        || to.as_deref().is_some_and(|to| file.is_some_and(|(hash, _)| hash != to))
                }
                _ => true,
            };
            stops && self.is_within(command, since, at)
        }) || self.is_told_otherwise(run, since, at)
            || self.is_fenced(run, at)
            || self.is_moved_by_machines(run, since, at)
            || self.may_be_unseen(unit, host, since, at)
    }

    fn start_is_explained(&self, run: &Run, before: Option<&Run>) -> bool {
        let (unit, host, at) = (run.unit.as_str(), run.host, run.start);
        let since = before.map_or(0, |before| self.reach(host, self.end_of(before).unwrap_or(before.start)));
        let since = since.max(self.rest(at));
        let Some(before) = before else {
            // The first one: it was to be there at some time.
            let global = self.file_of_run(run).is_none_or(|(_, file)| file.global);
            return global
                || self.told(unit, since, at + LAG).chain(self.known_at(unit, since)).any(|known| {
                    known.is_some_and(|known| known.machine == Some(host) && known.desired == "launched")
                })
                || self
                    .about(unit)
                    .any(|command| self.is_within(command, at.saturating_sub(LAG).max(since), at + LAG))
                || !self.is_watched(self.reach(host, at), at);
        };
        self.faults_on(host).any(|fault| {
            matches!(fault.kind, FaultKind::Down)
                && self.matters(fault, at)
                && fault.end.is_none_or(|end| end >= before.start)
        }) || self.about(unit).any(|command| self.is_within(command, since, at))
            || self.is_told_otherwise(before, since, at)
            // It was not to run there at first, and came back.
            || self.known_at(unit, since).is_some_and(|known| self.is_otherwise(before, known))
            || self.is_fenced(before, at)
            || self.is_moved_by_machines(run, since, at)
            || self.may_be_unseen(unit, host, since, at)
    }

    /// Whether a server said, of the unit of a run, that it is not to run there, or not from that file.
    fn is_told_otherwise(&self, run: &Run, since: Millis, at: Millis) -> bool {
        self.told(&run.unit, since, at + LAG).any(|known| self.is_otherwise(run, known))
    }

    /// Whether this says of the unit of a run that it is not to run there, or not from that file.
    fn is_otherwise(&self, run: &Run, known: Option<&Known>) -> bool {
        let hash = self.file_of_run(run).map(|(hash, _)| hash);
        let global = self.file_of_run(run).is_some_and(|(_, file)| file.global);
        known.is_none_or(|known| {
            (known.machine != Some(run.host) && !global)
                || known.desired != "launched"
                || hash.is_none_or(|hash| hash != known.hash)
        })
    }

    /// What servers told of a unit in this time, and what each told first after a time in which it told nothing.
    fn told(&self, unit: &str, since: Millis, until: Millis) -> impl Iterator<Item = Option<&'h Known>> {
        let seen: &[&Seen] = self.seen.get(unit).map_or(&[], Vec::as_slice);
        let servers: BTreeSet<usize> = seen.iter().map(|seen| seen.server).collect();
        let late = servers.into_iter().filter(|server| !self.is_watched_by(*server, since, until));
        let late =
            late.filter_map(|server| seen.iter().find(|seen| seen.server == server && seen.at > until));
        let within = seen.iter().filter(|seen| (since..=until).contains(&seen.at));
        let told: Vec<_> = within.chain(late).map(|seen| seen.state.as_ref()).collect();
        told.into_iter()
    }

    /// What servers told of a unit last before this time.
    fn known_at(&self, unit: &str, at: Millis) -> Option<Option<&'h Known>> {
        let seen = self.seen.get(unit)?.iter().rfind(|seen| seen.at <= at)?;
        Some(seen.state.as_ref())
    }

    /// Whether there was an event stream of a server all the time.
    fn is_watched_by(&self, server: usize, since: Millis, until: Millis) -> bool {
        self.streams.iter().any(|stream| {
            stream.server == server && stream.start <= since && stream.end.is_none_or(|end| end >= until)
        })
    }

    fn is_watched(&self, since: Millis, until: Millis) -> bool {
        let servers: BTreeSet<usize> = self.streams.iter().map(|stream| stream.server).collect();
        servers.into_iter().any(|server| self.is_watched_by(server, since, until))
    }

    /// Whether a unit may have been placed elsewhere, and back, without that anybody watched.
    fn may_be_unseen(&self, unit: &str, host: usize, since: Millis, at: Millis) -> bool {
        !self.is_watched(since, at)
            && (self.may_be_lost(host, since, at) || self.may_not_fit(unit, since, at))
    }

    /// Whether a machine may have been away for its TTL, as far as servers know.
    fn may_be_lost(&self, host: usize, since: Millis, at: Millis) -> bool {
        self.faults_on(host).any(|fault| {
            matches!(fault.kind, FaultKind::Silent | FaultKind::Down)
                && self.matters(fault, at)
                && fault.end.is_none_or(|end| end + 2 * self.ttl + LAG >= since)
        })
    }

    /// Whether a command may have made a unit not fit where it was.
    fn may_not_fit(&self, unit: &str, since: Millis, at: Millis) -> bool {
        let choosy = self.files_of(unit).any(|file| file.choosy);
        self.commands.iter().any(|command| {
            let moves = matches!(command.effect, Effect::Machines) || choosy;
            let refused = matches!(command.outcome, Outcome::Refused(_));
            moves && !refused && self.is_within(command, since.saturating_sub(DRAIN).max(self.rest(at)), at)
        })
    }

    /// Global units are where they fit; nobody tells of that.
    fn is_moved_by_machines(&self, run: &Run, since: Millis, at: Millis) -> bool {
        self.files_of(&run.unit).any(|file| file.global) && self.may_not_fit(&run.unit, since, at)
    }

    fn is_fenced(&self, run: &Run, at: Millis) -> bool {
        self.file_of_run(run).is_some_and(|(_, file)| file.stops)
            && self.faults_on(run.host).any(|fault| {
                !matches!(fault.kind, FaultKind::Kills)
                    && self.matters(fault, at)
                    && fault.end.is_none_or(|end| end + self.ttl + LAG >= at)
            })
    }

    fn check_moves(&self, found: &mut Found) {
        let mut last: BTreeMap<(usize, &str), &Seen> = BTreeMap::new();
        for seen in &self.history.seen {
            let Some(before) = last.insert((seen.server, &seen.unit), seen) else { continue };
            let (Some(was), Some(is)) = (&before.state, &seen.state) else { continue };
            let Some(from) = was.machine.filter(|from| is.machine != Some(*from)) else { continue };
            let meant = was.desired != "inactive" && is.desired != "inactive" && was.hash == is.hash;
            let since = before.at.saturating_sub(LAG).max(self.rest(seen.at));
            if meant
                && !self.may_be_lost(from, since, seen.at)
                && !self.may_not_fit(&seen.unit, since, seen.at)
                && !self
                    .about(&seen.unit)
                    .any(|command| command.takes_off(&is.hash) && self.is_within(command, since, seen.at))
            {
                let what = format!("{} was taken from host {from}, which was there", seen.unit);
                found.push(Violation { check: "G2", at: seen.at, what });
            }
        }
    }

    // ---- G4

    fn check_copies(&self, found: &mut Found) {
        let stops = |run: &&Run| self.file_of_run(run).is_some_and(|(_, file)| file.stops && !file.global);
        let mut runs: BTreeMap<&str, Vec<&Run>> = BTreeMap::new();
        for run in self.runs.iter().filter(stops) {
            runs.entry(&run.unit).or_default().push(run);
        }
        for (unit, mut runs) in runs {
            runs.sort_by_key(|run| run.start);
            for (index, first) in runs.iter().enumerate() {
                let end = self.end_of(first);
                let others = runs[index + 1..].iter().filter(|other| other.host != first.host);
                for other in others.filter(|other| end.is_none_or(|end| other.start < end)) {
                    let at = other.start;
                    let until = [end, self.end_of(other)].into_iter().flatten().min();
                    let took = until.map(|until| until.saturating_sub(at));
                    // Two machines that are both there may overlap for a moment while a unit moves between them.
                    let given_up = [first.host, other.host].iter().any(|host| {
                        self.faults.iter().any(|fault| {
                            fault.host == Some(*host)
                                && matches!(fault.kind, FaultKind::Silent | FaultKind::Down)
                                && fault.start <= at
                                && fault.end.is_none_or(|end| end + LAG >= at)
                        })
                    });
                    let near = at.saturating_sub(LAG).max(self.rest(at));
                    let moved = self.about(unit).any(|command| self.is_within(command, near, at))
                        || self.may_not_fit(unit, near, at);
                    if took.is_some_and(|took| took < LAG) && (!given_up || moved) {
                        continue;
                    }
                    let took = took.map_or("to the end".into(), |took| format!("for {:.2} s", seconds(took)));
                    let what = format!(
                        "{unit} has OnIsolation=stop and ran on hosts {} and {} at a time, {took}",
                        first.host, other.host
                    );
                    found.push(Violation { check: "G4", at, what });
                }
            }
        }
    }

    // ---- in the end

    /// What is not as it is to be when nothing is broken any more.
    fn check_end(&self, end: &End, found: &mut Found) {
        let mut violate = |check, what| found.push(Violation { check, at: end.at, what });
        for host in (0..self.machines.len()).filter(|host| !end.present.contains(host)) {
            violate("G3", format!("host {host} is not there"));
        }
        let mut known: BTreeMap<&str, &Known> = BTreeMap::new();
        for (unit, state) in &end.units {
            if known.insert(unit, state).is_some() {
                violate("G4", format!("{unit} is there twice"));
            }
        }
        for (unit, state) in &known {
            let global = self.files.get(&state.hash).is_some_and(|file| file.global);
            let placed = state.machine.is_some() || global;
            if state.desired == "inactive" && state.machine.is_some() {
                violate("G3", format!("{unit} is still on the schedule"));
            }
            if state.desired != "inactive" && !placed && !end.reasons.contains_key(*unit) {
                violate("G3", format!("{unit} is nowhere and nothing says why"));
            }
        }
        let units: BTreeSet<&str> =
            self.commands.iter().filter_map(|command| command.effect.unit()).collect();
        for unit in units.into_iter().chain(known.keys().copied()).collect::<BTreeSet<_>>() {
            let nobody = BTreeMap::new();
            let actual = end.actual.get(unit).unwrap_or(&nobody);
            self.check_unit(end, unit, known.get(unit).copied(), actual, &mut violate);
            let nothing = BTreeMap::new();
            let reported = end.reported.get(unit).unwrap_or(&nothing);
            for host in (0..self.machines.len()).filter(|host| end.present.contains(host)) {
                let actual = actual.get(&host).map(|actual| &actual.states);
                if reported.get(&host) != actual {
                    let reported = reported.get(&host);
                    violate(
                        "states",
                        format!("{unit} on host {host} is {actual:?} and is reported as {reported:?}"),
                    );
                }
            }
        }
        let mut writes = Found::new();
        let units: BTreeSet<&str> =
            self.commands.iter().filter_map(|command| command.effect.unit()).collect();
        for unit in units {
            self.check_known(unit, known.get(unit).copied(), end.revision, end.at, &mut writes);
        }
        found.extend(writes);
    }

    /// A unit is where it is to be, as it is to be, and nowhere else.
    fn check_unit(
        &self,
        end: &End,
        unit: &str,
        known: Option<&Known>,
        actual: &BTreeMap<usize, Actual>,
        violate: &mut dyn FnMut(&'static str, String),
    ) {
        let global = known.and_then(|known| self.files.get(&known.hash)).is_some_and(|file| file.global);
        for (host, there) in actual {
            let wanted =
                known.filter(|known| known.desired != "inactive" && (known.machine == Some(*host) || global));
            let Some(wanted) = wanted else {
                let place = known.map(|known| known.machine);
                violate(
                    "G4",
                    format!("{unit} is on host {host} ({}), and is to be on {place:?}", there.states.active),
                );
                continue;
            };
            if there.hash.as_deref() != Some(wanted.hash.as_str()) {
                violate(
                    "G3",
                    format!("{unit} on host {host} has the file {:?}, not {}", there.hash, wanted.hash),
                );
            }
            let live = there.states.is_live();
            let settled = matches!(there.states.active.as_str(), "active" | "inactive" | "failed");
            let last = self.runs.iter().filter(|run| run.unit == unit && run.host == *host);
            let last = last.max_by_key(|run| run.start);
            if wanted.desired == "loaded" && live {
                violate(
                    "G3",
                    format!("{unit} on host {host} is {} and is to be loaded", there.states.active),
                );
            }
            if wanted.desired == "launched" {
                let ended = last.is_some_and(|run| {
                    run.stop.is_some_and(|stop| {
                        self.file_of_run(run).is_some_and(|(_, file)| file.ends)
                            || self.faults_on(*host).any(|fault| {
                                fault.kind == FaultKind::Kills
                                    && fault.start <= stop
                                    && fault.end.is_none_or(|end| stop <= end + LAG)
                            })
                    })
                });
                if !settled || (!live && !ended) {
                    violate("G3", format!("{unit} on host {host} is {} and is to run", there.states.active));
                }
                let from = last.and_then(|run| self.file_of_run(run)).map(|(hash, _)| hash);
                if from.is_some_and(|from| from != wanted.hash) {
                    violate("G3", format!("{unit} on host {host} was started from another file than it has"));
                }
            }
        }
        let everywhere = known.filter(|known| known.desired != "inactive" && global);
        if everywhere.is_some_and(|known| self.files.get(&known.hash).is_some_and(|file| !file.choosy)) {
            for host in end.present.iter().filter(|host| !actual.contains_key(host)) {
                violate("G3", format!("{unit} is global and is not on host {host}"));
            }
        }
        if let Some(host) = known.filter(|known| known.desired != "inactive").and_then(|known| known.machine)
            && !actual.contains_key(&host)
            && end.present.contains(&host)
        {
            violate("G3", format!("{unit} is not on host {host}, where it is to be"));
        }
    }

    // ---- what the checks ask

    /// The file that a run was started from, with its hash.
    fn file_of_run(&self, run: &Run) -> Option<(&'h str, &'h File)> {
        let file = self.history.files.iter().find(|(_, file)| file.marker == run.marker)?;
        Some((file.0, file.1))
    }

    /// The files that a unit may have had.
    fn files_of(&self, unit: &str) -> impl Iterator<Item = &'h File> {
        let files = &self.history.files;
        self.about(unit).filter_map(|command| match &command.effect {
            Effect::Put { file: Some(file), .. } => files.get(file),
            _ => None,
        })
    }

    /// When a run was over, at the latest; for one that lost its power, the earliest that this may have been. `None`: it goes on.
    fn end_of(&self, run: &Run) -> Option<Millis> {
        let down = self.faults.iter().filter(|fault| {
            fault.kind == FaultKind::Down
                && fault.host == Some(run.host)
                && fault.end.is_none_or(|end| end >= run.start)
        });
        run.stop.or_else(|| down.map(|fault| fault.start.max(run.start)).min())
    }

    /// Faults that a machine may notice.
    fn faults_on(&self, host: usize) -> impl Iterator<Item = &'h Fault> {
        self.history.faults.iter().filter(move |fault| fault.host.is_none_or(|on| on == host))
    }

    /// When a command was carried out, if ever, at the latest. That of an unknown one may come at any time, but not after a rest: who
    /// had it under way has done it by then or is gone.
    fn over(&self, command: &Command) -> Option<Millis> {
        match command.outcome {
            Outcome::Unknown(_) => {
                let end = command.end?;
                self.rests.iter().copied().filter(|rest| *rest >= end).min()
            }
            _ => command.end,
        }
    }

    /// Whether a command may have been carried out within this time.
    fn is_within(&self, command: &Command, since: Millis, until: Millis) -> bool {
        command.start <= until && self.over(command).is_none_or(|over| over >= since)
    }

    /// When all was at rest last; 0 if it never was.
    fn rest(&self, at: Millis) -> Millis {
        self.rests.iter().copied().filter(|rest| *rest <= at).max().unwrap_or(0)
    }

    /// Whether a fault can still matter at some time.
    fn matters(&self, fault: &Fault, at: Millis) -> bool {
        fault.start <= at && fault.end.is_none_or(|end| end >= self.rest(at))
    }

    /// The time from which what was true may have come to be carried out on a host only then.
    fn reach(&self, host: usize, at: Millis) -> Millis {
        self.delays(host, at).max(self.rest(at))
    }

    /// The same, as if it never was at rest.
    fn delays(&self, host: usize, at: Millis) -> Millis {
        let mut reach = at.saturating_sub(LAG);
        loop {
            let earlier = self
                .faults_on(host)
                .filter(|fault| fault.start < reach && fault.end.is_none_or(|end| end + LAG >= reach));
            let Some(earliest) = earlier.map(|fault| fault.start.saturating_sub(LAG)).min() else {
                return reach;
            };
            if earliest >= reach {
                return reach;
            }
            reach = earliest;
        }
    }
}

impl Command {
    /// Whether it may take a unit with this file off its machine.
    fn takes_off(&self, hash: &str) -> bool {
        match &self.effect {
            Effect::Put { file, desired, .. } => {
                desired == "inactive" || file.as_deref().is_some_and(|to| to != hash)
            }
            _ => true,
        }
    }
}

/// What a command makes of a unit's file, and whether it does so in any case.
fn file_of(effect: &Effect) -> Option<(Value<'_>, bool)> {
    match effect {
        Effect::Put { file: Some(file), only_if_new, .. } => Some((Some(file), !only_if_new)),
        Effect::Destroy { .. } => Some((None, true)),
        _ => None,
    }
}

/// The same for its desired state.
fn desired_of(effect: &Effect) -> Option<(Value<'_>, bool)> {
    match effect {
        Effect::Put { desired, .. } => Some((Some(desired), true)),
        Effect::Destroy { .. } => Some((None, true)),
        Effect::Machines => None,
    }
}
