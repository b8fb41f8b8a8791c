//! When a machine's states are written to the registry.
//!
//! Many changes are to become few writes, and yet nobody who waits for one change should wait for the clock. So:
//!
//! - while units are on their way to what is wanted of them, states are written now and then;
//! - as soon as all are where they should be, or can't get there, states are written at once;
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

/// What a session remembers of its writes.
#[derive(Debug)]
pub(super) struct Pace {
    /// How often states are written while many units are on their way.
    step: Duration,
    on_the_way: BTreeSet<UnitName>,
    /// Units that changed since the last write.
    changed: BTreeSet<UnitName>,
    turns: BTreeMap<UnitName, Turns>,
    last: Option<Instant>,
    /// Not before then, after a failure.
    not_before: Option<Instant>,
}

impl Pace {
    pub(super) fn new(step: Duration) -> Self {
        Pace {
            step,
            on_the_way: BTreeSet::new(),
            changed: BTreeSet::new(),
            turns: BTreeMap::new(),
            last: None,
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

    /// When what changed may be written.
    pub(super) fn next(&mut self, now: Instant) -> Instant {
        let mut at = now;
        if self.on_the_way.len() > FEW {
            at = at.max(self.last.map_or(now, |last| last + self.step));
        } else if !self.changed.is_empty() {
            // One unit that still has a turn is enough: the others come along.
            let mut soonest = None;
            for name in &self.changed {
                let turn = match self.turns.get_mut(name) {
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
        if self.on_the_way.len() <= FEW && self.changed.len() <= FEW {
            for name in &self.changed {
                let turns = self.turns.entry(name.clone()).or_insert(Turns { left: TURNS, since: now });
                turns.earn(now);
                turns.left = turns.left.saturating_sub(1);
            }
        }
        if self.turns.len() > REMEMBERED {
            self.turns.retain(|_, turns| {
                turns.earn(now);
                turns.left < TURNS
            });
        }
        self.changed.clear();
        self.last = Some(now);
        self.not_before = None;
    }

    /// States could not be written.
    pub(super) fn failed(&mut self, until: Instant) {
        self.not_before = Some(until);
    }
}

/// Whether a unit is what it should be, or can't become it.
fn is_there(told: Option<&Instruction>, report: Option<&UnitReport>) -> bool {
    let wanted = match told {
        Some(Instruction::Leave) => return true,
        Some(Instruction::Hold(wanted)) => Some(wanted),
        None => None,
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
        assert_eq!(pace.next(now), now);
        pace.wrote(now);
        let mut writes = 1;
        for number in 0..100 {
            pace.note(&name(number), Some(&wanted()), Some(&report("active")), true);
            let now = now + Duration::from_millis(10) * u32::try_from(number).unwrap();
            if pace.next(now) <= now {
                pace.wrote(now);
                writes += 1;
            }
        }
        assert_eq!(pace.next(now + STEP), now + STEP);
        assert!(writes <= 1 + FEW + 1, "{writes}");
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
