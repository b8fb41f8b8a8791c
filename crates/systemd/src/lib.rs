//! systemd and journald of one machine, through D-Bus, files and their own commands.
//!
//! One trait, [`Systemd`]; one implementation that does it ([`dbus::SystemdHost`]) and one in memory for tests and
//! simulation ([`memory::MemorySystemd`]).
use bytes::Bytes;
use fleet_unit::{Hash, UnitFile, UnitName};
use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
    time::Duration,
};
use tokio::sync::mpsc;

mod commands;
pub mod dbus;
mod files;
pub mod guard;
pub mod memory;

/// What systemd says of a unit: load, active and sub state.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct State {
    pub load: String,
    pub active: String,
    pub sub: String,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobResult {
    /// It was done.
    Done,
    /// Another job took its place, or it was cancelled.
    Canceled,
    /// It was not done; with systemd's word for it (`failed`, `timeout`, `dependency`, `skipped`, …).
    Failed(String),
}

/// What is found on the machine when fleetd starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The unit files in the units directory that are linked into systemd, with their texts.
    pub files: BTreeMap<UnitName, Arc<str>>,
    /// Which units fleet has started since the machine booted, and which were here before it first ran since then.
    pub marks: BTreeMap<UnitName, Mark>,
    /// What the guard was told last in this life of the machine.
    pub guarded: Option<Guarded>,
}

/// What is remembered of a unit, with the hash of the file it was: that fleet started it, or that it was here before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The start job was asked for, or is about to be; how it ended is not known.
    Starting(Hash),
    /// The start job has ended.
    Launched(Hash),
    /// Its file was here before fleet first ran since the machine booted: another fleet left it.
    Inherited(Hash),
}

/// What the guard has to know: which units it has to stop when the machine's presence is not renewed, and when
/// it was. See [`guard`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guarded {
    /// For how long presence holds.
    pub ttl: Duration,
    /// When the newest renewal that was acknowledged was sent, by [`Systemd::clock`].
    pub renewed: Duration,
    /// The units, and how long each may take to stop.
    pub units: BTreeMap<UnitName, Duration>,
}

/// Something may have changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The states of these units.
    Units(BTreeSet<UnitName>),
    /// Everything: the connection to systemd was lost and is back, or systemd was re-executed.
    All,
}

/// A command's output, in pieces; the last is `Exit`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Output {
    Out(Bytes),
    Err(Bytes),
    Exit(i32),
}

/// What can go wrong; Display is for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// systemd refused.
    #[error("{0}")]
    Refused(String),
    /// A file could not be read or written.
    #[error("{path}: {reason}")]
    #[allow(missing_docs)]
    File { path: String, reason: String },
    /// Another unit of that name, not fleet's, is there already.
    #[error("systemd on this machine already has a unit {name}, from {path}")]
    #[allow(missing_docs)]
    Taken { name: UnitName, path: String },
    /// systemd can't be reached now.
    #[error("can't reach systemd: {0}")]
    Unreachable(String),
}

/// systemd of one machine, as an agent needs it.
pub trait Systemd: Send + Sync + 'static {
    /// What is there from before.
    fn find(&self) -> impl Future<Output = Result<Found, Error>> + Send;
    /// Writes files and makes them known to systemd, all in as few calls as possible; a result for each, in
    /// order. Units with an `[Install]` section are enabled until the next boot. Nothing is reloaded.
    fn install(&self, units: &[(UnitName, UnitFile)]) -> impl Future<Output = Vec<Result<(), Error>>> + Send;
    /// Unlinks (and disables) and deletes files; failed states are forgotten. Where systemd keeps a unit in memory all the
    /// same, since another refers to it, its configuration is reloaded, so that nothing can start what is removed; one that
    /// runs (again) is not removed. A result for each, in order.
    fn remove(&self, units: &[UnitName]) -> impl Future<Output = Vec<Result<(), Error>>> + Send;
    /// Reloads systemd's configuration if any of these (installed a moment ago) is loaded from an older file;
    /// says whether it did.
    fn reload_if_needed(&self, units: &[UnitName]) -> impl Future<Output = Result<bool, Error>> + Send;
    /// Starts a unit and waits for the job to end. Jobs are asked for in the order in which their futures are first polled.
    fn start(&self, unit: &UnitName) -> impl Future<Output = Result<JobResult, Error>> + Send;
    /// Stops a unit and waits for the job to end. A unit that systemd does not know is stopped.
    fn stop(&self, unit: &UnitName) -> impl Future<Output = Result<JobResult, Error>> + Send;
    /// Those of the units that systemd has in memory; the others are inactive. Unlike asking for their states this loads none of
    /// them, which would be done again for a start.
    fn in_memory(&self, units: &[UnitName])
    -> impl Future<Output = Result<BTreeSet<UnitName>, Error>> + Send;
    /// The states of units, in as few calls as possible. One that systemd does not know is `not-found`.
    fn states(
        &self,
        units: &[UnitName],
    ) -> impl Future<Output = Result<BTreeMap<UnitName, State>, Error>> + Send;
    /// Remembers until the machine's next boot what was started; `None` forgets it. A result for each, in order.
    fn mark(&self, marks: &[(UnitName, Option<Mark>)])
    -> impl Future<Output = Vec<Result<(), Error>>> + Send;
    /// The time since the machine booted, with the time it was suspended (`CLOCK_BOOTTIME`).
    fn clock(&self) -> Duration;
    /// How long each unit may take to stop (`TimeoutStopSec=` and the like); [`Duration::MAX`] where that is infinite or
    /// can't be found out.
    fn stop_timeouts(&self, units: &[UnitName]) -> impl Future<Output = BTreeMap<UnitName, Duration>> + Send;
    /// Tells the guard what it has to know; `None`: nothing is to be guarded any more. It need not run.
    fn tell_guard(&self, guarded: Option<&Guarded>) -> impl Future<Output = Result<(), Error>> + Send;
    /// Starts the guard, or stops it; fine if that is so already.
    fn run_guard(&self, run: bool) -> impl Future<Output = Result<(), Error>> + Send;
    /// Whether the machine is going down (systemd is stopping everything). False when it can't be found out.
    fn is_shutting_down(&self) -> impl Future<Output = bool> + Send;
    /// Notices of changes of installed units' states, gathered for some milliseconds. To be taken once.
    fn notices(&self) -> mpsc::Receiver<Notice>;
    /// `systemctl status`, without colours and pager.
    fn status(&self, unit: &UnitName) -> mpsc::Receiver<Output>;
    /// `journalctl` of a unit. Dropping the receiver ends it.
    fn journal(&self, unit: &UnitName, lines: u32, follow: bool, output: &str) -> mpsc::Receiver<Output>;
}
