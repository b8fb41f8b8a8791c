//! A control group of its own for every host, in every hierarchy of this machine.
//!
//! Without it systemd-nspawn puts the hosts of all clusters into one subtree: their systemds would
//! then share /system.slice/NAME.service, could not list or kill its processes and would never see it
//! become empty. It is also what finds the processes of a host whatever happened to their parents.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;

use crate::command::HOST_PATH;
use crate::state::ProcessId;

/// A mounted hierarchy.
struct Hierarchy {
    mount: PathBuf,
    /// The group in it that new groups go into.
    parent: PathBuf,
}

/// The hierarchies of this machine.
fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let own = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let mut all = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, mount, kind @ ("cgroup" | "cgroup2"), options, ..] = fields[..] else { continue };
        let mount = PathBuf::from(mount);
        let mut parent = mount.clone();
        // Groups that only carry limits nest in this process's own, so that limits set on it hold for
        // the hosts too. Those by which systemd tells its services apart stand at the top, where no
        // manager of this machine takes them for its own.
        if kind == "cgroup" && !options.contains("name=systemd") {
            let options: Vec<&str> = options.split(',').collect();
            let path = own.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                controllers.split(',').all(|c| options.contains(&c)).then_some(path)
            });
            let nested = mount.join(path.unwrap_or("/").trim_start_matches('/'));
            if nested.is_dir() {
                parent = nested;
            }
        }
        all.push(Hierarchy { mount, parent });
    }
    if all.is_empty() {
        bail!("no cgroup hierarchy is mounted on this machine: mount one on /sys/fs/cgroup");
    }
    Ok(all)
}

fn group_name(name: &str) -> String {
    format!("fleet-testbed-{name}")
}

/// Starts a program of this machine in groups called `name`, in a session of its own, with its output
/// appended to `log`.
pub(crate) fn spawn(name: &str, argv: &[&str], env: &[(&str, &str)], log: &Path) -> Result<Child> {
    let name = group_name(name);
    let groups: Vec<PathBuf> = hierarchies()?.into_iter().map(|h| h.parent.join(&name)).collect();
    for group in &groups {
        match fs::create_dir(group) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make {}", group.display()));
            }
            _ => {}
        }
        // A new group of the old cpuset hierarchy takes no process before it has these.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if let (Some(parent), Ok(have)) = (group.parent(), fs::read_to_string(group.join(file)))
                && have.trim().is_empty()
                && let Ok(all) = fs::read_to_string(parent.join(file))
                && !group.join("cgroup.controllers").exists()
            {
                fs::write(group.join(file), all.trim())
                    .with_context(|| format!("cannot write {}/{file}", group.display()))?;
            }
        }
    }
    let open = || File::options().create(true).append(true).open(log);
    let log_file = open().with_context(|| format!("cannot open {}", log.display()))?;
    // The shell enters the groups and then becomes the program: same process, number known at once.
    // It leads no process group, so setsid does not fork either.
    let script = r#"while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 125; shift; done
shift; exec setsid "$@""#;
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script, "sh"]).args(&groups).arg("--").args(argv);
    command.env_clear().env("PATH", HOST_PATH).envs(env.iter().copied());
    command.stdin(Stdio::null()).stdout(log_file.try_clone()?).stderr(log_file);
    command.spawn().with_context(|| format!("cannot start {}", argv.first().unwrap_or(&"")))
}

/// Kills every process in the groups called `name` and removes the groups.
pub(crate) fn remove(name: &str) -> Result<()> {
    let name = group_name(name);
    let mut dirs = Vec::new();
    for hierarchy in hierarchies()? {
        tree(&hierarchy.mount, &mut dirs);
    }
    // Wherever they were made: this process need not be in the group that their maker was in.
    for group in dirs.iter().filter(|dir| dir.file_name().is_some_and(|file| file == name.as_str())) {
        for _ in 0..100 {
            let mut dirs = Vec::new();
            tree(group, &mut dirs);
            let mut processes = Vec::new();
            for dir in &dirs {
                let list = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                processes.extend(list.lines().filter_map(|l| l.parse().ok()).filter_map(ProcessId::of));
            }
            for process in &processes {
                process.signal(Signal::KILL)?;
            }
            for process in &processes {
                process.wait_gone(Duration::from_secs(10))?;
            }
            if dirs.iter().rev().all(|dir| fs::remove_dir(dir).is_ok()) {
                break;
            }
            // The kernel counts a process in its group until the last of it is gone, and the old
            // hierarchies tell nobody when that is.
            std::thread::sleep(Duration::from_millis(10));
        }
        if group.exists() {
            bail!("cannot remove {}: it is not empty", group.display());
        }
    }
    Ok(())
}

/// `dir` and all below it, parents first.
fn tree(dir: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    into.push(dir.to_owned());
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            tree(&entry.path(), into);
        }
    }
}
