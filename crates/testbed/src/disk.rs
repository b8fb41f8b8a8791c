//! What differs between a new host's disk and this machine's root: the overlay's upper layer, made
//! before it is mounted.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::command::outer;

/// Directories of this machine that a host starts without, empty.
const EMPTY: &[&str] = &[
    // Nothing that this machine enables starts in a host.
    "/etc/systemd/system",
    "/etc/init.d",
    // What its services keep, and its people.
    "/etc/docker",
    "/etc/fleet",
    "/etc/ssh",
    "/root",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lib/docker-registry",
    "/var/lib/etcd",
    "/var/lib/fleet",
    "/var/log",
    // Holds the hosts' own disks.
    "/var/tmp",
];

/// Units that make no sense in a host, or make its boot slow.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "man-db.timer",
    "systemd-logind.service",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
];

/// Gives the host its address. A part of the host's own boot, so that whatever is ordered after the
/// network finds it, after each boot.
const NETWORK_UNIT: &str = "\
[Unit]
Description=Address on the cluster's bridge
DefaultDependencies=no
Wants=network.target
Before=network-pre.target network.target network-online.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/ip -batch /etc/host0.ip
";

/// All that was logged can be read: also when much is logged at once, and when the disk of this machine is nearly full, where journald would
/// throw away what is older.
const JOURNAL: &str = "[Journal]\nRateLimitIntervalSec=0\nSystemKeepFree=1M\nRuntimeKeepFree=1M\n";

/// Who a host is.
pub(crate) struct Identity<'a> {
    pub name: &'a str,
    pub machine_id: &'a str,
    pub ip: &'a str,
    pub gateway: &'a str,
    /// Lines of /etc/hosts for all hosts of the cluster.
    pub hosts: &'a str,
}

/// A host's disk: `up` and `work` for the overlay, mounted on `root`.
pub(crate) struct Disk {
    dir: PathBuf,
}

impl Disk {
    pub(crate) fn at(host_dir: &Path) -> Disk {
        Disk { dir: host_dir.to_owned() }
    }

    /// Where the disk is mounted.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// The upper layer; not to be changed while mounted.
    pub(crate) fn upper(&self) -> PathBuf {
        self.dir.join("disk/up")
    }

    /// Makes a new disk.
    pub(crate) fn create(&self, who: &Identity<'_>) -> Result<()> {
        // A root in several pieces shows only its own file system to the overlay.
        let device = |path: &str| fs::metadata(path).map(|m| m.dev()).with_context(|| format!("no {path}"));
        for path in ["/usr", "/etc"] {
            if device(path)? != device("/")? {
                bail!(
                    "{path} is a file system of its own on this machine; hosts need it on the root file system"
                );
            }
        }
        let up = self.upper();
        for dir in [&up, &self.dir.join("disk/work"), &self.root()] {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        fs::set_permissions(&up, fs::Permissions::from_mode(0o755))?;
        for dir in EMPTY {
            make_dir(&up, dir)?;
            xattr::set(up.join(&dir[1..]), "trusted.overlay.opaque", b"y").with_context(|| {
                format!(
                    "cannot set trusted.* attributes under {}: hosts need ext4, xfs or btrfs there",
                    up.display()
                )
            })?;
        }
        let units = up.join("etc/systemd/system");
        for unit in MASKED {
            symlink("/dev/null", units.join(unit))?;
        }
        fs::write(units.join("host-network.service"), NETWORK_UNIT)?;
        make_dir(&up, "/etc/systemd/system/sysinit.target.wants")?;
        symlink("../host-network.service", units.join("sysinit.target.wants/host-network.service"))?;

        let etc = up.join("etc");
        let network = format!(
            "link set lo up\naddr add {}/24 dev host0\nlink set host0 up\nroute add default via {}\n",
            who.ip, who.gateway
        );
        fs::write(etc.join("host0.ip"), network)?;
        fs::write(etc.join("machine-id"), format!("{}\n", who.machine_id))?;
        fs::write(etc.join("hostname"), format!("{}\n", who.name))?;
        fs::write(etc.join("hosts"), format!("127.0.0.1 localhost\n{}", who.hosts))?;
        fs::write(etc.join("fstab"), "")?;
        // Empty: with a name server that is out of reach every look-up takes 20 s to fail.
        fs::write(etc.join("resolv.conf"), "")?;
        // Keeps the journal on the disk.
        make_dir(&up, "/var/log/journal")?;
        make_dir(&up, "/etc/systemd/journald.conf.d")?;
        fs::write(etc.join("systemd/journald.conf.d/testbed.conf"), JOURNAL)?;
        Ok(())
    }

    /// Mounts the disk unless it is.
    pub(crate) fn mount(&self) -> Result<()> {
        if self.is_mounted()? {
            return Ok(());
        }
        let (upper, work) = (self.upper(), self.dir.join("disk/work"));
        let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
        let options = std::ffi::CString::new(options).context("NUL in a path")?;
        rustix::mount::mount("overlay", self.root(), "overlay", MountFlags::empty(), options.as_c_str())
            .with_context(|| {
                format!(
                    "cannot mount an overlay with its upper layer under {}: it needs the kernel's overlay \
                     module and a disk file system there that is no overlay itself",
                    self.dir.display()
                )
            })
    }

    /// Unmounts the disk if it is mounted.
    pub(crate) fn unmount(&self) -> Result<()> {
        while self.is_mounted()? {
            // Detached: a shell that stands in it must not keep the cluster up.
            rustix::mount::unmount(self.root(), UnmountFlags::DETACH)
                .with_context(|| format!("cannot unmount {}", self.root().display()))?;
        }
        Ok(())
    }

    fn is_mounted(&self) -> Result<bool> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
        let root = self.root();
        Ok(mounts.lines().any(|line| line.split(' ').nth(1).is_some_and(|at| Path::new(at) == root)))
    }
}

/// Makes a directory and its parents in an upper layer (or a host's root), with the owners and modes that they have on
/// this machine: for a directory in both layers the upper one's count.
pub(crate) fn make_dir(upper: &Path, dir: &str) -> Result<()> {
    let (mut below, mut real) = (upper.to_owned(), PathBuf::from("/"));
    for part in dir.split('/').filter(|part| !part.is_empty()) {
        below.push(part);
        real.push(part);
        if below.is_dir() {
            continue;
        }
        fs::create_dir(&below).with_context(|| format!("cannot make {}", below.display()))?;
        let (mode, uid, gid) = match fs::metadata(&real) {
            Ok(meta) => (meta.mode() & 0o7777, meta.uid(), meta.gid()),
            Err(_) => (0o755, 0, 0),
        };
        chown(&below, Some(uid), Some(gid))?;
        fs::set_permissions(&below, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// A new machine ID.
pub(crate) fn new_machine_id() -> Result<String> {
    let uuid =
        fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random UUID from the kernel")?;
    Ok(uuid.trim().replace('-', ""))
}

/// Copies a file of this machine to `to`; by a hard link where both are on one file system.
pub(crate) fn put_file(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let put = || -> Result<()> {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::remove_file(to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let same_mode = fs::metadata(from)?.mode() & 0o7777 == mode;
        if same_mode && fs::hard_link(from, to).is_ok() {
            return Ok(());
        }
        // By a process of its own: what another thread starts meanwhile would hold the copy open for a moment, and what is open for
        // writing can't be executed ("Text file busy").
        outer(&["cp".as_ref(), "--".as_ref(), from.as_os_str(), to.as_os_str()])?;
        fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    put().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Removes a directory tree that may hold an overlay's work directory.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        // Files with the immutable flag, made by something inside a host, need another way.
        Err(_) => {
            let path = dir.to_string_lossy();
            // No chattr, or nothing it can do: the removal below tells.
            let _ = outer(&["chattr", "-R", "-i", &*path]);
            fs::remove_dir_all(dir).with_context(|| format!("cannot remove {path}"))
        }
    }
}
