//! machine drain: marks a machine to be drained, and tells how its units move away until nothing more will.
//!
//! The server says which units are on the machine and which of them have nowhere to go; its events say when that may have changed.
use super::machine::{choose, no_such_machine, refused};
use crate::cli::DrainMachine;
use crate::context::{Context, print_line};
use crate::wait::progress::Progress;
use crate::wait::tracker::{Goal, Source, Verdict, judge};
use crate::wait::{Feed, News, reasons_in_words};
use anyhow::Result;
use fleet_api::client::{Error, MachineMark};
use fleet_api::events::{Event, UnitEvent};
use fleet_api::types::{Drain, Reason};
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep_until;

/// The exit code after Ctrl-C, as shells have it.
const INTERRUPTED: i32 = 130;

/// How far a drain has come is asked when something changed, but not more often than this, and only after so many times as long as
/// the last answer took: on a machine with very many units that takes the server a while.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);
const LOOK_SHARE: u32 = 5;

/// A safety net: asked so often also when nothing changes.
const SILENT_LOOK: Duration = Duration::from_secs(10);

/// How many units a message lists.
const UNITS: usize = 20;

/// What has become of a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// It is on the machine, or on its way.
    Underway,
    /// It is up on this machine.
    Moved(String),
    /// It was moved to this machine, and did not come up there.
    Failed(String, String),
    /// Nobody wants it on a machine any more.
    Dropped,
}

/// The units that were on the machine.
#[derive(Debug, Default)]
struct Moves {
    from: String,
    units: BTreeMap<String, Fate>,
    /// Units that have nowhere to go.
    stuck: BTreeMap<String, Vec<Reason>>,
}

impl Moves {
    /// Takes in what the server says of the machine; whether that names units that were not known.
    fn look(&mut self, drain: &Drain) -> bool {
        self.stuck = drain.undrained.iter().map(|left| (left.name.clone(), left.reasons.clone())).collect();
        let before = self.units.len();
        let there = drain.stopping.iter().chain(&drain.to_move);
        for name in there.chain(drain.undrained.iter().map(|left| &left.name)) {
            // One that came back is on the machine again.
            self.units.insert(name.clone(), Fate::Underway);
        }
        self.units.len() > before
    }

    /// Takes an event in; the unit whose fate it decides.
    fn take(&mut self, event: &Event) -> Option<(String, Fate)> {
        let (name, fate) = match event {
            Event::Unit(event) => (&event.explanation.name, fate(&self.from, event)),
            Event::UnitGone { name } => (name, Fate::Dropped),
            _ => return None,
        };
        let known = self.units.get_mut(name)?;
        if *known == fate {
            return None;
        }
        *known = fate.clone();
        (fate != Fate::Underway).then(|| (name.clone(), fate))
    }

    /// Whether nothing more will happen by itself: `drain` says what is left there.
    fn is_over(&self, drain: &Drain) -> bool {
        let mut underway = self.units.iter().filter(|(_, fate)| **fate == Fate::Underway);
        drain.stopping.is_empty()
            && drain.to_move.is_empty()
            && underway.all(|(name, _)| self.stuck.contains_key(name))
    }

    fn names(&self) -> Vec<String> {
        self.units.keys().cloned().collect()
    }

    fn count(&self, which: impl Fn(&Fate) -> bool) -> usize {
        self.units.values().filter(|fate| which(fate)).count()
    }

    /// The units that are still on the machine or on their way, with what is known of why.
    fn left(&self) -> impl Iterator<Item = (&String, Option<&Vec<Reason>>)> {
        let left = self.units.iter().filter(|(_, fate)| **fate == Fate::Underway);
        left.map(|(name, _)| (name, self.stuck.get(name)))
    }
}

/// What has become of a unit that was on a machine.
fn fate(from: &str, event: &UnitEvent) -> Fate {
    let it = &event.explanation;
    let goal = match it.desired_state.as_str() {
        "launched" => Goal::Launched,
        "loaded" => Goal::Loaded,
        _ => return Fate::Dropped,
    };
    if !event.known || event.global {
        return Fate::Dropped;
    }
    if it.machine_id.is_empty() || it.machine_id == from {
        return Fate::Underway;
    }
    match judge(goal, Source::Events, event, false) {
        None => Fate::Underway,
        Some(Verdict::Reached { machine_id, .. }) => Fate::Moved(machine_id),
        Some(Verdict::Failed { why, machine_id, .. }) => Fate::Failed(machine_id, why),
    }
}

/// How the waiting ended.
enum End {
    Over,
    Late,
    /// The mark was taken away.
    Ended,
    Interrupted,
    Lost(Error),
}

pub(crate) async fn run(context: &Context, args: &DrainMachine) -> Result<i32> {
    let (id, place) = match choose(context, &args.machine).await {
        Ok(chosen) => chosen,
        Err(code) => return Ok(code),
    };
    let before = format!("Error draining machine {place}: ");
    // Looked at before, too: of what moves at once some is elsewhere already when the mark is answered.
    let held = match context.client.drain(&id).await {
        Ok(Some(drain)) => drain,
        Ok(None) => return no_such_machine(&place),
        Err(error) => return Ok(refused(context, &before, &error)),
    };
    match context.client.mark_machine(&id, MachineMark::Drain, true).await {
        Ok(true) => {}
        Ok(false) => return no_such_machine(&place),
        Err(error) => return Ok(refused(context, &before, &error)),
    }
    if args.no_block {
        context.say(&format!("Triggered drain of machine {place}"))?;
        context.finish()?;
        return Ok(0);
    }
    let drain = match context.client.drain(&id).await {
        Ok(Some(drain)) => drain,
        Ok(None) => return no_such_machine(&place),
        Err(error) => return Ok(refused(context, &before, &error)),
    };
    let mut moves = Moves { from: id.clone(), ..Moves::default() };
    moves.look(&held);
    moves.look(&drain);
    let deadline = args.deadline.map(|after| Instant::now() + after);
    let end = follow(context, &mut moves, drain, &place, deadline).await?;
    let code = report(context, &moves, &end, &place, args.deadline).await?;
    context.finish()?;
    Ok(code)
}

async fn follow(
    context: &Context,
    moves: &mut Moves,
    mut drain: Drain,
    place: &str,
    deadline: Option<Instant>,
) -> Result<End> {
    let mut feed = Feed::new(context, moves.names()).with_machines();
    let mut progress = Progress::new();
    let mut interrupts = signal(SignalKind::interrupt())?;
    let mut next_look = Instant::now() + BETWEEN_LOOKS;
    let mut changed = false;
    while !moves.is_over(&drain) {
        progress.show(&line(moves, &drain, place), false);
        let look = if changed { next_look } else { next_look + SILENT_LOOK };
        let late = async {
            match deadline {
                Some(deadline) => sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = interrupts.recv() => return Ok(End::Interrupted),
            () = late => return Ok(End::Late),
            () = sleep_until(look.into()) => {
                let asked = Instant::now();
                // An answer that does not come will be missed by the feed, too, which knows how long to try.
                if let Ok(Some(answer)) = context.client.drain(&moves.from).await {
                    if !answer.draining {
                        return Ok(End::Ended);
                    }
                    drain = answer;
                    if moves.look(&drain) {
                        feed = Feed::new(context, moves.names()).with_machines();
                    }
                }
                changed = false;
                next_look = Instant::now() + BETWEEN_LOOKS.max(asked.elapsed() * LOOK_SHARE);
            }
            news = feed.next() => match news {
                News::Begin(_) => changed = true,
                News::Trouble(error) => {
                    let text = format!("Lost contact with fleetd, trying again: {}", error.reason());
                    progress.show(&text, true);
                }
                News::Lost(error) => return Ok(End::Lost(error)),
                News::Event(event) => {
                    changed = true;
                    if let Some((name, fate)) = moves.take(&event) {
                        progress.clear();
                        say(context, &name, &fate).await?;
                    }
                }
            },
        }
    }
    Ok(End::Over)
}

/// How far it is, in one line.
fn line(moves: &Moves, drain: &Drain, place: &str) -> String {
    let done = moves.count(|fate| *fate != Fate::Underway);
    let stuck = moves.stuck.len();
    let mut line = format!("Draining {place}: {done} of {} units moved", moves.units.len());
    if !drain.stopping.is_empty() {
        line.push_str(&format!(", {} stopping", drain.stopping.len()));
    }
    if stuck > 0 {
        line.push_str(&format!(", {stuck} with nowhere to go"));
    }
    line
}

/// Says what has become of a unit.
async fn say(context: &Context, name: &str, fate: &Fate) -> Result<()> {
    match fate {
        Fate::Underway => Ok(()),
        Fate::Moved(to) if context.json() => {
            context.remember(json!({"name": name, "moved": true, "machineID": to}));
            Ok(())
        }
        Fate::Moved(to) => print_line(&format!("Unit {name} moved to {}", context.legend(to).await)),
        Fate::Failed(on, why) => {
            if context.json() {
                context.remember(json!({"name": name, "moved": true, "machineID": on, "problem": why}));
            }
            eprintln!("Unit {name} failed on {}: {why}", context.legend(on).await);
            Ok(())
        }
        Fate::Dropped => context.say(&format!("Unit {name} is not wanted any more")),
    }
}

/// Says how it ended, and gives the exit code.
async fn report(
    context: &Context,
    moves: &Moves,
    end: &End,
    place: &str,
    deadline: Option<Duration>,
) -> Result<i32> {
    let left: Vec<_> = moves.left().collect();
    if context.json() {
        for (name, reasons) in &left {
            context.remember(json!({"name": name, "moved": false, "reasons": reasons}));
        }
    }
    let failed = moves.count(|fate| matches!(fate, Fate::Failed(..)));
    let undo = format!("fleetctl machine uncordon {}", &moves.from[..8.min(moves.from.len())]);
    let units = match left.len() {
        1 => "1 unit is".to_owned(),
        many => format!("{many} units are"),
    };
    match end {
        End::Over if left.is_empty() => {
            let moved = moves.count(|fate| matches!(fate, Fate::Moved(_)));
            let units = if moved == 1 { "unit" } else { "units" };
            context.say(&format!("Machine {place} is drained: {moved} {units} moved"))?;
            if failed > 0 {
                eprintln!("{failed} of its units did not come up elsewhere.");
            }
            return Ok(i32::from(failed > 0));
        }
        End::Over => eprintln!("Machine {place} is not drained: {units} left that can't go anywhere else:"),
        End::Late => {
            let after = deadline.unwrap_or_default().as_secs_f64();
            eprintln!("Machine {place} is not drained after {after} s: {units} left:");
        }
        End::Ended => eprintln!("The drain of machine {place} was ended meanwhile: {units} left:"),
        End::Interrupted => {
            eprintln!("Interrupted. The cluster goes on draining {place}; {undo} ends that.");
            return Ok(INTERRUPTED);
        }
        End::Lost(error) => {
            eprintln!(
                "Error waiting for the drain of machine {place}: lost contact with fleetd: {}",
                error.reason()
            );
            context.hint(error);
            return Ok(1);
        }
    }
    for (name, reasons) in left.iter().take(UNITS) {
        let why = match reasons {
            Some(reasons) if reasons.is_empty() => "no other machine is there".to_owned(),
            Some(reasons) => reasons_in_words(context, reasons).await,
            None => "on its way".to_owned(),
        };
        eprintln!("  {name}: {why}");
    }
    if left.len() > UNITS {
        eprintln!("  and {} more", left.len() - UNITS);
    }
    if !matches!(end, End::Ended) {
        eprintln!(
            "It goes on being drained: no unit comes, and those that can go later will. {undo} ends that."
        );
    }
    Ok(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_api::types::{Explanation, Undrained, UnitState};

    fn event(name: &str, machine: &str, desired: &str, current: &str, active: &str) -> Event {
        let explanation = Explanation {
            current_state: current.into(),
            desired_state: desired.into(),
            machine_id: machine.into(),
            name: name.into(),
            ..Explanation::default()
        };
        let state = UnitState {
            machine_id: machine.into(),
            systemd_active_state: active.into(),
            ..UnitState::default()
        };
        let states = if active.is_empty() { Vec::new() } else { vec![state] };
        Event::Unit(UnitEvent { known: true, explanation, states, ..UnitEvent::default() })
    }

    fn drain(stopping: &[&str], to_move: &[&str], undrained: &[&str]) -> Drain {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let reasons = vec![Reason { machine_id: "n".into(), reason: "it is full".into() }];
        let undrained =
            undrained.iter().map(|&name| Undrained { name: name.into(), reasons: reasons.clone() });
        Drain {
            draining: true,
            machine_id: "m".into(),
            stopping: names(stopping),
            to_move: names(to_move),
            undrained: undrained.collect(),
        }
    }

    #[test]
    fn units_are_followed_until_they_are_up_elsewhere() {
        let mut moves = Moves { from: "m".into(), ..Moves::default() };
        assert!(moves.look(&drain(&[], &["a", "b", "l"], &["c"])));
        assert!(!moves.is_over(&drain(&[], &["a", "b", "l"], &["c"])));
        for (machine, current, active) in [
            ("m", "launched", "active"),
            ("", "inactive", ""),
            ("n", "inactive", ""),
            ("n", "loaded", "activating"),
        ] {
            assert_eq!(
                moves.take(&event("a", machine, "launched", current, active)),
                None,
                "{machine} {current}"
            );
        }
        // Nothing is left there, but one is not up yet.
        assert!(!moves.is_over(&drain(&[], &[], &["c"])));
        let up = event("a", "n", "launched", "launched", "active");
        assert_eq!(moves.take(&up), Some(("a".into(), Fate::Moved("n".into()))));
        assert_eq!(moves.take(&up), None, "said once");
        let failed = event("b", "n", "launched", "launched", "failed");
        assert_eq!(moves.take(&failed).unwrap().1, Fate::Failed("n".into(), "it has failed".into()));
        let loaded = event("l", "n", "loaded", "loaded", "inactive");
        assert_eq!(moves.take(&loaded).unwrap().1, Fate::Moved("n".into()));
        assert_eq!(moves.take(&event("other", "n", "launched", "launched", "active")), None);
        assert!(!moves.look(&drain(&[], &[], &["c"])));
        assert!(moves.is_over(&drain(&[], &[], &["c"])));
        assert_eq!(
            moves.left().map(|(name, why)| (name.as_str(), why.is_some())).collect::<Vec<_>>(),
            [("c", true)]
        );
        assert_eq!(moves.take(&Event::UnitGone { name: "c".into() }).unwrap().1, Fate::Dropped);
        assert_eq!(moves.left().count(), 0);
    }

    #[test]
    fn the_line() {
        let mut moves = Moves { from: "m".into(), ..Moves::default() };
        let now = drain(&["a"], &["b"], &["c"]);
        moves.look(&now);
        assert_eq!(
            line(&moves, &now, "m.../ip"),
            "Draining m.../ip: 0 of 3 units moved, 1 stopping, 1 with nowhere to go"
        );
    }
}
