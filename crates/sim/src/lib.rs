//! Whole fleet clusters in one deterministic process, under faults.
//!
//! From one seed come a cluster, its operators, and what goes wrong. The servers and agents are the real ones
//! ([`fleetd::server::Server`], [`fleetd::agent::Agent`] and all of the pure core); each fleetd has a tokio runtime of its
//! own with a clock that the world moves. What they stand on is simulated: the registry, the network, systemd, and time. The
//! same seed gives the same run to the byte.
//!
//! | module | is |
//! |---|---|
//! | `rng` | random numbers from a seed |
//! | `process` | one process with its own clock |
//! | `store` | a model of the registry, and a process's handle of it |
//! | `network` | sessions between machines |
//! | `systemd` | the systemd of a machine, and what really runs there |
//! | `scenario` | the cluster and the faults of a seed |
//! | `world` | time, and all that happens in it |
//! | `commands` | what operators do |
//! | `oracle` | what is true, and what must never happen |
//! | `mutation` | deliberate mistakes, to prove the checks |
//! | `minimise` | fewer faults and commands that still end in the same violation |

mod commands;
mod minimise;
mod mutation;
mod network;
mod oracle;
mod process;
mod rng;
mod scenario;
mod store;
mod systemd;
mod world;

pub use minimise::minimise;
pub use mutation::Mutation;
pub use oracle::Violation;
pub use process::trace_logs;

use std::collections::BTreeSet;
use std::time::Duration;

/// What came of a seed.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// How much time passed in it.
    pub simulated: Duration,
    /// A hash of all that happened.
    pub trace: u64,
    /// What must never happen and did; the run ends with the first.
    pub violations: Vec<Violation>,
    /// The longest time it took from the end of the faults until all was as it should be.
    pub settled_in: Duration,
    /// Commands that were acknowledged.
    pub acknowledged: u64,
    /// Faults there were.
    pub faults: u64,
    /// The faults and commands that were drawn, those that were left out among them; they are numbered from 0.
    pub inputs: u64,
    /// The last lines of what happened, if they were asked for.
    pub tail: Vec<String>,
}

/// How a seed is run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Print what happens.
    pub trace: bool,
    /// A deliberate mistake.
    pub mutation: Option<Mutation>,
    /// Let there be what it takes to meet that mistake often.
    pub focus: bool,
    /// Faults and commands that are left out, by their numbers.
    pub without: BTreeSet<u64>,
    /// How many of the last lines of what happened are kept.
    pub tail: usize,
}

/// Runs a seed.
///
/// # Errors
/// Only when a process can't be made, which is the fault of the machine this runs on.
pub fn run(seed: u64, options: &Options) -> std::io::Result<Outcome> {
    world::World::new(seed, options.clone())?.run()
}
