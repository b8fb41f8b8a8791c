//! What a seed is about: the cluster, the time, and which faults how often.

use crate::rng::Rng;
use crate::systemd::Manners;
use std::time::Duration;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A fleetd is killed, and started again by systemd.
    Kill,
    /// A fleetd is stopped in order, and started again.
    Restart,
    /// A machine loses its power.
    PowerCut,
    /// A machine is rebooted in order.
    Reboot,
    /// A fleetd is paused, and goes on believing that it is still then.
    Pause,
    /// An agent is cut off one server or all, in one direction or both.
    Cut,
    /// As `Cut`, again and again for short times.
    Flap,
    /// Many agents are cut off at once.
    CutMany,
    /// A server is cut off the store.
    CutStore,
    /// The store takes its time.
    SlowStore,
    /// Calls of the store fail, some with unknown outcome.
    FailingStore,
    /// The store forgets old changes.
    Compact,
    /// The store has lost its data, for a time; or its data can't be read.
    LostStore,
    /// The bus of a machine is away.
    BusAway,
    /// A unit ends by itself.
    Die,
}

const FAULTS: [Fault; 15] = [
    Fault::Kill,
    Fault::Restart,
    Fault::PowerCut,
    Fault::Reboot,
    Fault::Pause,
    Fault::Cut,
    Fault::Flap,
    Fault::CutMany,
    Fault::CutStore,
    Fault::SlowStore,
    Fault::FailingStore,
    Fault::Compact,
    Fault::LostStore,
    Fault::BusAway,
    Fault::Die,
];

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    /// Servers; with more than one they share a store.
    pub(crate) servers: usize,
    /// Machines that are agents only.
    pub(crate) agents: usize,
    pub(crate) shared: bool,
    pub(crate) ttl: Duration,
    /// Drift of the clocks: up to this part.
    pub(crate) drift: f64,
    /// The least and the usual greatest time of a message, milliseconds.
    pub(crate) delay: (u64, u64),
    /// Faults, with their weights.
    pub(crate) faults: Vec<(Fault, f64)>,
    /// The mean time between two faults.
    pub(crate) fault_every: Duration,
    /// The mean time between two commands.
    pub(crate) command_every: Duration,
    /// How long faults go on in each round.
    pub(crate) trouble: Duration,
    pub(crate) rounds: usize,
    pub(crate) manners: Manners,
    /// How many names of units there are.
    pub(crate) names: usize,
}

impl Scenario {
    pub(crate) fn new(rng: &mut Rng) -> Self {
        let shared = rng.chance(0.6);
        // Of the faults each seed has a few, so that each is also seen without the others.
        let part = rng.fraction();
        let mut faults: Vec<_> = FAULTS
            .iter()
            .filter_map(|fault| {
                let there = rng.chance(0.2 + 0.6 * part);
                there.then_some((*fault, 0.2 + rng.fraction()))
            })
            .collect();
        if faults.is_empty() {
            faults.push((*rng.pick(&FAULTS), 1.0));
        }
        let rare = |rng: &mut Rng, most: f64| if rng.chance(0.5) { most * rng.fraction() } else { 0.0 };
        Scenario {
            servers: if shared { 1 + rng.below(3) } else { 1 },
            agents: 1 + rng.below(4),
            shared,
            ttl: Duration::from_secs(*rng.pick(&[10, 15, 30])),
            drift: *rng.pick(&[0.0, 0.001, 0.0095]),
            delay: (1, *rng.pick(&[5, 50, 300])),
            faults,
            fault_every: rng.spread(500, 40_000),
            command_every: rng.spread(300, 20_000),
            trouble: rng.spread(20_000, 300_000),
            rounds: 1 + rng.below(3),
            manners: Manners {
                fails: rare(rng, 0.3),
                slow: rare(rng, 0.5),
                hangs: rare(rng, 0.2),
                stop_timeout: Duration::from_secs(*rng.pick(&[5, 20, 90])),
                trouble: rare(rng, 0.02),
            },
            names: 2 + rng.below(10),
        }
    }
}
