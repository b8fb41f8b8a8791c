//! Checking a registry that is not open, and saving what can be saved of a damaged one.
//!
//! The damaged file itself is never written to: redb works on an [`Overlay`]. Records whose checksum is
//! right are taken from the file; only where the file can't be read is the backup asked, so that a unit
//! destroyed since the backup does not come back.
use super::{
    backend::{Health, Overlay},
    backup::{self, Backup},
    disk::{self, Marker, load, open_database, records_table, sync_directory},
    error::{Age, OpenError},
    memory::Record,
    record::{FORMAT, Meta, decode},
};
use crate::store::Revision;
use redb::{Database, ReadOnlyTable, ReadableDatabase};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File},
    io,
    ops::Bound,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// How far a repair moves the revisions on, so that none of those the lost part may have given comes
/// again: more than years of commits.
const JUMP: Revision = 1 << 32;
/// The most keys named in a report.
const NAMED: usize = 20;

/// What a check found. Display is text for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The file.
    pub file: PathBuf,
    /// Its size, bytes.
    pub size: u64,
    /// How many durable records can be read.
    pub records: usize,
    /// What tells this registry from others, if it can be read.
    pub cluster: Option<String>,
    /// What is wrong; empty when all is right.
    pub problems: Vec<String>,
    /// The age of the backup and how many of its records can be read.
    pub backup: Option<(Duration, usize)>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { file, size, records, .. } = self;
        let state = if self.is_sound() { "is sound" } else { "is damaged" };
        writeln!(f, "{} {state}: {size} bytes, {records} records can be read", file.display())?;
        for problem in &self.problems {
            writeln!(f, "problem: {problem}")?;
        }
        match self.backup {
            Some((age, records)) => write!(f, "backup: {records} records, {} old", Age(age)),
            None => f.write_str("backup: none"),
        }
    }
}

/// What a repair did. Display is text for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairReport {
    /// Nothing was wrong, and nothing was done.
    pub was_sound: bool,
    /// Records taken over from the file.
    pub kept: usize,
    /// Records taken from the backup, since the file could not be read where they were.
    pub restored: usize,
    /// The age of the backup, when records were taken from it.
    pub backup_age: Option<Duration>,
    /// Keys of which the record is damaged and not in the backup.
    pub lost: Vec<String>,
    /// Whether there may have been more records than those kept, restored and lost: where the file
    /// could not be read, those written since the backup are not known.
    pub incomplete: bool,
    /// Where the damaged file is now.
    pub put_aside: Option<PathBuf>,
}

impl fmt::Display for RepairReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.was_sound {
            return write!(f, "the registry is sound ({} records); nothing was done", self.kept);
        }
        write!(f, "repaired: {} records kept", self.kept)?;
        if let Some(age) = self.backup_age {
            write!(f, ", {} restored from the backup, which is {} old", self.restored, Age(age))?;
        }
        for key in self.lost.iter().take(NAMED) {
            write!(f, "\nlost: {key}")?;
        }
        if let Some(more @ 1..) = self.lost.len().checked_sub(NAMED) {
            write!(f, "\nlost: {more} more")?;
        }
        if self.incomplete {
            f.write_str("\nA part of the file could not be read: what was written there since the backup is lost. Compare with `fleetctl list-unit-files` what you expect.")?;
        }
        if let Some(path) = &self.put_aside {
            write!(f, "\nThe damaged file is kept as {}.", path.display())?;
        }
        Ok(())
    }
}

/// Checks the registry in a directory, which must not be open, and changes nothing. Blocking.
///
/// # Errors
/// When there is none, it is in use, of a newer format, or can't be read for a reason outside of it;
/// damage is no error but a [`Report`].
pub fn check(directory: &Path) -> Result<Report, OpenError> {
    let _marker = lock(directory)?;
    let file = directory.join(disk::FILE);
    let backup = backup::read(directory)?.map(|b| (b.header.age(), b.records.len()));
    let mut report = Report { file, size: 0, records: 0, cluster: None, problems: Vec::new(), backup };
    let Some(opened) = open_file(directory)? else {
        report.problems.push("the file is missing".into());
        return Ok(report);
    };
    report.size = opened.metadata().map_err(OpenError::io("read", &report.file))?.len();
    match inspect(directory, opened) {
        Ok((meta, records)) => {
            report.records = records.len();
            report.cluster = Some(meta.cluster);
        }
        Err(OpenError::Damaged { reason, .. }) => {
            report.problems.push(reason);
            if let Some(found) = salvage(directory, &BTreeSet::new())? {
                report.records = found.records.len();
                report.cluster = found.meta.map(|m| m.cluster);
                let named = found.wrong.iter().take(NAMED);
                report.problems.extend(named.map(|key| format!("the record {key} has a wrong checksum")));
            }
        }
        Err(e) => return Err(e),
    }
    Ok(report)
}

/// Repairs the registry in a directory, which must not be open: keeps every record whose checksum is
/// right, takes from the backup what stood where the file can't be read, and puts the old file aside.
/// Does nothing when it is sound. Blocking.
///
/// # Errors
/// When there is no registry, it is in use, of a newer format, can't be read or written for a reason
/// outside of it, or there is neither anything readable in the file nor a backup. The old file is still
/// in its place then.
pub fn repair(directory: &Path) -> Result<RepairReport, OpenError> {
    let mut marker = lock(directory)?;
    let file = open_file(directory)?;
    let found = match file {
        None => None,
        Some(file) => match inspect(directory, file) {
            Ok((_, records)) => {
                marker.set()?;
                return Ok(RepairReport { was_sound: true, kept: records.len(), ..RepairReport::nothing() });
            }
            Err(OpenError::Damaged { .. }) => {
                let keys = backup::read(directory)?.map(|b| b.keys()).unwrap_or_default();
                salvage(directory, &keys)?
            }
            Err(e) => return Err(e),
        },
    };
    let backup = backup::read(directory)?;
    if found.is_none() && backup.is_none() {
        let reason = "nothing in it can be read, and there is no backup".into();
        return Err(OpenError::Unrepairable { directory: directory.into(), reason });
    }
    let (mut report, meta, records) = merge(found, backup)?;
    report.put_aside = put_aside(directory)?;
    let db = disk::build(directory, &records, &meta, &Arc::<Health>::default())?;
    db.close().map_err(|e| OpenError::io("close", directory.join(disk::FILE))(io::Error::other(e)))?;
    marker.set()?;
    Ok(report)
}

impl RepairReport {
    fn nothing() -> Self {
        RepairReport {
            was_sound: false,
            kept: 0,
            restored: 0,
            backup_age: None,
            lost: Vec::new(),
            incomplete: false,
            put_aside: None,
        }
    }
}

impl Backup {
    fn keys(&self) -> BTreeSet<Arc<str>> {
        self.records.iter().map(|r| r.key.clone()).collect()
    }
}

/// Locks a directory that has a registry, or what is left of one.
fn lock(directory: &Path) -> Result<Marker, OpenError> {
    let mut found = false;
    for name in [disk::FILE, disk::MARKER, backup::FILE] {
        let path = directory.join(name);
        found |= path.try_exists().map_err(OpenError::io("read", &path))?;
    }
    if !found {
        return Err(OpenError::None { directory: directory.into() });
    }
    Marker::lock(directory, false)
}

/// Opens the file for reading, if it is there, and locks it.
fn open_file(directory: &Path) -> Result<Option<File>, OpenError> {
    let path = directory.join(disk::FILE);
    match File::open(&path) {
        Ok(file) => disk::lock(&file, directory).map(|()| Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(OpenError::io("open", path)(e)),
    }
}

/// Reads the whole file as an opening would, without changing it.
fn inspect(directory: &Path, file: File) -> Result<(Meta, Vec<Record>), OpenError> {
    let path = directory.join(disk::FILE);
    let metadata = file.metadata().map_err(OpenError::io("read", &path))?;
    if !metadata.is_file() || metadata.len() == 0 {
        let reason = if metadata.is_file() { "it is empty (0 bytes)" } else { "it is not a regular file" };
        return Err(OpenError::Damaged { directory: directory.into(), reason: reason.into() });
    }
    let overlay = Overlay::new(file).map_err(OpenError::io("read", &path))?;
    let db = open_database(directory, || disk::builder().create_with_backend(overlay))?;
    load(directory, &db)
}

/// What could be read of a damaged file.
#[derive(Default)]
struct Found {
    meta: Option<Meta>,
    records: BTreeMap<Arc<str>, Record>,
    /// Keys whose record has a wrong checksum.
    wrong: BTreeSet<String>,
    /// Keys of the backup that stand where the file can't be read.
    unreadable: BTreeSet<Arc<str>>,
    /// The file could not be read from end to end.
    gap: bool,
}

/// Reads what can be read of a damaged file: `None` when that is nothing. `hints` are keys that may be in
/// it, to find a way behind a part that can't be read.
fn salvage(directory: &Path, hints: &BTreeSet<Arc<str>>) -> Result<Option<Found>, OpenError> {
    let path = directory.join(disk::FILE);
    let overlay = || {
        let file = File::open(&path).map_err(OpenError::io("open", &path))?;
        Overlay::new(file).map_err(OpenError::io("read", &path))
    };
    let plain = overlay()?;
    let mut ways: Vec<Found> = Vec::new();
    // Without redb's check of the whole file, which would refuse it all for one bad page
    if let Ok(Ok(db)) = catch_unwind(AssertUnwindSafe(|| Database::builder().create_with_backend(plain))) {
        ways.push(read_all(&db, hints));
    }
    for previous in [false, true] {
        if ways.iter().any(|w| !w.gap) {
            break;
        }
        let overlay = overlay()?;
        if overlay.pretend_closed(previous).is_err() {
            continue;
        }
        // The mode for reading beside a writer asks least of the file.
        let mut builder = Database::builder();
        builder.set_concurrency_mode(redb::ConcurrencyMode::SingleWriter);
        if let Ok(Ok(db)) = catch_unwind(AssertUnwindSafe(|| builder.open_read_only_with_backend(overlay))) {
            ways.push(read_all(&db, hints));
        }
    }
    ways.retain(|w| w.meta.is_some() || !w.records.is_empty());
    // The newest state comes first, and a whole one before one with gaps.
    let whole = ways.iter().position(|w| !w.gap);
    let most = || (0..ways.len()).rev().max_by_key(|i| ways[*i].records.len());
    let best = whole.or_else(most);
    Ok(best.map(|i| ways.swap_remove(i)))
}

type Records = ReadOnlyTable<&'static str, &'static [u8]>;

fn read_all(db: &impl ReadableDatabase, hints: &BTreeSet<Arc<str>>) -> Found {
    // redb may panic on what is damaged, and an error is as good as a panic here.
    fn quietly<T>(read: impl FnOnce() -> Result<T, redb::Error>) -> Option<T> {
        catch_unwind(AssertUnwindSafe(read)).ok()?.ok()
    }
    let mut found = Found { meta: quietly(|| disk::read_meta(db)).flatten(), ..Found::default() };
    let Some(table) = quietly(|| records_table(db)) else {
        found.gap = true;
        found.unreadable = hints.clone();
        return found;
    };
    let (end, mut whole) = found.run(&table, Bound::Unbounded, false);
    if whole {
        return found;
    }
    found.gap = true;
    let (mut position, end) = (end, found.run(&table, Bound::Unbounded, true).0);
    for hint in hints {
        let before = position.as_ref().is_some_and(|p| hint <= p);
        let behind = end.as_ref().is_some_and(|e| hint >= e);
        if before || behind {
            continue;
        }
        let (last, all) = found.run(&table, Bound::Included(hint), false);
        whole = all;
        if last.is_none() && !whole {
            found.unreadable.insert(hint.clone());
        }
        position = last.or(position);
        if whole {
            break;
        }
    }
    found
}

impl Found {
    /// Reads records from a key on, or from the end backwards, until no more can be read. Gives the last
    /// key read, and whether the end was reached.
    fn run(&mut self, table: &Records, from: Bound<&str>, backwards: bool) -> (Option<Arc<str>>, bool) {
        let mut last: Option<Arc<str>> = None;
        let range = catch_unwind(AssertUnwindSafe(|| table.range::<&str>((from, Bound::Unbounded))));
        let Ok(Ok(mut range)) = range else { return (None, false) };
        loop {
            let row = catch_unwind(AssertUnwindSafe(|| {
                let row = if backwards { range.next_back() } else { range.next() };
                row.map(|row| {
                    row.map(|(key, bytes)| {
                        (Arc::<str>::from(key.value()), decode(key.value(), bytes.value()))
                    })
                })
            }));
            let (key, record) = match row {
                Ok(None) => return (last, true),
                Ok(Some(Ok(row))) => row,
                Ok(Some(Err(_))) | Err(_) => return (last, false),
            };
            // Damaged pages may lead round in a circle.
            let order =
                last.as_ref().map(|last| if backwards { key.cmp(last).reverse() } else { key.cmp(last) });
            if order.is_some_and(|o| o.is_le()) {
                return (last, false);
            }
            match record {
                Some(record) => drop(self.records.insert(key.clone(), record)),
                None => drop(self.wrong.insert(key.to_string())),
            }
            last = Some(key);
        }
    }
}

/// Puts together what the file and the backup give.
fn merge(
    found: Option<Found>,
    backup: Option<Backup>,
) -> Result<(RepairReport, Meta, Vec<Record>), OpenError> {
    let mut report = RepairReport::nothing();
    let no_file = found.is_none();
    let found = found.unwrap_or_default();
    let (mut records, mut wrong) = (found.records, found.wrong);
    report.kept = records.len();
    report.incomplete = found.gap || no_file || found.meta.is_none();
    let mut metas: Vec<Meta> = found.meta.into_iter().collect();
    if let Some(backup) = backup {
        report.incomplete |= no_file && !backup.is_whole();
        let age = backup.header.age();
        for record in backup.records {
            let asked = no_file || found.unreadable.contains(&record.key) || wrong.contains(&*record.key);
            if asked && !records.contains_key(&record.key) {
                wrong.remove(&*record.key);
                records.insert(record.key.clone(), record);
                report.restored += 1;
                report.backup_age = Some(age);
            }
        }
        metas.push(backup.header.meta);
    }
    report.lost = wrong.into_iter().collect();
    let given = metas.iter().map(|m| m.ceiling).chain(records.values().map(|r| r.revision));
    let ceiling = given.max().unwrap_or(0).saturating_add(JUMP);
    let cluster = match metas.into_iter().next() {
        Some(meta) => meta.cluster,
        None => disk::new_cluster_id()?,
    };
    Ok((report, Meta { format: FORMAT, cluster, ceiling }, records.into_values().collect()))
}

/// Gives the damaged file, and the backup, a second name that stays.
fn put_aside(directory: &Path) -> Result<Option<PathBuf>, OpenError> {
    let file = directory.join(disk::FILE);
    let mut n = 1;
    let (aside, backup_aside) = loop {
        let names = (format!("{}.damaged-{n}", disk::FILE), format!("{}.before-repair-{n}", backup::FILE));
        let paths = (directory.join(names.0), directory.join(names.1));
        if !paths.0.exists() && !paths.1.exists() {
            break paths;
        }
        n += 1;
    };
    let backup = directory.join(backup::FILE);
    if backup.exists() {
        fs::copy(&backup, &backup_aside).map_err(OpenError::io("write", &backup_aside))?;
    }
    if !file.exists() {
        return Ok(None);
    }
    // A link, so that there is a file in its place at every moment; not every file system has them.
    if fs::hard_link(&file, &aside).is_err() {
        fs::rename(&file, &aside).map_err(OpenError::io("rename", &file))?;
    }
    sync_directory(directory)?;
    Ok(Some(aside))
}
