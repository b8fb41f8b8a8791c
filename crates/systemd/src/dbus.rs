//! systemd through D-Bus.
use crate::*;
use std::path::PathBuf;

/// systemd of this machine.
pub struct SystemdHost {}

/// Where fleet keeps its files on a machine.
#[derive(Clone, Debug)]
pub struct Directories {
    /// Unit files; by default `/run/fleet/units`.
    pub units: PathBuf,
    /// Marks of what was launched since boot; by default `/run/fleet/launched`.
    pub launched: PathBuf,
}

impl SystemdHost {
    /// Connects to the system bus.
    pub async fn connect(_directories: Directories) -> Result<Self, Error> {
        todo!()
    }
}
impl Systemd for SystemdHost {
    async fn find(&self) -> Result<Found, Error> {
        todo!()
    }
    async fn install(&self, _units: &[(UnitName, UnitFile)]) -> Vec<Result<(), Error>> {
        todo!()
    }
    async fn remove(&self, _units: &[UnitName]) -> Vec<Result<(), Error>> {
        todo!()
    }
    async fn reload_if_needed(&self, _units: &[UnitName]) -> Result<bool, Error> {
        todo!()
    }
    async fn start(&self, _unit: &UnitName) -> Result<JobResult, Error> {
        todo!()
    }
    async fn stop(&self, _unit: &UnitName) -> Result<JobResult, Error> {
        todo!()
    }
    async fn states(&self, _units: &[UnitName]) -> Result<BTreeMap<UnitName, State>, Error> {
        todo!()
    }
    async fn mark_launched(&self, _unit: &UnitName, _hash: Option<Hash>) -> Result<(), Error> {
        todo!()
    }
    fn notices(&self) -> mpsc::Receiver<Notice> {
        todo!()
    }
    fn status(&self, _unit: &UnitName) -> mpsc::Receiver<Output> {
        todo!()
    }
    fn journal(&self, _unit: &UnitName, _lines: u32, _follow: bool, _output: &str) -> mpsc::Receiver<Output> {
        todo!()
    }
}
