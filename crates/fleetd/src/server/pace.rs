//! When a machine's states are written to the registry.
//!
//! Many changes are to become few writes, and yet nobody who waits for one change should wait for the clock. So:
//!
//! - while many units are on their way to what is wanted of them, states are written now and then, and less often the longer that
//!   takes: a start of a thousand units is a handful of writes;
//! - as soon as all are where they should be, or can't get there, states are written at once;
//! - so is each step of a unit that was asked for by itself, or with few others, whatever else is going on;
//! - but a unit that changes again and again uses up its turns, and then waits for others or for the clock: a flapping unit
//!   is no flood of writes, and does not delay the others.

use fleet_cluster::model::{DesiredState, UnitReport};
use fleet_link::Instruction;
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// A unit may cause so many writes at once …
const TURNS: u32 = 20;
/// … and gets one more after this time.
const TURN: Duration = Duration::from_millis(500);
/// With no more than so many units on their way each step of theirs is shown.
const FEW: usize = 3;
/// While many are on their way the time between writes doubles up to so many steps.
const SLOWEST: u32 = 4;
/// Units whose turns are remembered; those that have all of theirs are forgotten.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
struct Turns {
    left: u32,
    since: Instant,
}

impl Turns {
    fn earn(&mut self, now: Instant) {
        let earned = now.duration_since(self.since).as_millis() / TURN.as_millis();
        if let Ok(earned) = u32::try_from(earned) {
            self.left = self.left.saturating_add(earned).min(TURNS);
            self.since += TURN * earned;
        } else {
            *self = Turns { left: TURNS, since: now };
        }
    }
}

/// How many units on their way are written of.
#[derive(Debug)]
struct Bulk {
    next: Instant,
    step: Duration,
}

/// What a session remembers of its writes.
#[derive(Debug)]
pub(super) struct Pace {
    /// How often states are written while many units are on their way.
    step: Duration,
    on_the_way: BTreeSet<UnitName>,
    /// Units of which something was wanted by itself, or with few others, and that were on their way at the last write.
    alone: BTreeSet<UnitName>,
    /// Many units are on their way, or were at the last write.
    bulk: Option<Bulk>,
    /// Units that changed since the last write.
    changed: BTreeSet<UnitName>,
    turns: BTreeMap<UnitName, Turns>,
    /// Not before then, after a failure.
    not_before: Option<Instant>,
}

impl Pace {
    pub(super) fn new(step: Duration) -> Self {
        Pace {
            step,
            on_the_way: BTreeSet::new(),
            alone: BTreeSet::new(),
            bulk: None,
            changed: BTreeSet::new(),
            turns: BTreeMap::new(),
            not_before: None,
        }
    }

    /// Looks at a unit of which something changed: what is wanted of it, or what is reported (`reported`).
    pub(super) fn note(
        &mut self,
        name: &UnitName,
        told: Option<&Instruction>,
        report: Option<&UnitReport>,
        reported: bool,
    ) {
        if is_there(told, report) {
            self.on_the_way.remove(name);
        } else {
            self.on_the_way.insert(name.clone());
        }
        if reported {
            self.changed.insert(name.clone());
        }
    }

    /// Notes that something else is wanted of these units, all at the same time.
    pub(super) fn asked<'a>(&mut self, names: impl ExactSizeIterator<Item = &'a UnitName>) {
        let few = names.len() <= FEW;
        for name in names {
            if few {
                self.alone.insert(name.clone());
            } else {
                self.alone.remove(name);
            }
        }
    }

    /// When what changed may be written.
    pub(super) fn next(&mut self, now: Instant) -> Instant {
        if self.on_the_way.len() > FEW && self.bulk.is_none() {
            self.bulk = Some(Bulk { next: now + self.step, step: self.step });
        }
        let in_bulk = self.bulk.as_ref().filter(|_| !self.on_the_way.is_empty()).map(|bulk| bulk.next);
        let Pace { changed, alone, turns, .. } = self;
        let counts = |name: &&UnitName| in_bulk.is_none() || is_urgent(alone, name);
        let mut names = changed.iter().filter(counts).peekable();
        let mut at = now;
        if names.peek().is_none() {
            at = at.max(in_bulk.unwrap_or(now));
        } else {
            // One unit that still has a turn is enough: the others come along.
            let mut soonest = in_bulk;
            for name in names {
                let turn = match turns.get_mut(name) {
                    None => now,
                    Some(turns) => {
                        turns.earn(now);
                        if turns.left > 0 { now } else { turns.since + TURN }
                    }
                };
                soonest = Some(soonest.map_or(turn, |soonest: Instant| soonest.min(turn)));
                if turn <= now {
                    break;
                }
            }
            at = at.max(soonest.unwrap_or(now));
        }
        at.max(self.not_before.unwrap_or(now))
    }

    /// States were written.
    pub(super) fn wrote(&mut self, now: Instant) {
        // Bulk work is paced by the clock, not by turns.
        let few = self.on_the_way.len() <= FEW && self.changed.len() <= FEW;
        for name in self.changed.iter().filter(|name| few || is_urgent(&self.alone, name)) {
            let turns = self.turns.entry(name.clone()).or_insert(Turns { left: TURNS, since: now });
            turns.earn(now);
            turns.left = turns.left.saturating_sub(1);
        }
        self.bulk = self.bulk.take().filter(|_| self.on_the_way.len() > FEW).map(|bulk| {
            let step = (bulk.step * 2).min(self.step * SLOWEST);
            Bulk { next: now + step, step }
        });
        self.alone.retain(|name| self.on_the_way.contains(name));
        if self.turns.len() > REMEMBERED {
            self.turns.retain(|_, turns| {
                turns.earn(now);
                turns.left < TURNS
            });
        }
        self.changed.clear();
        self.not_before = None;
    }

    /// States could not be written.
    pub(super) fn failed(&mut self, until: Instant) {
        self.not_before = Some(until);
    }
}

/// Whether somebody waits for a unit, though many others are on their way. Where many are asked for one by one, these are many, too.
fn is_urgent(alone: &BTreeSet<UnitName>, name: &UnitName) -> bool {
    alone.len() <= FEW && alone.contains(name)
}

/// Whether a unit is what it should be, or can't become it.
fn is_there(told: Option<&Instruction>, report: Option<&UnitReport>) -> bool {
    let wanted = match told {
        Some(Instruction::Leave) => return true,
        Some(Instruction::Hold(wanted)) => Some(wanted),
        Some(Instruction::Release(_)) | None => None,
    };
    match (wanted, report) {
        (None, None) => true,
        (None, Some(report)) => report.problem.is_some(),
        (Some(_), None) => false,
        (Some(wanted), Some(report)) => {
            let passing =
                matches!(report.systemd.active.as_str(), "activating" | "deactivating" | "reloading");
            let reached = match wanted.state {
                DesiredState::Launched => report.current == DesiredState::Launched,
                _ => report.current != DesiredState::Inactive,
            };
            report.problem.is_some() || (report.hash == wanted.file.hash() && reached && !passing)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_cluster::model::{SystemdState, Wanted};
    use fleet_unit::UnitFile;

    const STEP: Duration = Duration::from_secs(1);

    fn name(number: usize) -> UnitName {
        UnitName::parse(&format!("u{number}.service")).unwrap()
    }

    fn file() -> UnitFile {
        UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap()
    }

    fn wanted() -> Instruction {
        Instruction::Hold(Wanted { file: file(), state: DesiredState::Launched })
    }

    fn report(active: &str) -> UnitReport {
        let systemd = SystemdState { load: "loaded".into(), active: active.into(), sub: "x".into() };
        UnitReport { current: DesiredState::Launched, hash: file().hash(), systemd, problem: None }
    }

    #[test]
    fn one_unit_is_written_at_each_step() {
        let now = Instant::now();
        let mut pace = Pace::new(STEP);
        for active in ["activating", "active"] {
            pace.note(&name(1), Some(&wanted()), Some(&report(active)), true);
            assert_eq!(pace.next(now), now);
            pace.wrote(now);
        }
    }

    #[test]
    fn many_units_are_written_now_and_then_and_at_the_end() {
        let now = Instant::now();
        let mut pace = Pace::new(STEP);
        for number in 0..100 {
            pace.note(&name(number), Some(&wanted()), None, false);
        }
        pace.note(&name(0), Some(&wanted()), Some(&report("activating")), true);
        assert_eq!(pace.next(now), now + STEP);
        let mut written = Vec::new();
        for number in 0..100 {
            pace.note(&name(number), Some(&wanted()), Some(&report("active")), true);
            let now = now + Duration::from_millis(100) * u32::try_from(number).unwrap();
            if pace.next(now) <= now {
                pace.wrote(now);
                written.push(number);
            }
        }
        // After one, two, four seconds, and when the last is there.
        assert_eq!(written, [10, 30, 70, 99]);
    }

    #[test]
    fn who_asks_for_one_unit_does_not_wait_for_many() {
        let now = Instant::now();
        let mut pace = Pace::new(STEP);
        let many: Vec<_> = (0..100).map(name).collect();
        pace.asked(many.iter());
        for name in &many {
            pace.note(name, Some(&wanted()), Some(&report("activating")), true);
        }
        assert_eq!(pace.next(now), now + STEP);
        pace.asked([name(500)].iter());
        pace.note(&name(500), Some(&wanted()), None, false);
        assert_eq!(pace.next(now), now + STEP, "nothing is known of it yet");
        for active in ["activating", "active"] {
            pace.note(&name(500), Some(&wanted()), Some(&report(active)), true);
            assert_eq!(pace.next(now), now, "{active}");
            pace.wrote(now);
        }
        // Others that ask for many one by one are many, too.
        for number in 600..600 + FEW + 1 {
            pace.asked([name(number)].iter());
            pace.note(&name(number), Some(&wanted()), Some(&report("activating")), true);
        }
        assert!(pace.next(now) > now);
        // The last ones are not waited for without end when others settle.
        let later = now + STEP * SLOWEST;
        for number in 0..98 {
            pace.note(&name(number), Some(&wanted()), Some(&report("active")), true);
        }
        for number in 600..600 + FEW + 1 {
            pace.note(&name(number), Some(&wanted()), Some(&report("active")), true);
        }
        assert_eq!(pace.next(later), later);
        pace.wrote(later);
        pace.note(&name(99), Some(&wanted()), Some(&report("active")), true);
        assert_eq!(pace.next(later), later, "the last few are few");
    }

    #[test]
    fn a_flapping_unit_waits_and_another_does_not() {
        let now = Instant::now();
        let mut pace = Pace::new(STEP);
        let mut writes = 0;
        for _ in 0..1000 {
            for active in ["failed", "active"] {
                pace.note(&name(1), Some(&wanted()), Some(&report(active)), true);
                if pace.next(now) <= now {
                    pace.wrote(now);
                    writes += 1;
                }
            }
        }
        assert_eq!(writes, TURNS);
        assert_eq!(pace.next(now), now + TURN, "one more a while later");
        pace.note(&name(2), Some(&wanted()), Some(&report("active")), true);
        assert_eq!(pace.next(now), now);
        pace.wrote(now);
        let later = now + TURN * 3;
        pace.note(&name(1), Some(&wanted()), Some(&report("failed")), true);
        assert_eq!(pace.next(later), later);
    }

    #[test]
    fn what_cannot_be_is_not_waited_for() {
        let now = Instant::now();
        let mut pace = Pace::new(STEP);
        for number in 0..10 {
            let problem = Some("no such program".to_owned());
            let failed = UnitReport { problem, ..report("failed") };
            pace.note(&name(number), Some(&wanted()), Some(&failed), true);
        }
        pace.wrote(now);
        pace.note(&name(3), None, None, true);
        assert_eq!(pace.next(now), now);
        pace.failed(now + STEP);
        assert_eq!(pace.next(now), now + STEP);
    }
}
