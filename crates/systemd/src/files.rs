//! fleet's files on a machine: the unit files in the units directory and the marks of what was launched.
//!
//! Everything here blocks for the moment a small file takes; callers on the async side use a blocking thread.
use crate::{Error, Guarded, Mark, dbus::Directories, guard};
use fleet_unit::{Hash, UnitFile, UnitName, file::MAX_SIZE};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

/// Where systemd looks for links made until the next boot.
pub(crate) const RUNTIME_LINKS: &str = "/run/systemd/system";
/// How a file under construction is called; no unit's name begins so and ends with its number.
const TEMPORARY: &str = ".fleet-new-";

/// What [`write_unit`] found and did.
#[derive(Debug, Default)]
pub(crate) struct Written {
    /// The text that was there before.
    pub before: Option<String>,
    /// Whether the file was written, as opposed to found as it should be.
    pub changed: bool,
}

fn failed(path: &Path, error: io::Error) -> Error {
    let reason = match error.kind() {
        ErrorKind::StorageFull => "no space left on its file system".to_owned(),
        ErrorKind::ReadOnlyFilesystem => "its file system is read-only".to_owned(),
        ErrorKind::PermissionDenied => "permission denied; fleetd has to own this directory".to_owned(),
        _ => error.to_string(),
    };
    Error::File { path: path.display().to_string(), reason }
}

/// The path of a unit's file.
pub(crate) fn of_unit(directories: &Directories, unit: &UnitName) -> PathBuf {
    directories.units.join(unit.as_str())
}

/// Whether the unit's name is linked to its file in the units directory.
pub(crate) fn is_linked(directories: &Directories, unit: &UnitName) -> bool {
    fs::read_link(Path::new(RUNTIME_LINKS).join(unit.as_str()))
        .is_ok_and(|target| target == of_unit(directories, unit))
}

/// Refuses a unit whose name, or an alias it asks for, is another's in one of systemd's directories: be it that
/// the other would win over ours (a mask, for one) or ours over it.
///
/// A template of the same family is no obstacle for an instance: systemd reads the instance's own file first.
pub(crate) fn check_free(
    directories: &Directories,
    search: &[PathBuf],
    unit: &UnitName,
    file: &UnitFile,
) -> Result<(), Error> {
    // systemd.unit(5) allows the name, but systemd passes over such files when it reads a directory.
    if unit.as_str().starts_with('.') {
        return Err(Error::Refused(format!(
            "systemd would not see a file called {unit}, since the name begins with a dot; rename the unit"
        )));
    }
    let ours = of_unit(directories, unit);
    let aliases = file
        .values("Install", "Alias")
        .flat_map(str::split_whitespace)
        // What systemd would not take as a name it will refuse itself, with its own words.
        .filter_map(|alias| UnitName::parse(alias).ok());
    for name in std::iter::once(unit.clone()).chain(aliases) {
        for directory in search {
            let path = directory.join(name.as_str());
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            let is_ours = directory == Path::new(RUNTIME_LINKS)
                && metadata.is_symlink()
                && fs::read_link(&path).is_ok_and(|target| target == ours);
            if !is_ours {
                return Err(Error::Taken { name, path: path.display().to_string() });
            }
        }
    }
    Ok(())
}

/// Writes a unit's file, unless it is there with the same text.
pub(crate) fn write_unit(directories: &Directories, unit: &UnitName, text: &str) -> Result<Written, Error> {
    let path = of_unit(directories, unit);
    let before = match read_bounded(&path) {
        Ok(before) => Some(before),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidData) => None,
        Err(error) => return Err(failed(&path, error)),
    };
    if before.as_deref() == Some(text) {
        return Ok(Written { before, changed: false });
    }
    // systemd sees that a loaded file changed by its time being later: so it must be, even when the clock was set
    // back or did not tick in between. systemd counts microseconds.
    let after = fs::symlink_metadata(&path).and_then(|m| m.modified()).ok();
    write_atomically(&path, text.as_bytes(), after).map_err(|error| failed(&path, error))?;
    Ok(Written { before, changed: true })
}

/// Deletes a unit's file; one that is gone is fine.
pub(crate) fn delete_unit(directories: &Directories, unit: &UnitName) -> Result<(), Error> {
    delete(&of_unit(directories, unit))
}

/// The unit's file, if it is here and can be read.
pub(crate) fn read_unit(directories: &Directories, unit: &UnitName) -> Option<UnitFile> {
    UnitFile::parse(&read_bounded(&of_unit(directories, unit)).ok()?).ok()
}

/// The unit files in the units directory. Other things lying there are named in the log and left alone; what a
/// killed fleetd was about to write is deleted.
pub(crate) fn list_units(directories: &Directories) -> Result<BTreeMap<UnitName, UnitFile>, Error> {
    let mut found = BTreeMap::new();
    for entry in entries(&directories.units)? {
        let path = directories.units.join(&entry);
        let parsed = entry
            .to_str()
            .and_then(|name| UnitName::parse(name).ok())
            .filter(|_| fs::symlink_metadata(&path).is_ok_and(|m| m.is_file()))
            .ok_or_else(|| "it is not a unit file".to_owned())
            .and_then(|name| {
                let text = read_bounded(&path).map_err(|error| error.to_string())?;
                let file = UnitFile::parse(&text).map_err(|error| error.to_string())?;
                Ok((name, file))
            });
        match parsed {
            Ok((name, file)) => {
                found.insert(name, file);
            }
            Err(reason) => tracing::warn!(path = %path.display(), reason, "leaving a stray file alone"),
        }
    }
    Ok(found)
}

/// Notes that a unit was started in this life of the machine (`boot`), or forgets it.
pub(crate) fn mark(
    directories: &Directories,
    boot: &str,
    unit: &UnitName,
    mark: Option<Mark>,
) -> Result<(), Error> {
    let path = directories.launched.join(unit.as_str());
    let text = match mark {
        Some(Mark::Launched(hash)) => format!("{hash} {boot}\n"),
        Some(Mark::Starting(hash)) => format!("{hash} {boot} starting\n"),
        Some(Mark::Inherited(hash)) => format!("{hash} {boot} inherited\n"),
        None => return delete(&path),
    };
    write_atomically(&path, text.as_bytes(), None).map_err(|error| failed(&path, error))
}

/// Marks units that were here before fleet first ran in this life of the machine (`boot`): those that another fleet, the
/// original, left. To be called before anything else touches the marks: that fleet ran shows in their directory.
pub(crate) fn mark_inherited(
    directories: &Directories,
    boot: &str,
    units: &BTreeMap<UnitName, UnitFile>,
) -> Result<(), Error> {
    if directories.launched.is_dir() {
        return Ok(());
    }
    // All of them or none, should fleetd be killed meanwhile: the directory appears with the marks in it.
    let mut made = OsString::from(&directories.launched);
    made.push(TEMPORARY);
    let made = Directories { launched: made.into(), ..directories.clone() };
    entries(&made.launched)?;
    for (unit, file) in units {
        mark(&made, boot, unit, Some(Mark::Inherited(file.hash())))?;
    }
    fs::rename(&made.launched, &directories.launched).map_err(|error| failed(&directories.launched, error))
}

/// Writes what the guard has to know; `None`: that there is nothing.
pub(crate) fn tell_guard(path: &Path, guarded: Option<&Guarded>) -> Result<(), Error> {
    let written = || match guarded {
        Some(guarded) => write_atomically(path, guard::text(guarded)?.as_bytes(), None),
        None => match fs::remove_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result,
        },
    };
    written().map_err(|error| failed(path, error))
}

/// The marks made in this life of the machine. Those of an earlier one (in a container /run may survive) say
/// nothing any more and are deleted.
pub(crate) fn list_marks(directories: &Directories, boot: &str) -> Result<BTreeMap<UnitName, Mark>, Error> {
    let mut marks = BTreeMap::new();
    for entry in entries(&directories.launched)? {
        let path = directories.launched.join(&entry);
        let mark = entry.to_str().and_then(|name| UnitName::parse(name).ok()).and_then(|name| {
            let text = read_bounded(&path).ok()?;
            let (hash, then) = text.trim_end().split_once(' ')?;
            let hash = Hash::parse(hash)?;
            match then.strip_prefix(boot)? {
                "" => Some((name, Mark::Launched(hash))),
                " starting" => Some((name, Mark::Starting(hash))),
                " inherited" => Some((name, Mark::Inherited(hash))),
                _ => None,
            }
        });
        match mark {
            Some((name, hash)) => {
                marks.insert(name, hash);
            }
            None => {
                tracing::info!(path = %path.display(), "deleting a mark from before the machine's boot");
                delete(&path)?;
            }
        }
    }
    Ok(marks)
}

/// Writes a file that nobody reads before it is complete.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), Error> {
    write_atomically(path, text.as_bytes(), None).map_err(|error| failed(path, error))
}

/// Does file work where it may block.
pub(crate) async fn off_the_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::Refused(format!("work on files was broken off: {error}"))))
}

/// The names in a directory without leftovers of writing, which are deleted. Makes the directory.
pub(crate) fn entries(directory: &Path) -> Result<Vec<OsString>, Error> {
    make_directory(directory).map_err(|error| failed(directory, error))?;
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| failed(directory, error))? {
        let name = entry.map_err(|error| failed(directory, error))?.file_name();
        if name.as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            delete(&directory.join(&name))?;
        } else {
            names.push(name);
        }
    }
    Ok(names)
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let limit = MAX_SIZE as u64 + 1;
    // Not blocking: what lies there may be a pipe.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)?;
    if file.take(limit).read_to_string(&mut text)? > MAX_SIZE {
        return Err(io::Error::new(ErrorKind::InvalidData, "it is larger than a unit file may be"));
    }
    Ok(text)
}

/// Deletes a file; one that is gone is fine.
pub(crate) fn delete(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(path, error)),
        _ => Ok(()),
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Puts a complete file in the place of `path`, or leaves things as they were. Its time is later than `after`.
fn write_atomically(path: &Path, bytes: &[u8], after: Option<SystemTime>) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let directory = path.parent().unwrap_or(Path::new("/"));
    make_directory(directory)?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = directory.join(format!("{TEMPORARY}{}-{count}", std::process::id()));
    let written = (|| {
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        // Whatever the umask is: systemctl cat is for everybody.
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(bytes)?;
        if let Some(after) = after
            && file.metadata()?.modified()? <= after + Duration::from_micros(1)
        {
            file.set_modified(after + Duration::from_micros(2))?;
        }
        drop(file);
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> UnitName {
        UnitName::parse(text).unwrap()
    }

    fn directories(root: &tempfile::TempDir) -> Directories {
        Directories {
            units: root.path().join("fleet/units"),
            launched: root.path().join("fleet/launched"),
            starts: root.path().join("fleet/starts"),
            guard: root.path().join("fleet/guard"),
        }
    }

    fn names(path: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn writing_a_unit() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(&root);
        let unit = name("a.service");
        let path = of_unit(&directories, &unit);
        assert!(write_unit(&directories, &unit, "[Unit]\n").unwrap().changed);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(fs::metadata(&directories.units).unwrap().permissions().mode() & 0o777, 0o755);

        let time = fs::metadata(&path).unwrap().modified().unwrap();
        assert!(!write_unit(&directories, &unit, "[Unit]\n").unwrap().changed);
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), time, "an identical file is left alone");

        // As if the clock had been set back since.
        let future = SystemTime::now() + Duration::from_secs(3600);
        File::options().write(true).open(&path).unwrap().set_modified(future).unwrap();
        let written = write_unit(&directories, &unit, "[Service]\n").unwrap();
        assert!(written.changed);
        assert_eq!(written.before.as_deref(), Some("[Unit]\n"));
        assert!(fs::metadata(&path).unwrap().modified().unwrap() > future);
        assert_eq!(names(&directories.units), ["a.service"]);

        delete_unit(&directories, &unit).unwrap();
        delete_unit(&directories, &unit).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_name_of_the_full_length() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(&root);
        let unit = name(&format!("{}.service", "a".repeat(247)));
        write_unit(&directories, &unit, "[Unit]\n").unwrap();
        assert_eq!(names(&directories.units), [unit.as_str()]);
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_half_written() {
        let root = tempfile::tempdir().unwrap();
        let mut directories = directories(&root);
        // A directory in place of the file makes the last step fail, the rename.
        directories.units = root.path().to_owned();
        fs::create_dir(root.path().join("a.service")).unwrap();
        let error = write_unit(&directories, &name("a.service"), "[Unit]\n").unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error}");
        assert_eq!(names(root.path()), ["a.service"]);
    }

    #[test]
    fn strays_are_left_alone_and_leftovers_deleted() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(&root);
        assert!(list_units(&directories).unwrap().is_empty());
        write_unit(&directories, &name("a.service"), "[Unit]\nDescription=A\n").unwrap();
        fs::write(directories.units.join("README"), "x").unwrap();
        fs::write(directories.units.join("binary.service"), [0xff, 0]).unwrap();
        fs::create_dir(directories.units.join("sub.service")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", directories.units.join("link.service")).unwrap();
        let leftover = directories.units.join(format!("{TEMPORARY}1-1"));
        fs::write(&leftover, "[Un").unwrap();
        let found = list_units(&directories).unwrap();
        assert_eq!(found.keys().map(UnitName::as_str).collect::<Vec<_>>(), ["a.service"]);
        assert_eq!(
            names(&directories.units),
            ["README", "a.service", "binary.service", "link.service", "sub.service"]
        );
    }

    #[test]
    fn marks_count_in_one_life_of_the_machine_only() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(&root);
        let (launched, starting) = (Mark::Launched(Hash([7; 20])), Mark::Starting(Hash([8; 20])));
        mark(&directories, "boot-1", &name("a.service"), Some(starting)).unwrap();
        mark(&directories, "boot-1", &name("a.service"), Some(launched)).unwrap();
        mark(&directories, "boot-1", &name("b.service"), Some(launched)).unwrap();
        mark(&directories, "boot-1", &name("s.service"), Some(starting)).unwrap();
        mark(&directories, "boot-10", &name("o.service"), Some(launched)).unwrap();
        mark(&directories, "boot-1", &name("b.service"), None).unwrap();
        mark(&directories, "boot-1", &name("b.service"), None).unwrap();
        fs::write(directories.launched.join("c.service"), "rubbish").unwrap();
        let marks = list_marks(&directories, "boot-1").unwrap();
        assert_eq!(marks, BTreeMap::from([(name("a.service"), launched), (name("s.service"), starting)]));
        assert!(list_marks(&directories, "boot-2").unwrap().is_empty());
        assert!(list_marks(&directories, "boot-1").unwrap().is_empty());
    }

    #[test]
    fn what_is_here_before_the_first_run_is_inherited() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(&root);
        let unit = |text: &str| {
            write_unit(&directories, &name(text), "[Unit]\n").unwrap();
            list_units(&directories).unwrap()
        };
        let found = unit("a.service");
        let hash = found[&name("a.service")].hash();
        mark_inherited(&directories, "boot-1", &found).unwrap();
        let marks = BTreeMap::from([(name("a.service"), Mark::Inherited(hash))]);
        assert_eq!(list_marks(&directories, "boot-1").unwrap(), marks);
        // What comes later is not.
        mark_inherited(&directories, "boot-1", &unit("b.service")).unwrap();
        assert_eq!(list_marks(&directories, "boot-1").unwrap(), marks);
        assert_eq!(names(&root.path().join("fleet")), ["launched", "units"]);
    }

    #[test]
    fn names_of_others() {
        let root = tempfile::tempdir().unwrap();
        let directories = directories(&root);
        let (etc, lib) = (root.path().join("etc"), root.path().join("lib"));
        fs::create_dir(&etc).unwrap();
        fs::create_dir(&lib).unwrap();
        let search = [etc.clone(), PathBuf::from(RUNTIME_LINKS), lib.clone()];
        let plain = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
        let unit = name("fleet-test-of-names@1.service");
        assert_eq!(check_free(&directories, &search, &unit, &plain), Ok(()));
        // Its template is no obstacle.
        fs::write(lib.join("fleet-test-of-names@.service"), "").unwrap();
        assert_eq!(check_free(&directories, &search, &unit, &plain), Ok(()));
        // A mask is.
        let mask = etc.join(unit.as_str());
        std::os::unix::fs::symlink("/dev/null", &mask).unwrap();
        let taken = Error::Taken { name: unit.clone(), path: mask.display().to_string() };
        assert_eq!(check_free(&directories, &search, &unit, &plain), Err(taken));
        // And so is the owner of an alias.
        let alias = UnitFile::parse("[Install]\nAlias=x.service other.service\n").unwrap();
        assert_eq!(check_free(&directories, &search, &name("b.service"), &alias), Ok(()));
        fs::write(lib.join("other.service"), "").unwrap();
        let error = check_free(&directories, &search, &name("b.service"), &alias).unwrap_err();
        assert!(matches!(error, Error::Taken { name, .. } if name.as_str() == "other.service"));
    }
}
