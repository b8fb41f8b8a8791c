//! A cluster watched while it runs, and asked at the end.

use super::{
    Actual, Command, Effect, End, Fault, FaultKind, File, History, Known, LOG, Millis, Outcome, Run, Seen,
    States, Stream, Violation, runs::millis,
};
use crate::{Answer, Http};
use anyhow::{Context, Result, bail};
use fleet_api::events::{Event, UnitEvent};
use fleet_api::types::{MachinePage, UnitPage, UnitStatePage};
use fleet_testbed::Cluster;
use fleet_unit::UnitFile;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long to wait before a server that can't be reached is asked again.
const AGAIN: Duration = Duration::from_millis(100);

/// How long all has to stay as it is to be.
const AT_REST: Duration = Duration::from_millis(500);

/// Writes down what happens on a cluster.
///
/// Any thread may use it. It looks at a cluster only by its name, so whoever owns that may do with it what they like.
#[derive(Debug)]
pub struct Recorder {
    cluster: String,
    history: Arc<Mutex<History>>,
    /// Event streams, to be ended.
    streams: Arc<Mutex<BTreeMap<usize, UnixStream>>>,
    over: Arc<AtomicBool>,
}

/// A fault that was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultId(usize);

impl Drop for Recorder {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        for stream in lock(&self.streams).values() {
            // One that is broken has ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Recorder {
    /// Of this cluster, with this TTL.
    pub fn new(cluster: &Cluster, ttl: Duration) -> Result<Recorder> {
        let machines = cluster.hosts().iter().map(|host| host.machine_id().to_owned()).collect();
        let ttl = Millis::try_from(ttl.as_millis())?;
        let history = History { machines, ttl, ..History::default() };
        Ok(Recorder {
            cluster: cluster.name().to_owned(),
            history: Arc::new(Mutex::new(history)),
            streams: Arc::default(),
            over: Arc::default(),
        })
    }

    /// Now.
    pub fn now() -> Result<Millis> {
        let uptime = std::fs::read_to_string("/proc/uptime")?;
        uptime.split(' ').next().and_then(millis).context("/proc/uptime has no time")
    }

    /// The history so far.
    pub fn history(&self) -> MutexGuard<'_, History> {
        lock(&self.history)
    }

    /// Follows the events of a host's server from now on, through all breaks.
    pub fn follow(&self, server: usize) -> Result<()> {
        let cluster = Cluster::open(&self.cluster)?;
        let mut follower = Follower {
            cluster,
            server,
            history: self.history.clone(),
            streams: self.streams.clone(),
            over: self.over.clone(),
            last: None,
        };
        std::thread::spawn(move || {
            while !follower.over.load(Ordering::SeqCst) {
                // A server that is away is what this is all about.
                let _ = follower.once();
                std::thread::sleep(AGAIN);
            }
        });
        Ok(())
    }

    /// A file that commands may give to units: its text, and what is to be known of it. Returns its hash.
    pub fn file(&self, text: &str, file: File) -> Result<String> {
        let hash = UnitFile::parse(text)?.hash().to_string();
        self.history().files.insert(hash.clone(), file);
        Ok(hash)
    }

    /// Gives a command. `give` does it, and says what became of it.
    pub fn command(&self, what: &str, effect: Effect, give: impl FnOnce() -> Outcome) -> Result<Outcome> {
        let start = Self::now()?;
        let unknown = Outcome::Unknown("under way".into());
        let command = Command { what: what.into(), effect, start, end: None, outcome: unknown };
        let number = {
            let mut history = self.history();
            history.commands.push(command);
            history.commands.len() - 1
        };
        let outcome = give();
        let end = Self::now()?;
        let command = &mut self.history().commands[number];
        (command.end, command.outcome) = (Some(end), outcome.clone());
        Ok(outcome)
    }

    /// Gives a command to the API of a host's server.
    pub fn api(
        &self,
        server: usize,
        effect: Effect,
        method: &str,
        path: &str,
        body: &str,
    ) -> Result<Outcome> {
        let cluster = Cluster::open(&self.cluster)?;
        let what = format!("{method} {path} on host {server}");
        self.command(&what, effect, || {
            let answered = socket(&cluster, server)
                .and_then(|http| http.send(method, path, &["Content-Type: application/json"], body));
            outcome(answered)
        })
    }

    /// Gives a unit this file and desired state through the API of a host's server.
    pub fn put(&self, server: usize, unit: &str, text: Option<&str>, desired: &str) -> Result<Outcome> {
        let file = text.map(|text| anyhow::Ok(UnitFile::parse(text)?.hash().to_string())).transpose()?;
        let body = match text {
            Some(text) => serde_json::json!({"file": text, "desiredState": desired}),
            None => serde_json::json!({"desiredState": desired}),
        };
        let effect = Effect::Put { unit: unit.into(), file, only_if_new: false, desired: desired.into() };
        self.api(server, effect, "PUT", &format!("/fleet/v1/units/{unit}"), &body.to_string())
    }

    /// Destroys a unit through the API of a host's server.
    pub fn destroy(&self, server: usize, unit: &str) -> Result<Outcome> {
        let effect = Effect::Destroy { unit: unit.into() };
        self.api(server, effect, "DELETE", &format!("/fleet/v1/units/{unit}"), "")
    }

    /// A fault begins: to be called before anything is broken.
    pub fn fault(&self, what: impl Into<String>, kind: FaultKind, host: Option<usize>) -> Result<FaultId> {
        let start = Self::now()?;
        let mut history = self.history();
        history.faults.push(Fault { what: what.into(), kind, host, start, end: None });
        Ok(FaultId(history.faults.len() - 1))
    }

    /// A fault is over: to be called when nothing is broken by it any more.
    pub fn healed(&self, fault: FaultId) -> Result<()> {
        let now = Self::now()?;
        self.history().heal(fault.0, now);
        Ok(())
    }

    /// Waits until everything is as it is to be, or as long as this, and looks at all that is and was. What is not to be by then is
    /// in what [`History::check`] finds. `servers`: all of them are asked. Nothing may be broken or commanded meanwhile.
    pub fn settle(&self, servers: &[usize], patience: Duration) -> Result<History> {
        let cluster = Cluster::open(&self.cluster)?;
        let until = Self::now()? + Millis::try_from(patience.as_millis())?;
        // Twice, so that what streams of events tell is here, too.
        let mut before = false;
        loop {
            let looked = self.look(&cluster, servers);
            let late = Self::now()? > until;
            match looked {
                Ok(found) if found.is_empty() && before => {
                    let mut history = self.history();
                    history.rests.push(Self::now()?);
                    return Ok(history.clone());
                }
                // What was lost does not come back.
                Ok(found) if !found.is_empty() && (late || found.iter().all(|one| one.check == "G1")) => {
                    return Ok(self.history().clone());
                }
                Ok(found) => before = found.is_empty(),
                Err(error) if late => return Err(error.context("the cluster can't be looked at")),
                Err(_) => before = false,
            }
            std::thread::sleep(AT_REST);
        }
    }

    /// Looks at runs and the end, as each server tells it; what is not as it is to be.
    fn look(&self, cluster: &Cluster, servers: &[usize]) -> Result<Vec<Violation>> {
        let mut found = Vec::new();
        for server in servers {
            let mut end = reported(cluster, *server, &self.history().machines)?;
            let units: BTreeSet<String> = {
                let history = self.history();
                history
                    .commands
                    .iter()
                    .filter_map(|command| command.effect.unit())
                    .map(str::to_owned)
                    .collect()
            };
            for (index, host) in cluster.hosts().iter().enumerate() {
                if host.is_up() {
                    actual(host, index, &units, &mut end)?;
                }
            }
            let runs = runs(cluster)?;
            let mut history = self.history();
            history.runs = runs;
            end.at = Self::now()?;
            history.end = Some(end);
            found.extend(history.check_end());
            if !found.is_empty() {
                break;
            }
        }
        Ok(found)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn socket(cluster: &Cluster, server: usize) -> Result<Http> {
    Ok(Http::new(cluster.host(server).root_path("/run/fleet.sock")?))
}

/// What an answer of the API says became of a command.
pub(super) fn outcome(answered: Result<Answer>) -> Outcome {
    match answered {
        Ok(answer) if (200..300).contains(&answer.status) => Outcome::Acknowledged {
            revision: answer.header("fleet-revision").and_then(|revision| revision.parse().ok()),
        },
        Ok(answer) if (400..500).contains(&answer.status) => {
            Outcome::Refused(format!("{}: {}", answer.status, answer.body))
        }
        Ok(answer) => Outcome::Unknown(format!("{}: {}", answer.status, answer.body)),
        Err(error) => Outcome::Unknown(format!("{error:#}")),
    }
}

/// Reads the events of one server.
struct Follower {
    cluster: Cluster,
    server: usize,
    history: Arc<Mutex<History>>,
    streams: Arc<Mutex<BTreeMap<usize, UnixStream>>>,
    over: Arc<AtomicBool>,
    /// The revision up to which all is known; none: ask for everything.
    last: Option<u64>,
}

impl Follower {
    /// Follows one connection to its end.
    fn once(&mut self) -> Result<()> {
        let mut stream = socket(&self.cluster, self.server)?.connect()?;
        let query = match self.last {
            Some(revision) => format!("?since={revision}"),
            None => "?snapshot=1".to_owned(),
        };
        write!(stream, "GET /fleet/v1/events{query} HTTP/1.0\r\nHost: fleet\r\n\r\n")?;
        lock(&self.streams).insert(self.server, stream.try_clone()?);
        let mut lines = BufReader::new(stream).lines();
        let status = lines.next().context("no answer")??;
        if !status.contains(" 200 ") {
            bail!("{status}");
        }
        // From here on changes are told, except with a snapshot: all of it comes first.
        let mut open = None;
        let told = self.read(lines, &mut open);
        if let Some(open) = open {
            lock(&self.history).streams[open].end = Some(Recorder::now()?);
        }
        told
    }

    fn begin(&self) -> Result<usize> {
        let start = Recorder::now()?;
        let mut history = lock(&self.history);
        history.streams.push(Stream { server: self.server, start, end: None });
        Ok(history.streams.len() - 1)
    }

    fn read(
        &mut self,
        lines: impl Iterator<Item = std::io::Result<String>>,
        open: &mut Option<usize>,
    ) -> Result<()> {
        // The units of a snapshot: the others are gone.
        let mut snapshot = self.last.is_none().then(BTreeSet::new);
        let mut revision = 0;
        for line in lines {
            let line = line?;
            if let Some(id) = line.strip_prefix("id: ") {
                revision = id.parse()?;
            } else if line.starts_with(':') && snapshot.is_none() && open.is_none() {
                *open = Some(self.begin()?);
            }
            let Some(data) = line.strip_prefix("data: ") else { continue };
            match serde_json::from_str::<Event>(data)? {
                Event::Unit(unit) => {
                    if let Some(snapshot) = &mut snapshot {
                        snapshot.insert(unit.explanation.name.clone());
                    }
                    self.seen(revision, unit.explanation.name.clone(), self.known(unit))?;
                }
                Event::UnitGone { name } => self.seen(revision, name, None)?,
                Event::Ready => {
                    let there = snapshot.take().unwrap_or_default();
                    let before: BTreeSet<_> = lock(&self.history)
                        .seen
                        .iter()
                        .filter(|seen| seen.server == self.server && !there.contains(&seen.unit))
                        .map(|seen| seen.unit.clone())
                        .collect();
                    for unit in before {
                        self.seen(revision, unit, None)?;
                    }
                    *open = Some(self.begin()?);
                    self.last = Some(revision);
                }
                Event::Reset => {
                    self.last = None;
                    bail!("the server does not know any more what changed");
                }
                Event::Machine(_)
                | Event::MachineGone { .. }
                | Event::Notice(_)
                | Event::NoticeGone { .. } => {}
            }
            if snapshot.is_none() {
                self.last = Some(revision);
            }
        }
        Ok(())
    }

    fn known(&self, unit: UnitEvent) -> Option<Known> {
        let machines = &lock(&self.history).machines;
        let machine = machines.iter().position(|id| *id == unit.explanation.machine_id);
        unit.known.then_some(Known { hash: unit.hash, desired: unit.explanation.desired_state, machine })
    }

    fn seen(&self, revision: u64, unit: String, state: Option<Known>) -> Result<()> {
        let at = Recorder::now()?;
        lock(&self.history).seen.push(Seen { at, server: self.server, revision, unit, state });
        Ok(())
    }
}

/// All pages of a list: their bodies, and the oldest revision of them.
fn list(http: &Http, what: &str) -> Result<(String, u64)> {
    let answer = http.get(&format!("/fleet/v1/{what}?limit=10000"))?;
    if answer.status != 200 {
        bail!("GET {what}: {} {}", answer.status, answer.body);
    }
    let revision = answer.header("fleet-revision").and_then(|revision| revision.parse().ok());
    Ok((answer.body, revision.context("no revision")?))
}

/// What a server says of units.
fn reported(cluster: &Cluster, server: usize, machines: &[String]) -> Result<End> {
    let http = socket(cluster, server)?;
    let host = |id: &str| machines.iter().position(|machine| machine == id);
    let (present, _) = list(&http, "machines")?;
    let present: MachinePage = serde_json::from_str(&present)?;
    let (states, _) = list(&http, "state")?;
    let states: UnitStatePage = serde_json::from_str(&states)?;
    let (units, revision) = list(&http, "units")?;
    let units: UnitPage = serde_json::from_str(&units)?;
    let mut end = End {
        revision,
        present: present.machines.iter().filter_map(|machine| host(&machine.id)).collect(),
        ..End::default()
    };
    for unit in units.units {
        let text = http.get(&format!("/fleet/v1/units/{}/file", unit.name))?.body;
        let hash = UnitFile::parse(&text)?.hash().to_string();
        if unit.machine_id.is_empty() && unit.desired_state != "inactive" {
            let explained = http.get(&format!("/fleet/v1/units/{}/explain", unit.name))?.body;
            let explained: fleet_api::types::Explanation = serde_json::from_str(&explained)?;
            if !explained.unplaced.is_empty() {
                let reasons: Vec<_> = explained.unplaced.into_iter().map(|reason| reason.reason).collect();
                end.reasons.insert(unit.name.clone(), reasons.join("; "));
            }
        }
        end.units
            .push((unit.name, Known { hash, desired: unit.desired_state, machine: host(&unit.machine_id) }));
    }
    for state in states.states {
        let Some(host) = host(&state.machine_id) else { continue };
        let states = States {
            load: state.systemd_load_state,
            active: state.systemd_active_state,
            sub: state.systemd_sub_state,
        };
        end.reported.entry(state.name).or_default().insert(host, states);
    }
    Ok(end)
}

/// What systemd on a host says of these units.
fn actual(host: &fleet_testbed::Host, index: usize, units: &BTreeSet<String>, end: &mut End) -> Result<()> {
    if units.is_empty() {
        return Ok(());
    }
    let words = ["systemctl", "show", "-p", "Id,LoadState,ActiveState,SubState"];
    let shown = host.run(words.into_iter().chain(units.iter().map(String::as_str)))?.ok()?.stdout;
    for block in shown.split("\n\n") {
        let values: BTreeMap<&str, &str> = block.lines().filter_map(|line| line.split_once('=')).collect();
        let value = |key: &str| values.get(key).copied().unwrap_or_default().to_owned();
        let states =
            States { load: value("LoadState"), active: value("ActiveState"), sub: value("SubState") };
        let unit = value("Id");
        let text = std::fs::read(host.root_path(format!("/run/fleet/units/{unit}"))?).ok();
        let hash = text.and_then(|text| Some(UnitFile::from_bytes(&text).ok()?.hash().to_string()));
        // One that systemd has never heard of, or that it only remembers to have failed.
        if hash.is_none() && !states.is_live() {
            continue;
        }
        end.actual.entry(unit).or_default().insert(index, Actual { states, hash });
    }
    Ok(())
}

/// What units on all hosts wrote down.
fn runs(cluster: &Cluster) -> Result<Vec<Run>> {
    let mut history = History::default();
    for (index, host) in cluster.hosts().iter().enumerate() {
        let Ok(logs) = std::fs::read_dir(host.disk_path(LOG)) else { continue };
        for log in logs {
            let log = log?;
            let unit = log.file_name().to_string_lossy().into_owned();
            history.take_runs(index, &unit, &std::fs::read_to_string(log.path())?)?;
        }
        if history.runs.iter().any(|run| run.host == index && run.stop.is_none()) {
            history.take_ends(index, &ends(host)?);
        }
    }
    Ok(history.runs)
}

/// When units have stopped or failed by what systemd on a host logged.
fn ends(host: &fleet_testbed::Host) -> Result<Vec<(String, Millis)>> {
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(rename = "UNIT")]
        unit: String,
        /// Microseconds.
        #[serde(rename = "__MONOTONIC_TIMESTAMP")]
        at: String,
    }
    // SD_MESSAGE_UNIT_STOPPED and SD_MESSAGE_UNIT_FAILURE_RESULT
    let logged = host.run([
        "journalctl",
        "--no-pager",
        "--output=json",
        "--output-fields=UNIT",
        "_PID=1",
        "MESSAGE_ID=9d1aaa27d60140bd96365438aad20286",
        "MESSAGE_ID=d9b373ed55a64feb8242e02dbe79a49c",
    ])?;
    let entry = |line: &str| -> Result<_> {
        let entry: Entry = serde_json::from_str(line)?;
        Ok((entry.unit, entry.at.parse::<Millis>()? / 1000))
    };
    logged.stdout.lines().filter(|line| line.starts_with('{')).map(entry).collect()
}
