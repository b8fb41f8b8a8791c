//! One host: its power, its cable, its files.

use std::ffi::OsString;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;

use crate::command::{Command, Output, Running, outer};
use crate::disk::{Disk, Identity, put_file};
use crate::state::{ClusterRecord, ProcessId, RunRecord, poll_until, read_record, write_record};
use crate::{cgroup, cleanup};

/// How long a boot may take: half a second on an idle machine, far more on a loaded one.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);
/// How long a clean shutdown may take; systemd gives a service 90 s to stop.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(120);

/// A host of a cluster. Made by [`Cluster`](crate::Cluster).
#[derive(Debug)]
pub struct Host {
    name: String,
    ip: String,
    machine_id: String,
    cluster: ClusterRecord,
    dir: PathBuf,
    live: Mutex<Live>,
}

/// What this process holds of a host that it booted.
#[derive(Debug, Default)]
struct Live {
    /// systemd-nspawn, to be reaped.
    child: Option<Child>,
    /// Where nspawn reports, until the host is ready.
    notify: Option<UnixDatagram>,
}

impl Host {
    /// `index` counts from 0.
    pub(crate) fn new(cluster: &ClusterRecord, cluster_dir: &Path, index: usize) -> Host {
        Host {
            name: format!("{}-{}", cluster.name, index + 1),
            ip: format!("{}.{}", cluster.subnet, index + 11),
            machine_id: cluster.machine_ids.get(index).cloned().unwrap_or_default(),
            dir: cluster_dir.join(format!("n{}", index + 1)),
            cluster: cluster.clone(),
            live: Mutex::default(),
        }
    }

    /// The host name: the cluster's, a dash, and a number from 1.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host's IPv4 address on the bridge.
    pub fn ip(&self) -> &str {
        &self.ip
    }

    /// The content of the host's /etc/machine-id.
    pub fn machine_id(&self) -> &str {
        &self.machine_id
    }

    pub(crate) fn cluster_name(&self) -> &str {
        &self.cluster.name
    }

    pub(crate) fn cluster_dir(&self) -> Result<&Path> {
        self.dir.parent().context("a host lies in its cluster's directory")
    }

    // ---- power

    pub(crate) fn create(&self, hosts: &str) -> Result<()> {
        let gateway = format!("{}.1", self.cluster.subnet);
        let who = Identity {
            name: &self.name,
            machine_id: &self.machine_id,
            ip: &self.ip,
            gateway: &gateway,
            hosts,
        };
        self.disk().create(&who).with_context(|| format!("{}: cannot make the disk", self.name))
    }

    pub(crate) fn disk(&self) -> Disk {
        Disk::at(&self.dir)
    }

    /// Boots the host and waits until it is ready.
    pub fn boot(&self) -> Result<()> {
        self.power_on()?;
        self.wait_ready()
    }

    /// Boots the host; returns when its PID 1 exists and its cable is plugged.
    pub fn power_on(&self) -> Result<()> {
        if self.is_up() {
            bail!("{} is up already", self.name);
        }
        // What a host that died by itself left.
        cgroup::remove(&self.name)?;
        let mut live = self.live();
        if let Some(mut child) = live.child.take() {
            child.wait().context("cannot reap systemd-nspawn")?;
        }
        let _making = cleanup::making();
        self.disk().mount()?;
        let socket = self.dir.join("notify");
        let _ = fs::remove_file(&socket);
        let notify =
            UnixDatagram::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        let root = self.disk().root();
        let argv = [
            "systemd-nspawn",
            "--quiet",
            &format!("--directory={}", root.display()),
            "--register=no",
            "--keep-unit",
            "--console=read-only",
            &format!("--machine={}", self.name),
            "--boot",
            "--notify-ready=yes",
            &format!("--network-bridge={}", self.cluster.bridge),
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            "--",
            "--unit=multi-user.target",
        ];
        let socket = socket.to_string_lossy();
        let env = [("SYSTEMD_NSPAWN_LOCK", "0"), ("NOTIFY_SOCKET", &*socket)];
        let child = cgroup::spawn(&self.name, &argv, &env, &self.dir.join("console.log"))?;
        let pid = i32::try_from(child.id()).context("process number")?;
        live.child = Some(child);
        let nspawn = ProcessId::of(pid).with_context(|| format!("{}: {}", self.name, self.console()))?;
        write_record(&self.dir.join("run.json"), &RunRecord { nspawn })?;
        self.wait_notify(&notify, nspawn, "X_NSPAWN_LEADER_PID=")?;
        live.notify = Some(notify);
        outer(&["ip", "link", "set", &self.veth()?, "up"])?;
        Ok(())
    }

    /// Waits until the host has booted: all units of its boot are started.
    pub fn wait_ready(&self) -> Result<()> {
        let notify = self.live().notify.take();
        if let Some(notify) = notify {
            return self.wait_notify(&notify, self.running()?, "READY=1");
        }
        // Booted by another process.
        let state =
            self.command(["systemctl", "is-system-running", "--wait"]).deadline(BOOT_DEADLINE).run()?;
        match state.stdout.trim() {
            "running" | "degraded" => Ok(()),
            other => bail!("{} is not ready: {other} {}", self.name, state.stderr.trim()),
        }
    }

    /// A power cut: everything in the host ends at once, and its peers hear nothing of it.
    pub fn kill(&self) -> Result<()> {
        let record = self.run_record()?;
        if let Some(nspawn) = record.map(|r| r.nspawn).filter(|p| p.is_alive()) {
            // First the cable, as in a real power cut: the peers must not see dying processes say
            // goodbye. It also frees the name for the next boot, which sockets that repeat such a
            // goodbye would hold for minutes.
            if let Ok(veth) = self.veth() {
                outer(&["ip", "link", "del", &veth])?;
            }
            if let Some(init) = init_of(nspawn) {
                init.signal(Signal::KILL)?;
            }
            // It collects its init and ends; one that still boots has none.
            if nspawn.wait_gone(Duration::from_secs(5)).is_err() {
                nspawn.signal(Signal::KILL)?;
                nspawn.wait_gone(Duration::from_secs(10))?;
            }
        }
        self.forget()
    }

    /// A clean power-off from inside, which stops every unit.
    pub fn shutdown(&self) -> Result<()> {
        let nspawn = self.running()?;
        self.run(["systemctl", "poweroff", "--no-block"])?.ok()?;
        nspawn.wait_gone(SHUTDOWN_DEADLINE).with_context(|| format!("{} does not shut down", self.name))?;
        self.forget()
    }

    /// A clean shutdown, then a boot with the same disk.
    pub fn reboot(&self) -> Result<()> {
        self.shutdown()?;
        self.boot()
    }

    /// Whether the host has power.
    pub fn is_up(&self) -> bool {
        self.init().is_ok()
    }

    /// After the end of nspawn: reaps it, and clears what stood for the running host.
    fn forget(&self) -> Result<()> {
        let mut live = self.live();
        live.notify = None;
        cgroup::remove(&self.name)?;
        if let Some(mut child) = live.child.take() {
            child.wait().context("cannot reap systemd-nspawn")?;
        }
        match fs::remove_file(self.dir.join("run.json")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Waits for a line on the socket where nspawn reports, or for nspawn's end.
    fn wait_notify(&self, socket: &UnixDatagram, nspawn: ProcessId, line: &str) -> Result<()> {
        let end = Instant::now() + BOOT_DEADLINE;
        socket.set_nonblocking(true)?;
        let mut buffer = [0; 4096];
        loop {
            while let Ok(n) = socket.recv(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..n]);
                if text.lines().any(|l| l.starts_with(line)) {
                    return Ok(());
                }
            }
            if !nspawn.is_alive() {
                bail!("{} did not boot:\n{}", self.name, self.console());
            }
            // A second at most, since nspawn's end does not wake this.
            let step = end.min(Instant::now() + Duration::from_secs(1));
            let mut fds = [PollFd::new(socket, PollFlags::IN)];
            if !poll_until(&mut fds, step)? && Instant::now() >= end {
                bail!("{} did not boot within {BOOT_DEADLINE:?}:\n{}", self.name, self.console());
            }
        }
    }

    /// The end of the console's output.
    fn console(&self) -> String {
        let log = fs::read(self.dir.join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(4000)..]).into_owned()
    }

    fn run_record(&self) -> Result<Option<RunRecord>> {
        read_record(&self.dir.join("run.json"))
    }

    /// The host's nspawn; an error when the host is down.
    fn running(&self) -> Result<ProcessId> {
        let nspawn = self.run_record()?.map(|r| r.nspawn).filter(|p| p.is_alive());
        nspawn.with_context(|| format!("{} is down", self.name))
    }

    /// The host's PID 1, as this machine numbers it.
    fn init(&self) -> Result<ProcessId> {
        init_of(self.running()?).with_context(|| format!("{} is down", self.name))
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- cable

    /// Pulls the network cable.
    pub fn cut(&self) -> Result<()> {
        outer(&["ip", "link", "set", &self.veth()?, "down"]).map(drop)
    }

    /// Nothing reaches the host any more; what it sends still leaves it.
    pub fn cut_incoming(&self) -> Result<()> {
        outer(&["tc", "qdisc", "replace", "dev", &self.veth()?, "root", "pfifo", "limit", "0"]).map(drop)
    }

    /// Nothing leaves the host any more; what is sent to it still arrives.
    pub fn cut_outgoing(&self) -> Result<()> {
        self.run(["tc", "qdisc", "replace", "dev", "host0", "root", "pfifo", "limit", "0"])?.ok().map(drop)
    }

    /// Makes the way to the host slow, such as `400kbit` a second: what has to wait is late, or is lost.
    pub fn slow_down(&self, rate: &str) -> Result<()> {
        let veth = self.veth()?;
        let argv = [
            "tc", "qdisc", "replace", "dev", &veth, "root", "tbf", "rate", rate, "burst", "4kb", "latency",
            "500ms",
        ];
        outer(&argv).map(drop)
    }

    /// Plugs the network cable in again, in whatever way it was cut or made slow.
    pub fn join(&self) -> Result<()> {
        let veth = self.veth()?;
        // A queue that takes nothing is how one way is cut; the default one is not shown with that limit.
        let queue = outer(&["tc", "qdisc", "show", "dev", &veth, "root"])?;
        if queue.contains("limit 0p") || queue.contains("qdisc tbf") {
            outer(&["tc", "qdisc", "del", "dev", &veth, "root"])?;
        }
        if self.run(["tc", "qdisc", "show", "dev", "host0", "root"])?.ok()?.stdout.contains("limit 0p") {
            self.run(["tc", "qdisc", "del", "dev", "host0", "root"])?.ok()?;
        }
        outer(&["ip", "link", "set", &veth, "up"]).map(drop)
    }

    /// The outer end of the host's cable, for `tc` and the like.
    pub fn veth(&self) -> Result<String> {
        let path = format!("/proc/{}/root/sys/class/net/host0/iflink", self.init()?.pid);
        let index = fs::read_to_string(&path).with_context(|| format!("{} has no network", self.name))?;
        for entry in fs::read_dir("/sys/class/net").context("cannot list the network links")? {
            let entry = entry?;
            let ifindex = fs::read_to_string(entry.path().join("ifindex")).unwrap_or_default();
            if ifindex.trim() == index.trim() {
                return Ok(entry.file_name().to_string_lossy().into_owned());
            }
        }
        bail!("{} has no cable", self.name)
    }

    // ---- commands

    /// A command in the host, to be refined and run.
    pub fn command<S: Into<OsString>>(&self, argv: impl IntoIterator<Item = S>) -> Command {
        self.command_in("/root", argv)
    }

    /// A command in the host with another working directory than /root.
    pub fn command_in<S: Into<OsString>>(&self, dir: &str, argv: impl IntoIterator<Item = S>) -> Command {
        let argv: Vec<OsString> = argv.into_iter().map(Into::into).collect();
        Command::in_host(&self.name, self.init().map(|init| init.pid), dir, &argv)
    }

    /// Runs a command to its end, with the default deadline.
    pub fn run<S: Into<OsString>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Output> {
        self.command(argv).run()
    }

    /// Runs a line of shell to its end, with the default deadline.
    pub fn sh(&self, script: &str) -> Result<Output> {
        self.run(["/bin/sh", "-c", script])
    }

    /// Waits until all that was logged before is in the journal, for those who read it themselves.
    pub fn sync_journal(&self) -> Result<()> {
        self.run(["journalctl", "--sync"])?.ok().map(drop)
    }

    /// The journal of this host, or of one unit on it, as text. Nothing that was logged before the call is missing: journald reads
    /// what it was sent by and by, and is waited for.
    pub fn journal(&self, unit: Option<&str>) -> Result<String> {
        self.sync_journal()?;
        let mut argv = vec!["journalctl", "--no-pager", "-o", "cat"];
        argv.extend(unit.iter().flat_map(|unit| ["-u", unit]));
        Ok(self.run(argv)?.ok()?.stdout)
    }

    /// Starts a command and returns at once; for streams and what runs alongside.
    pub fn start_process<S: Into<OsString>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Running> {
        self.command(argv).start()
    }

    /// Replaces this process by a command in the host; returns only the error when that fails.
    pub fn exec<S: Into<OsString>>(&self, argv: impl IntoIterator<Item = S>) -> anyhow::Error {
        self.command(argv).exec()
    }

    /// A login shell in the host on this process's terminal; returns when it ends.
    pub fn shell(&self) -> Result<std::process::ExitStatus> {
        // script gives it a terminal of the host's own, so that job control works.
        self.command(["script", "-qec", "/bin/bash -l", "/dev/null"]).attach()
    }

    // ---- files

    /// The way to a path of the host from outside, while it is up: mounts such as /run included.
    pub fn root_path(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = path.as_ref();
        let init = self.init()?;
        Ok(Path::new(&format!("/proc/{}/root", init.pid)).join(path.strip_prefix("/").unwrap_or(path)))
    }

    /// The way to a path on the host's disk, up or down; /run, /tmp and the like are not on it.
    pub fn disk_path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.disk().root().join(path.strip_prefix("/").unwrap_or(path))
    }

    fn any_path(&self, path: &Path) -> PathBuf {
        self.root_path(path).unwrap_or_else(|_| self.disk_path(path))
    }

    /// Writes a file, and the directories above it; mode 0644 if it is new.
    pub fn write(&self, path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> Result<()> {
        let to = self.any_path(path.as_ref());
        let write = || -> Result<()> {
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            Ok(fs::write(&to, bytes)?)
        };
        write().with_context(|| format!("{}: cannot write {}", self.name, path.as_ref().display()))
    }

    /// Reads a file.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        fs::read_to_string(self.any_path(path.as_ref()))
            .with_context(|| format!("{}: cannot read {}", self.name, path.as_ref().display()))
    }

    /// Whether a path exists.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.any_path(path.as_ref()).symlink_metadata().is_ok()
    }

    /// Copies a file of this machine into the host, with its mode.
    pub fn copy_in(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let from = from.as_ref();
        let mode = fs::metadata(from).with_context(|| format!("no {}", from.display()))?.mode() & 0o7777;
        put_file(from, &self.any_path(to.as_ref()), mode)
    }
}

/// The child of nspawn that is the host's init. Looked up each time: a reboot from inside makes a new one.
fn init_of(nspawn: ProcessId) -> Option<ProcessId> {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", nspawn.pid)).ok()?;
    children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).find_map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        // Its number in each PID namespace it is seen from: 1 in the innermost.
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        let innermost = numbers.split_ascii_whitespace().skip(1).last();
        (innermost == Some("1")).then(|| ProcessId::of(pid)).flatten()
    })
}
