//! A torture run: commands and faults, at random from a seed, on a cluster of real hosts; and what happened is checked.
//!
//! It goes in rounds. In each, operators of all kinds work on a cluster that breaks all the time; then everything is repaired, and the
//! cluster has to come to rest. The history of all of it is checked each time ([`History::check`]).
//!
//! | module | job |
//! |---|---|
//! | this one | rounds, the report, what is kept when something is wrong |
//! | `plan` | what is done when, from a seed |
//! | `units` | the units |
//! | `act` | doing it |

mod act;
mod plan;
mod units;

use crate::history::{History, Outcome, Recorder, Violation};
use crate::{Fleet, Layout};
use act::Rig;
use anyhow::{Context, Result, ensure};
use plan::{Rng, Setting};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The agents' TTL: short, so that much happens, and long enough for a busy machine.
const TTL: Duration = Duration::from_secs(20);
/// Hosts of a cluster.
const HOSTS: usize = 5;
/// Of them with a server and a member of etcd, if there is one.
const MEMBERS: usize = 3;
/// How long a round goes on breaking things.
const ROUND: Duration = Duration::from_secs(75);
/// How long the cluster may take to come to rest; far more than it needs.
const REST: Duration = Duration::from_secs(300);

/// Where the registry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registry {
    /// On the first host, which is the only server.
    Embedded,
    /// In an etcd with a member and a server on each of the first three hosts.
    Etcd,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// What happens follows from this, as far as real hosts let it.
    pub seed: u64,
    /// No round begins after this.
    pub takes: Duration,
    /// How long a round breaks things; none: a usual time.
    pub round: Option<Duration>,
    /// Where the registry is.
    pub registry: Registry,
    /// Where the history and the journals are kept when something is wrong.
    pub keep: PathBuf,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How long it took.
    pub took: Duration,
    /// Rounds.
    pub rounds: usize,
    /// What must not be.
    pub violations: Vec<Violation>,
    /// Where more is to be found, if something was wrong.
    pub kept: Option<PathBuf>,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    acknowledged: usize,
    refused: usize,
    unknown: usize,
    faults: usize,
    runs: usize,
    /// How often a unit was placed on another machine, or taken off one.
    moves: usize,
}

impl Counts {
    fn of(history: &History) -> Counts {
        let outcomes = |fits: fn(&Outcome) -> bool| {
            history.commands.iter().filter(|command| fits(&command.outcome)).count()
        };
        Counts {
            acknowledged: outcomes(|outcome| matches!(outcome, Outcome::Acknowledged { .. })),
            refused: outcomes(|outcome| matches!(outcome, Outcome::Refused(_))),
            unknown: outcomes(|outcome| matches!(outcome, Outcome::Unknown(_))),
            faults: history.faults.len(),
            runs: history.runs.len(),
            moves: moves(history),
        }
    }
}

/// As one server told it.
fn moves(history: &History) -> usize {
    let mut places = BTreeMap::new();
    let first = history.seen.iter().filter(|seen| seen.server == 0);
    let changed = first.filter(|seen| {
        let place = seen.state.as_ref().and_then(|state| state.machine);
        let before = places.insert(&seen.unit, place).flatten();
        before.is_some()
            && before != place
            && seen.state.as_ref().is_some_and(|state| state.desired == "launched")
    });
    changed.count()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { acknowledged, refused, unknown, faults, runs, moves } = self.counts;
        writeln!(
            f,
            "{acknowledged} commands acknowledged, {refused} refused, {unknown} unknown; {faults} faults; {runs} runs of units, \
             {moves} moves"
        )?;
        for violation in &self.violations {
            writeln!(f, "{violation}")?;
        }
        if let Some(kept) = &self.kept {
            writeln!(f, "history and journals: {}", kept.display())?;
        }
        let minutes = self.took.as_secs_f64() / 60.0;
        write!(f, "{} rounds, {minutes:.1} minutes, {} violations", self.rounds, self.violations.len())
    }
}

/// Tortures a cluster of its own. An error is something that went wrong around it.
pub fn run(options: &Options) -> Result<Report> {
    let begun = Instant::now();
    let conf = format!("agent_ttl=\"{}s\"", TTL.as_secs());
    let (fleet, members) = match options.registry {
        Registry::Embedded => {
            (Fleet::join_in(Layout::Embedded, "torture", HOSTS, &[conf.as_str(); HOSTS])?, 0)
        }
        Registry::Etcd => (Fleet::on_etcd("torture", MEMBERS, HOSTS - MEMBERS, &conf)?, MEMBERS),
    };
    let setting = Setting { hosts: HOSTS, servers: fleet.servers().len(), members, ttl: TTL };
    let recorder = Recorder::new(&fleet.cluster, TTL)?;
    let rig = Rig::new(&fleet, &recorder, setting, begun)?;
    for server in fleet.servers() {
        recorder.follow(server)?;
    }
    let mut report = Report::default();
    let mut rng = Rng::new(options.seed);
    let torture = (|| {
        while report.rounds == 0 || begun.elapsed() < options.takes {
            let left = options.takes.saturating_sub(begun.elapsed());
            let takes = options.round.unwrap_or(ROUND.min(left.max(ROUND / 3)));
            rig.say(format!("round {} of seed {}", report.rounds + 1, options.seed));
            rig.round(&plan::round(&mut rng, &setting, report.rounds == 0, takes))?;
            rig.say("everything works again".into());
            let servers: Vec<usize> = fleet.servers().collect();
            let rested = Instant::now();
            let history = recorder.settle(&servers, REST)?;
            rig.say(format!("looked at after {:.1} s", rested.elapsed().as_secs_f64()));
            report.rounds += 1;
            report.counts = Counts::of(&history);
            report.violations = history.check();
            if !report.violations.is_empty() {
                break;
            }
        }
        anyhow::Ok(())
    })();
    report.took = begun.elapsed();
    if torture.is_err() || !report.violations.is_empty() {
        let keep = options.keep.join(format!("{:?}-{}", options.registry, options.seed).to_lowercase());
        keep_all(&fleet, &recorder, &report, &keep).context("keeping what happened")?;
        report.kept = Some(keep);
    }
    torture.with_context(|| match &report.kept {
        Some(kept) => format!("history and journals: {}", kept.display()),
        None => "torture".to_owned(),
    })?;
    ensure!(report.counts.acknowledged > 0, "no command was acknowledged");
    Ok(report)
}

/// Keeps the history and the journals.
fn keep_all(fleet: &Fleet, recorder: &Recorder, report: &Report, keep: &Path) -> Result<()> {
    std::fs::create_dir_all(keep).with_context(|| format!("make {}", keep.display()))?;
    std::fs::write(keep.join("report.txt"), format!("{report}\n"))?;
    std::fs::write(keep.join("history.json"), serde_json::to_vec(&*recorder.history())?)?;
    for (index, host) in fleet.cluster.hosts().iter().enumerate().filter(|(_, host)| host.is_up()) {
        let journal = host.run(["journalctl", "--no-pager", "-o", "short-precise"])?;
        std::fs::write(keep.join(format!("host{index}.journal")), journal.stdout)?;
    }
    Ok(())
}
