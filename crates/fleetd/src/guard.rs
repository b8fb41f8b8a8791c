//! The guard: stops units with OnIsolation=stop when nobody else does (`fleetd guard`, run by systemd).
//!
//! fleetd itself stops them when the machine's presence can't be renewed. But fleetd may be dead, hang or be stopped, and a unit may
//! not want to stop. So this process has the same deadlines from the same pure function
//! ([`fleet_cluster::fencing::isolation`]), and kills what still runs at the last of them. All it knows is one file, which
//! fleetd replaces at each renewal. Before it stops a unit it takes the mark away that fleetd left of its start: fleetd may never
//! come to note that itself, and the next one would take the unit for one that ended. While units are due it looks at them again and again: something else on the
//! machine, a timer or a fleetd that wakes from a pause, may start one.
//!
//! It is single-threaded, keeps nothing but that file's content, and takes the cautious side when in doubt: when it can't read
//! the file it goes on with what it knew.

use crate::{config::environment, logging, notify::Notifier};
use anyhow::Context;
use fleet_cluster::fencing::{self, Due};
use fleet_systemd::{Error, Guarded, guard};
use fleet_unit::UnitName;
use std::{collections::BTreeSet, path::Path, time::Duration};
use tracing::{error, info, warn};

/// How often units that are due are looked at: this part of the TTL, within bounds.
const LOOKS: u32 = 50;
const LOOK: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// After systemd could not be asked.
const RETRY: Duration = Duration::from_millis(100);

/// Guards until it is ended.
pub fn run() -> anyhow::Result<()> {
    let environment = environment()?;
    logging::start(0, &environment)?;
    let path = Path::new(guard::PATH);
    let alarm = guard::Alarm::new(path).with_context(|| format!("unable to watch {}", path.display()))?;
    let notifier = Notifier::new(&environment, std::process::id());
    notifier.ready("guarding");
    let mut guarded = None;
    let mut told = false;
    let mut stopped = BTreeSet::new();
    loop {
        match guard::read(path) {
            Ok(read) => guarded = read,
            Err(error) => error!("{error}; going on with what was known before"),
        }
        let wake_at = match &guarded {
            None => None,
            Some(guarded) => match enforce(guarded, &mut told, &mut stopped) {
                Ok(wake_at) => Some(wake_at),
                Err(error) => {
                    error!("{error}; trying again");
                    Some(guard::clock() + RETRY)
                }
            },
        };
        alarm.wait(wake_at).context("unable to wait")?;
    }
}

/// Does what is due now, and says when to look again. `told`: whether it was logged that units are due; `stopped`: those
/// that were stopped since.
fn enforce(guarded: &Guarded, told: &mut bool, stopped: &mut BTreeSet<UnitName>) -> Result<Duration, Error> {
    let now = guard::clock();
    // What was sent later than now was not sent.
    let renewed = Some(guarded.renewed).filter(|renewed| *renewed <= now);
    let units = guarded.units.iter().map(|(name, timeout)| (name, *timeout));
    let due = fencing::isolation(units, renewed, guarded.ttl, now);
    stopped.retain(|name| due.due.iter().any(|(other, _)| other == name));
    if due.due.is_empty() {
        if std::mem::take(told) {
            info!("a server was reached again");
        }
        return Ok(due.wake_at.unwrap_or(now + guarded.ttl));
    }
    let names: Vec<&UnitName> = due.due.iter().map(|(name, _)| name).collect();
    if !std::mem::replace(told, true) {
        let silent = now.saturating_sub(guarded.renewed).as_secs_f64();
        warn!(
            "no server was reached for {silent:.1} s; stopping {} units with OnIsolation=stop",
            names.len()
        );
    }
    let states = guard::states(&names)?;
    let (stop, kill) = what_to_do(&due.due, &states, stopped);
    if !stop.is_empty() {
        info!("stopping {}", list(&stop));
        guard::unmark(Path::new(guard::MARKS), &stop);
        guard::stop(&stop)?;
        stopped.extend(stop.into_iter().cloned());
    }
    if !kill.is_empty() {
        warn!("killing {}", list(&kill));
        guard::kill(&kill)?;
    }
    let look = (guarded.ttl / LOOKS).clamp(LOOK.0, LOOK.1);
    Ok(due.wake_at.unwrap_or(Duration::MAX).min(guard::clock() + look))
}

/// Which units to stop and which to kill, by their active states. One that is down is stopped once all the same: a start of it may
/// be waiting, which its state does not show.
fn what_to_do<'u>(
    due: &'u [(UnitName, Due)],
    states: &[String],
    stopped: &BTreeSet<UnitName>,
) -> (Vec<&'u UnitName>, Vec<&'u UnitName>) {
    let (mut stop, mut kill) = (Vec::new(), Vec::new());
    for ((name, due), state) in due.iter().zip(states) {
        match state.as_str() {
            // As systemctl calls units that systemd does not know.
            "unknown" => continue,
            "inactive" | "failed" => {
                if !stopped.contains(name) {
                    stop.push(name);
                }
                continue;
            }
            "deactivating" => {}
            _ => stop.push(name),
        }
        if *due == Due::Kill {
            kill.push(name);
        }
    }
    (stop, kill)
}

fn list(units: &[&UnitName]) -> String {
    units.iter().map(|unit| unit.as_str()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_is_stopped_and_what_will_not_stop_is_killed() {
        let name = |text: &str| UnitName::parse(text).unwrap();
        let due: Vec<_> = ["active", "activating", "deactivating", "inactive", "failed", "unknown"]
            .iter()
            .flat_map(|state| [Due::Stop, Due::Kill].map(|due| (*state, due)))
            .map(|(state, due)| (name(&format!("{state}-{due:?}.service")), due))
            .collect();
        let states: Vec<_> =
            due.iter().map(|(name, _)| name.as_str().split('-').next().unwrap().to_owned()).collect();
        let live = "active-Stop.service active-Kill.service activating-Stop.service activating-Kill.service";
        let killed = "active-Kill.service activating-Kill.service deactivating-Kill.service";
        let (stop, kill) = what_to_do(&due, &states, &BTreeSet::new());
        let down = "inactive-Stop.service inactive-Kill.service failed-Stop.service failed-Kill.service";
        assert_eq!((list(&stop), list(&kill)), (format!("{live} {down}"), killed.to_owned()));
        // What starts again is stopped again; what stays down is left in peace.
        let stopped = due.iter().map(|(name, _)| name.clone()).collect();
        let (stop, kill) = what_to_do(&due, &states, &stopped);
        assert_eq!((list(&stop), list(&kill)), (live.to_owned(), killed.to_owned()));
    }
}
