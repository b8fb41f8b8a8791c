//! What is done to a cluster, and when: drawn from a seed before anything happens, so that the same seed does the same.

use super::units::{CAST, VERSIONS};
use std::time::Duration;

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting {
    pub(super) hosts: usize,
    /// The first hosts are servers.
    pub(super) servers: usize,
    /// Members of etcd, on the first hosts.
    pub(super) members: usize,
    pub(super) ttl: Duration,
}

/// Something to do at some time of a round.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) at: Duration,
    pub(super) what: What,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum What {
    /// A command to a server.
    Command { server: usize, command: Command },
    /// Something breaks for a time.
    Break { fault: Fault, takes: Duration },
}

/// Units are named by their numbers in the cast.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    Put {
        unit: usize,
        version: Option<usize>,
        desired: &'static str,
    },
    Destroy {
        unit: usize,
    },
    /// The same with fleetctl: `start`, `stop`, `load`, `unload`, `destroy`.
    Fleetctl {
        unit: usize,
        verb: &'static str,
    },
    Zone {
        host: usize,
        value: Option<&'static str>,
    },
    Mark {
        host: usize,
        mark: Mark,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Cordon,
    Uncordon,
    Drain,
    EndDrain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Both,
    In,
    Out,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// kill -9.
    KillFleetd(usize),
    RestartFleetd(usize),
    /// SIGSTOP, and SIGCONT when it is over.
    PauseFleetd(usize),
    Cut(usize, Way),
    /// The power is off.
    PowerCut(usize),
    Reboot(usize),
    /// No room on the file system of the registry.
    FullVar(usize),
    /// No room in /run.
    FullRun(usize),
    /// systemd executes itself anew.
    Reexec(usize),
    Reload(usize),
    /// kill -9 for a unit, if it runs there.
    KillUnit(usize, usize),
    KillMembers(Vec<usize>),
    PauseMember(usize),
}

impl Fault {
    /// The host that it breaks something of, other than etcd.
    pub(super) fn host(&self) -> Option<usize> {
        match self {
            Fault::KillFleetd(host)
            | Fault::RestartFleetd(host)
            | Fault::PauseFleetd(host)
            | Fault::Cut(host, _)
            | Fault::PowerCut(host)
            | Fault::Reboot(host)
            | Fault::FullVar(host)
            | Fault::FullRun(host)
            | Fault::Reexec(host)
            | Fault::Reload(host)
            | Fault::KillUnit(host, _) => Some(*host),
            Fault::KillMembers(_) | Fault::PauseMember(_) => None,
        }
    }
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }

    /// From 0 to twice the mean, evenly.
    fn around(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(2.0 * self.fraction())
    }

    fn fraction(&mut self) -> f64 {
        self.next() as f64 / u64::MAX as f64
    }
}

/// The mean time between two commands.
const COMMANDS: Duration = Duration::from_millis(700);
/// The mean time between two faults.
const FAULTS: Duration = Duration::from_millis(4500);

/// A round: commands and faults for so long. The first one begins with all units.
pub(super) fn round(rng: &mut Rng, setting: &Setting, first: bool, takes: Duration) -> Vec<Step> {
    let mut steps = Vec::new();
    if first {
        for unit in 0..CAST.len() {
            let command = Command::Put { unit, version: Some(0), desired: "launched" };
            let what = What::Command { server: rng.below(setting.servers), command };
            steps.push(Step { at: Duration::ZERO, what });
        }
    }
    // Which hosts each round goes for more than others, so that there are some that stay untouched for long.
    let victims: Vec<usize> = (0..setting.hosts).filter(|_| rng.below(3) > 0).collect();
    let mut at = rng.around(COMMANDS);
    while at < takes {
        let what = What::Command { server: rng.below(setting.servers), command: command(rng, setting) };
        steps.push(Step { at, what });
        at += rng.around(COMMANDS);
    }
    let mut at = rng.around(FAULTS);
    while at < takes {
        let host = if victims.is_empty() { 0 } else { rng.pick(&victims) };
        steps.push(Step { at, what: fault(rng, setting, host) });
        at += rng.around(FAULTS);
    }
    steps.sort_by_key(|step| step.at);
    steps
}

fn command(rng: &mut Rng, setting: &Setting) -> Command {
    let unit = rng.below(CAST.len());
    let states = ["launched", "launched", "launched", "loaded", "inactive"];
    match rng.below(20) {
        0..=7 => Command::Put { unit, version: Some(rng.below(VERSIONS)), desired: rng.pick(&states) },
        8..=12 => Command::Put { unit, version: None, desired: rng.pick(&states) },
        13..=14 => Command::Destroy { unit },
        15..=16 => Command::Fleetctl {
            unit,
            verb: rng.pick(&["start", "start", "stop", "load", "unload", "destroy"]),
        },
        17 => {
            Command::Zone { host: rng.below(setting.hosts), value: rng.pick(&[Some("a"), Some("b"), None]) }
        }
        _ => {
            let mark = rng.pick(&[Mark::Cordon, Mark::Uncordon, Mark::Drain, Mark::EndDrain, Mark::EndDrain]);
            Command::Mark { host: rng.below(setting.hosts), mark }
        }
    }
}

fn fault(rng: &mut Rng, setting: &Setting, host: usize) -> What {
    let way = rng.pick(&[Way::Both, Way::Both, Way::In, Way::Out]);
    let unit = rng.below(CAST.len());
    let fault = match rng.below(if setting.members > 0 { 23 } else { 18 }) {
        0..=2 => Fault::KillFleetd(host),
        3 => Fault::RestartFleetd(host),
        4..=5 => Fault::PauseFleetd(host),
        6..=8 => Fault::Cut(host, way),
        9..=10 => Fault::PowerCut(host),
        11 => Fault::Reboot(host),
        12 => Fault::FullVar(host),
        13 => Fault::FullRun(host),
        14 => Fault::Reexec(host),
        15 => Fault::Reload(host),
        16..=17 => Fault::KillUnit(host, unit),
        18..=19 => Fault::KillMembers(vec![rng.below(setting.members)]),
        20 => {
            // A majority.
            let spared = rng.below(setting.members);
            Fault::KillMembers((0..setting.members).filter(|member| *member != spared).collect())
        }
        _ => Fault::PauseMember(rng.below(setting.members)),
    };
    // Half of them are over before anybody has to act on it, the others go on for longer than that.
    let takes = if rng.below(2) == 0 {
        setting.ttl.mul_f64(0.02 + 0.18 * rng.fraction())
    } else {
        setting.ttl.mul_f64(0.3 + 1.2 * rng.fraction())
    };
    What::Break { fault, takes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_plan() {
        let setting = Setting { hosts: 5, servers: 3, members: 3, ttl: Duration::from_secs(20) };
        let plan = |seed| round(&mut Rng::new(seed), &setting, true, Duration::from_secs(600));
        let (one, two) = (plan(1), plan(2));
        assert_eq!(one, plan(1));
        assert_ne!(one, two);
        assert!(one.iter().zip(&one[1..]).all(|(before, after)| before.at <= after.at));
        let faults = one.iter().filter(|step| matches!(step.what, What::Break { .. })).count();
        assert!((80..200).contains(&faults), "{faults}");
        assert!(one.len() - faults > 500);
        // Some are short and some are not.
        let short = one
            .iter()
            .filter(|step| matches!(step.what, What::Break { takes, .. } if takes < setting.ttl / 4));
        assert!((faults / 4..faults * 3 / 4).contains(&short.count()));
    }
}
