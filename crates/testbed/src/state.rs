//! What is on record about clusters: one directory each under [`BASE`], written before the thing it
//! tells about exists, so that a process that dies half-way leaves nothing that cannot be found.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// Where clusters are kept: a real disk, since an overlay's upper layer needs one.
pub const BASE: &str = "/var/tmp/fleet-testbed";

/// A cluster's record, `cluster.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ClusterRecord {
    pub name: String,
    /// First three numbers of the cluster's /24 network.
    pub subnet: String,
    pub bridge: String,
    /// Machine IDs, one per host.
    pub machine_ids: Vec<String>,
    /// The process whose end is the cluster's end; none when the cluster stands by itself.
    pub owner: Option<ProcessId>,
}

/// A host's record while it has power, `run.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// The systemd-nspawn process.
    pub nspawn: ProcessId,
}

/// The directory of the cluster called `name`.
pub(crate) fn cluster_dir(name: &str) -> PathBuf {
    Path::new(BASE).join(name)
}

/// Takes the lock under which clusters are made and swept; held until dropped.
pub(crate) fn lock() -> Result<File> {
    fs::create_dir_all(BASE).with_context(|| format!("cannot make {BASE}"))?;
    let path = Path::new(BASE).join(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Writes a record so that a reader sees the old one or the new one, nothing between.
pub(crate) fn write_record<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        fs::rename(&new, path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads a record; none when there is no such file.
pub(crate) fn read_record<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let record = serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(Some(record))
}

/// A process, by number and start time: numbers are used again, the pair is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub pid: i32,
    /// Clock ticks since boot, from /proc/PID/stat.
    pub start: u64,
}

impl ProcessId {
    /// This process.
    pub(crate) fn current() -> Result<ProcessId> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        ProcessId::of(pid).context("cannot read /proc/self/stat")
    }

    /// The process that has this number now; none when there is none or it is a zombie.
    pub(crate) fn of(pid: i32) -> Option<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in brackets and may hold anything.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        if matches!(fields.next()?, "Z" | "X") {
            return None;
        }
        let start = fields.nth(18)?.parse().ok()?;
        Some(ProcessId { pid, start })
    }

    pub(crate) fn is_alive(self) -> bool {
        ProcessId::of(self.pid) == Some(self)
    }

    /// Sends a signal; a process that is gone already is fine.
    pub(crate) fn signal(self, signal: Signal) -> Result<()> {
        let Some(pidfd) = self.pidfd()? else { return Ok(()) };
        match pidfd_send_signal(&pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot signal process {}", self.pid)),
        }
    }

    /// Waits until the process has ended.
    pub(crate) fn wait_gone(self, deadline: Duration) -> Result<()> {
        let Some(pidfd) = self.pidfd()? else { return Ok(()) };
        let end = Instant::now() + deadline;
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        if poll_until(&mut fds, end)? {
            return Ok(());
        }
        bail!("process {} has not ended within {deadline:?}", self.pid)
    }

    /// A handle on exactly this process; none when it is gone.
    fn pidfd(self) -> Result<Option<rustix::fd::OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot watch process {}", self.pid));
            }
        };
        // Compared after opening: from here on the number cannot pass to another process unseen.
        Ok(self.is_alive().then_some(fd))
    }
}

/// Polls until something is ready (true) or the time is over (false).
pub(crate) fn poll_until(fds: &mut [PollFd<'_>], end: Instant) -> Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).context("deadline too far away")?;
        match poll(fds, Some(&left)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("poll failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_number_and_start() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert!(!ProcessId { start: me.start + 1, ..me }.is_alive());
    }

    #[test]
    fn an_ended_process_is_not_waited_for() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let id = ProcessId::of(child.id() as i32);
        child.wait().unwrap();
        if let Some(id) = id {
            id.wait_gone(Duration::from_secs(5)).unwrap();
            assert!(!id.is_alive());
        }
    }

    #[test]
    fn records_come_back_and_damage_is_told() {
        let dir = std::env::temp_dir().join(format!("fleet-testbed-record-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("r.json");
        let id = ProcessId { pid: 1, start: 2 };
        assert!(read_record::<ProcessId>(&path).unwrap().is_none());
        write_record(&path, &id).unwrap();
        assert_eq!(read_record(&path).unwrap(), Some(id));
        fs::write(&path, "{").unwrap();
        assert!(read_record::<ProcessId>(&path).unwrap_err().to_string().contains("is damaged"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
