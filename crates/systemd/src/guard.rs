//! The guard's side of things: what it was told, its clock and alarm, and what it does to units.
//!
//! The guard is a small process of its own (`fleetd guard`, run by systemd as [`UNIT`]). It has to stop units when
//! fleetd can't: because that was killed, hangs or is stopped. So all it is told is one file, which fleetd
//! replaces at each renewal of the machine's presence, all it tells is the marks it takes away, and it asks nothing of D-Bus: as root,
//! systemctl reaches systemd directly. When what is to be done is decided in `fleet_cluster::fencing`. Everything here blocks.
use crate::{Error, Guarded};
use fleet_unit::UnitName;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::OwnedFd,
    fs::inotify,
    time::{
        ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
        timerfd_create, timerfd_settime,
    },
};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::File,
    io::{self, ErrorKind, Read},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

/// The guard's unit, part of the package.
pub const UNIT: &str = "fleet-guard.service";
/// Where the guard looks for what it has to know.
pub const PATH: &str = "/run/fleet/guard";

/// The marks of units ([`crate::Mark`]), where the guard takes them away.
pub const MARKS: &str = "/run/fleet/launched";

/// The first line of the file; a guard does not read what it does not know.
const FORMAT: &str = "fleet-guard 1";
/// Names the life of the kernel, and so that of [`clock`].
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// More than all units of a machine take, bytes.
const MOST: u64 = 64 << 20;
/// How often the file is read where it can't be watched.
const UNWATCHED: Duration = Duration::from_millis(250);
/// Names on one command line.
const NAMES: usize = 200;

/// The time since the kernel booted, with the time it was suspended.
pub fn clock() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// For how long the machine has been suspended since the kernel booted, within some microseconds.
pub fn suspended() -> Duration {
    let awake = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(awake.tv_sec).unwrap_or(0);
    clock().saturating_sub(Duration::new(seconds, u32::try_from(awake.tv_nsec).unwrap_or(0)))
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// What the file says.
pub(crate) fn text(guarded: &Guarded) -> io::Result<String> {
    let mut text = format!(
        "{FORMAT}\nboot {}\nttl {}\nrenewed {}\n",
        boot_id()?,
        guarded.ttl.as_nanos(),
        guarded.renewed.as_nanos()
    );
    for (unit, timeout) in &guarded.units {
        let nanos = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        // Writing to a string can't fail.
        let _ = writeln!(text, "unit {nanos} {unit}");
    }
    Ok(text)
}

/// Reads what the guard was told; `None` when it was told nothing in this life of the kernel.
pub fn read(path: &Path) -> io::Result<Option<Guarded>> {
    let mut text = String::new();
    match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?.take(MOST).read_to_string(&mut text)?,
    };
    let wrong = || io::Error::new(ErrorKind::InvalidData, format!("{} is damaged", path.display()));
    let mut lines = text.lines();
    let mut value = |key: &str| lines.next()?.strip_prefix(key)?.strip_prefix(' ').map(str::to_owned);
    value("fleet-guard").filter(|format| format == "1").ok_or_else(wrong)?;
    if value("boot").ok_or_else(wrong)? != boot_id()? {
        return Ok(None);
    }
    let nanos = |text: &str| text.parse().ok().map(Duration::from_nanos);
    let ttl = value("ttl").as_deref().and_then(nanos).ok_or_else(wrong)?;
    let renewed = value("renewed").as_deref().and_then(nanos).ok_or_else(wrong)?;
    let unit = |line: &str| {
        let (timeout, name) = line.strip_prefix("unit ")?.split_once(' ')?;
        let timeout = if timeout == "18446744073709551615" { Some(Duration::MAX) } else { nanos(timeout) };
        Some((UnitName::parse(name).ok()?, timeout?))
    };
    let units = lines.map(unit).collect::<Option<BTreeMap<_, _>>>().ok_or_else(wrong)?;
    Ok(Some(Guarded { ttl, renewed, units }))
}

/// Wakes the guard: at a time of [`clock`], also where the machine was suspended until after it; and when what it was told
/// may have changed.
#[derive(Debug)]
pub struct Alarm {
    timer: OwnedFd,
    /// Tells of changes; without it they are looked for.
    changes: Option<OwnedFd>,
}

impl Alarm {
    /// Watches the file at `path`.
    pub fn new(path: &Path) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let changes = watch(path.parent().unwrap_or(Path::new("/"))).map_err(|error| {
            // Others on the machine can use up what there is of these, and the guard has to run all the same.
            tracing::warn!(
                "{} can't be watched ({error}; see fs.inotify in sysctl(8)), so it is read often",
                path.display()
            );
        });
        Ok(Alarm { timer, changes: changes.ok() })
    }

    /// Waits for a change, and not longer than to `at`.
    pub fn wait(&self, at: Option<Duration>) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let at = match self.changes {
            Some(_) => at,
            None => Some(at.unwrap_or(Duration::MAX).min(clock() + UNWATCHED)),
        };
        // A time of zero would disarm it; as good as never is never, since it takes no larger numbers.
        let at = at.map(|at| at.clamp(Duration::from_nanos(1), Duration::from_secs(1 << 40)));
        let value = at.map_or(zero, |at| Timespec {
            tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: at.subsec_nanos().into(),
        });
        let setting = Itimerspec { it_interval: zero, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &setting)?;
        let mut fds = vec![PollFd::new(&self.timer, PollFlags::IN)];
        fds.extend(self.changes.as_ref().map(|changes| PollFd::new(changes, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        // Only that there was something counts.
        let mut buffer = [0; 4096];
        if let Some(changes) = &self.changes {
            while let Ok(1..) = rustix::io::read(changes, &mut buffer) {}
        }
        Ok(())
    }
}

fn watch(directory: &Path) -> io::Result<OwnedFd> {
    let changes = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    let what = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::DELETE;
    inotify::add_watch(&changes, directory, what)?;
    Ok(changes)
}

/// The active states of units, as systemd says them: `active`, `inactive`, `deactivating`, …
pub fn states(units: &[&UnitName]) -> Result<Vec<String>, Error> {
    let mut states = Vec::with_capacity(units.len());
    for some in units.chunks(NAMES) {
        let output = systemctl(&["is-active"], some)?;
        let lines: Vec<&str> = output.lines().collect();
        if lines.len() != some.len() {
            return Err(Error::Unreachable(format!(
                "systemctl gave {} states for {}",
                lines.len(),
                some.len()
            )));
        }
        states.extend(lines.into_iter().map(str::to_owned));
    }
    Ok(states)
}

/// Takes the marks of units away (`marks`: where they are), so that no fleetd takes a unit that was stopped for one that ended by
/// itself. A mark that can't be taken away is only logged: stopping counts for more.
pub fn unmark(marks: &Path, units: &[&UnitName]) {
    for unit in units {
        let path = marks.join(unit.as_str());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::error!("{} can't be deleted: {error}", path.display());
            }
            _ => {}
        }
    }
}

/// Has units stopped; does not wait for the end of that.
pub fn stop(units: &[&UnitName]) -> Result<(), Error> {
    units.chunks(NAMES).try_for_each(|some| systemctl(&["stop", "--no-block"], some).map(drop))
}

/// Kills all processes of units.
pub fn kill(units: &[&UnitName]) -> Result<(), Error> {
    units.chunks(NAMES).try_for_each(|some| systemctl(&["kill", "--signal=SIGKILL"], some).map(drop))
}

/// Runs systemctl; its exit code is not looked at: it tells of states, and of units that are gone meanwhile.
fn systemctl(verb: &[&str], units: &[&UnitName]) -> Result<String, Error> {
    let names = units.iter().map(|unit| unit.as_str());
    let output = Command::new("systemctl")
        .arg("--no-ask-password")
        .args(verb)
        .arg("--")
        .args(names)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| Error::Unreachable(format!("systemctl can't be run: {error}")))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    if !complaint.trim().is_empty() {
        tracing::info!("systemctl {}: {}", verb[0], complaint.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guarded(units: &[(&str, Duration)]) -> Guarded {
        let units = units.iter().map(|(unit, timeout)| (UnitName::parse(unit).unwrap(), *timeout)).collect();
        Guarded { ttl: Duration::from_secs(30), renewed: Duration::from_nanos(12_345), units }
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guard");
        assert_eq!(read(&path).unwrap(), None);
        for told in [
            guarded(&[]),
            guarded(&[("a.service", Duration::from_millis(90_500)), ("b@x\\x2d1.service", Duration::MAX)]),
        ] {
            crate::files::tell_guard(&path, Some(&told)).unwrap();
            assert_eq!(read(&path).unwrap(), Some(told));
        }
        let good = std::fs::read_to_string(&path).unwrap();
        for bad in [
            "",
            "rubbish",
            &good.replace("fleet-guard 1", "fleet-guard 2"),
            &good.replace("ttl ", "ttl -"),
            &good.replace("unit ", "unit x"),
            &good[..good.len() - 5],
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(read(&path).is_err(), "{bad}");
        }
        // Of another life of the kernel, whose clock began anew.
        std::fs::write(&path, good.replace("boot ", "boot 0")).unwrap();
        assert_eq!(read(&path).unwrap(), None);
        crate::files::tell_guard(&path, None).unwrap();
        crate::files::tell_guard(&path, None).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn only_marks_of_these_units_are_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        for unit in ["a.service", "b@x\\x2d1.service", "c.service"] {
            std::fs::write(directory.path().join(unit), "").unwrap();
        }
        let units =
            ["a.service", "b@x\\x2d1.service", "gone.service"].map(|unit| UnitName::parse(unit).unwrap());
        unmark(directory.path(), &units.iter().collect::<Vec<_>>());
        let left: Vec<_> =
            std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["c.service"]);
    }

    #[test]
    fn the_alarm_wakes_at_its_time_and_when_something_changes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("guard");
        let alarm = Alarm::new(&path).unwrap();
        let at = clock() + Duration::from_millis(20);
        alarm.wait(Some(at)).unwrap();
        assert!(clock() >= at);
        // One that is past wakes at once.
        alarm.wait(Some(Duration::ZERO)).unwrap();
        for told in [Some(guarded(&[])), None] {
            crate::files::tell_guard(&path, told.as_ref()).unwrap();
            alarm.wait(None).unwrap();
        }
        // Where nothing can be watched it wakes without a word.
        let alarm = Alarm::new(&path.join("not/there")).unwrap();
        alarm.wait(None).unwrap();
        let at = clock() + Duration::from_millis(20);
        alarm.wait(Some(at)).unwrap();
        assert!(clock() >= at);
    }
}
