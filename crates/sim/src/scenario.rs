//! What a seed is about: the cluster, the time, and which faults how often.

use crate::Mutation;
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
    /// Many machines do at once, and are back at about the same time.
    PowerCutMany,
    /// A machine is rebooted in order.
    Reboot,
    /// A fleetd is paused, and goes on believing that it is still then.
    Pause,
    /// A machine is suspended with all that runs on it, and goes on later: of its clocks one has stood still.
    Suspend,
    /// A machine's guard dies, and is started again by systemd.
    GuardDies,
    /// A machine can't write files.
    FullDisk,
    /// A connection breaks: what was under way in it is lost.
    Reset,
    /// An agent is cut off one server or all, in one direction or both.
    Cut,
    /// As `Cut`, again and again for short times.
    Flap,
    /// Many agents are cut off at once.
    CutMany,
    /// A server, often the one that leads, is cut off the store.
    CutStore,
    /// As `CutStore`, again and again for short times.
    FlapStore,
    /// Calls of the store, or their answers, are lost one by one.
    LossyStore,
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
    /// A newer version writes a record that the others can't read, for a time.
    NewerRecord,
}

const FAULTS: [Fault; 23] = [
    Fault::Kill,
    Fault::Restart,
    Fault::PowerCut,
    Fault::PowerCutMany,
    Fault::Reboot,
    Fault::Pause,
    Fault::Suspend,
    Fault::GuardDies,
    Fault::FullDisk,
    Fault::Reset,
    Fault::Cut,
    Fault::Flap,
    Fault::CutMany,
    Fault::CutStore,
    Fault::FlapStore,
    Fault::LossyStore,
    Fault::SlowStore,
    Fault::FailingStore,
    Fault::Compact,
    Fault::LostStore,
    Fault::BusAway,
    Fault::Die,
    Fault::NewerRecord,
];

/// How slow the store is: up to so many milliseconds more
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slow {
    /// for each call, and each answer,
    All(u64),
    /// for this part of them,
    Some(u64, f64),
    /// for this part of the writes: those of leases' renewals do not wait for a disk.
    Writes(u64, f64),
}

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
    /// How many of all files have OnIsolation=stop.
    pub(crate) isolating: f64,
    /// How many of the servers are of a newer version, which writes fields that others do not know.
    pub(crate) newer: usize,
    /// How many of the records that those write are in a format that the others can't read.
    pub(crate) formats: f64,
    /// How many of the machines without a server are of an older version at first, which does not say that units have stopped.
    pub(crate) older: f64,
    /// How slow the store may be.
    pub(crate) slow: &'static [Slow],
    /// The longest step of time while nothing is under way.
    pub(crate) step: Duration,
}

impl Scenario {
    /// The same, with what it takes to meet a deliberate mistake often: so it is found within few seeds.
    pub(crate) fn focus(&mut self, mutation: Mutation) {
        use Mutation::*;
        let (faults, fault_every, command_every): (&[Fault], _, _) = match mutation {
            // A decision arrives late, when it was made anew, or when the machine is there again.
            NoFence => (&[Fault::SlowStore], 5.0, 0.3),
            NoAbsenceGuard => (&[Fault::SlowStore, Fault::Cut, Fault::Cut], 5.0, 2.0),
            NoTermGuard => (&[Fault::SlowStore, Fault::CutStore, Fault::Pause], 2.0, 0.3),
            NoSessionGuard => (&[Fault::SlowStore, Fault::Reset, Fault::Flap, Fault::Cut], 5.0, 0.5),
            ForgottenMarks => (&[Fault::Kill, Fault::Die], 5.0, 10.0),
            UnnotedStop => (&[Fault::Kill], 3.0, 0.5),
            EarlyExpiry | NoFencing => (&[Fault::CutMany], 20.0, 5.0),
            EarlyAnswer => (&[Fault::CutStore, Fault::SlowStore], 20.0, 5.0),
            NoGuard => (&[Fault::Pause], 10.0, 5.0),
            EarlyRelease => (&[Fault::Kill], 20.0, 0.5),
            UnreadableIsGone => (&[Fault::NewerRecord, Fault::Kill], 5.0, 10.0),
            UnknownFieldsLost => (&[Fault::Die], 20.0, 0.3),
            _ => return,
        };
        self.faults = faults.iter().map(|fault| (*fault, 1.0)).collect();
        self.fault_every = Duration::from_secs_f64(fault_every);
        self.command_every = Duration::from_secs_f64(command_every);
        (self.trouble, self.rounds) = (Duration::from_secs(200), 1);
        (self.shared, self.servers, self.agents) = (true, 3, 3);
        self.manners = Manners { stop_timeout: Duration::from_secs(20), ..Manners::default() };
        self.slow = &[Slow::Some(8_000, 0.05), Slow::Writes(8_000, 0.1)];
        self.ttl = Duration::from_secs(10);
        self.older = 0.0;
        self.formats = 0.0;
        match mutation {
            NoTermGuard => self.agents = 1,
            NoFence => self.slow = &[Slow::Writes(12_000, 0.2)],
            NoAbsenceGuard => {
                (self.shared, self.servers) = (false, 1);
                self.slow = &[Slow::Some(8_000, 0.5)];
            }
            UnknownFieldsLost => self.newer = 2,
            UnnotedStop => self.manners.slow = 0.9,
            EarlyExpiry | NoFencing | EarlyAnswer | NoGuard | EarlyRelease => {
                self.isolating = 1.0;
                self.manners.hangs = 0.5;
            }
            _ => {}
        }
    }

    /// One that is drawn from these; `versions`: for what is older; `waits`: for what units have to do with each other.
    pub(crate) fn new(rng: &mut Rng, versions: &mut Rng, waits: &mut Rng) -> Self {
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
        let servers = if shared { 1 + rng.below(3) } else { 1 };
        Scenario {
            servers,
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
                waits: if waits.chance(0.4) { 0.5 * waits.fraction() } else { 0.0 },
                kept: if waits.chance(0.3) { waits.fraction() } else { 0.0 },
                hangs: rare(rng, 0.2),
                stop_timeout: Duration::from_secs(*rng.pick(&[5, 20, 90])),
                trouble: rare(rng, 0.02),
            },
            names: 2 + rng.below(10),
            isolating: *rng.pick(&[0.0, 0.12, 0.12, 0.7]),
            newer: if rng.chance(0.3) { rng.below(servers + 1) } else { 0 },
            formats: if versions.chance(0.5) { 0.3 } else { 0.0 },
            older: if versions.chance(0.25) { versions.fraction() } else { 0.0 },
            slow: &[
                Slow::All(100),
                Slow::All(1_000),
                Slow::All(8_000),
                Slow::Some(8_000, 0.05),
                Slow::Writes(8_000, 0.1),
            ],
            step: Duration::from_millis(*rng.pick(&[10, 50, 100, 100, 200, 200, 200, 200])),
        }
    }
}
