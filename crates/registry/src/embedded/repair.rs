//! Checking a registry that is not open, and saving what can be saved of a damaged one.
//!
//! The damaged file itself is never written to: redb works on an [`Overlay`]. Records whose checksum is
//! right are taken from the file; only where the file can't be read is the backup asked, so that a unit
//! destroyed since the backup does not come back, unless it stood next to the damage.
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
/// After so many damaged records without a good one between them, the pages lead nowhere.
const MOST_WRONG: usize = 100_000;

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
            write!(f, "\nlost: {key:?}")?;
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
                let wrong = found.gaps.iter().filter_map(|g| g.wrong.as_ref()).flatten().take(NAMED);
                report.problems.extend(wrong.map(|key| format!("the record {key:?} has a wrong checksum")));
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
    /// Where something can't be read.
    gaps: Vec<Gap>,
}

/// A stretch of the file, between two records that can be read, in which others can't be.
#[derive(Debug)]
struct Gap {
    after: Option<Arc<str>>,
    before: Option<Arc<str>>,
    /// The keys of records with a wrong checksum in it, as far as they can be made out; `None` when there
    /// may be others. It may be the key that is damaged, so they are only a hint.
    wrong: Option<Vec<String>>,
}

impl Gap {
    fn holds(&self, key: &Arc<str>) -> bool {
        self.after.as_ref().is_none_or(|a| key > a) && self.before.as_ref().is_none_or(|b| key < b)
    }
}

impl Found {
    fn is_whole(&self) -> bool {
        self.gaps.iter().all(|g| g.wrong.is_some())
    }
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
        if ways.iter().any(Found::is_whole) {
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
    // The states come newest first. One commit back is better than a part missing; of states with gaps an
    // older one has to have a good deal more.
    let most = ways.iter().map(|w| w.records.len()).max().unwrap_or(0);
    let whole = ways.iter().position(Found::is_whole);
    let best = whole.or_else(|| ways.iter().position(|w| w.records.len() >= most - most / 10));
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
        found.gaps.push(Gap { after: None, before: None, wrong: None });
        return found;
    };
    let (after, whole) = found.run(&table, Bound::Unbounded, false);
    if whole {
        return found;
    }
    let (before, _) = found.run(&table, Bound::Unbounded, true);
    let gap = Gap { after, before, wrong: None };
    let mut position: Option<Arc<str>> = None;
    for hint in hints.iter().filter(|h| gap.holds(h)) {
        if position.as_ref().is_none_or(|p| hint > p) {
            position = found.run(&table, Bound::Included(hint), false).0.or(position);
        }
    }
    found.gaps.push(gap);
    found
}

impl Found {
    /// Reads records from a key on, or from the end backwards, until no more can be read. Gives the last
    /// key read, and whether the end was reached.
    fn run(&mut self, table: &Records, from: Bound<&str>, backwards: bool) -> (Option<Arc<str>>, bool) {
        let mut last: Option<Arc<str>> = None;
        let mut wrong: Vec<String> = Vec::new();
        let range = catch_unwind(AssertUnwindSafe(|| table.range::<&str>((from, Bound::Unbounded))));
        let Ok(Ok(mut range)) = range else { return (None, false) };
        let whole = loop {
            let row = catch_unwind(AssertUnwindSafe(|| {
                let row = if backwards { range.next_back() } else { range.next() };
                row.map(|row| {
                    row.map(|(key, bytes)| {
                        decode(key.value(), bytes.value()).ok_or_else(|| key.value().to_owned())
                    })
                })
            }));
            let record = match row {
                Ok(None) => break true,
                Ok(Some(Ok(Ok(record)))) => record,
                Ok(Some(Ok(Err(key)))) if wrong.len() < MOST_WRONG => {
                    wrong.push(key);
                    continue;
                }
                _ => break false,
            };
            let order = last.as_ref().map(|last| record.key.cmp(last));
            // Damaged pages may lead round in a circle.
            if order.is_some_and(|o| if backwards { o.is_ge() } else { o.is_le() }) {
                break false;
            }
            self.note(backwards, last.replace(record.key.clone()), last.clone(), &mut wrong);
            self.records.insert(record.key.clone(), record);
        };
        // What follows the last record when the end was not reached belongs to a larger gap.
        if whole {
            self.note(backwards, last.clone(), None, &mut wrong);
        }
        (last, whole)
    }

    fn note(
        &mut self,
        backwards: bool,
        one: Option<Arc<str>>,
        other: Option<Arc<str>>,
        wrong: &mut Vec<String>,
    ) {
        if !wrong.is_empty() {
            let (after, before) = if backwards { (other, one) } else { (one, other) };
            self.gaps.push(Gap { after, before, wrong: Some(std::mem::take(wrong)) });
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
    let Found { meta, mut records, gaps } = found.unwrap_or_else(|| Found {
        gaps: vec![Gap { after: None, before: None, wrong: None }],
        ..Found::default()
    });
    report.kept = records.len();
    report.incomplete = meta.is_none() || gaps.iter().any(|g| g.wrong.is_none());
    let mut metas: Vec<Meta> = meta.into_iter().collect();
    let mut restored: BTreeMap<Arc<str>, Record> = BTreeMap::new();
    if let Some(backup) = backup {
        report.incomplete |= no_file && !backup.is_whole();
        let age = backup.header.age();
        for record in backup.records {
            if gaps.iter().any(|g| g.holds(&record.key)) && !records.contains_key(&record.key) {
                restored.insert(record.key.clone(), record);
                report.backup_age = Some(age);
            }
        }
        metas.push(backup.header.meta);
    }
    report.restored = restored.len();
    let mut lost = BTreeSet::new();
    for gap in &gaps {
        let wrong = gap.wrong.iter().flatten();
        let again = restored.keys().filter(|k| gap.holds(k)).count();
        if again < gap.wrong.as_ref().map_or(0, Vec::len) {
            lost.extend(wrong.filter(|k| !restored.contains_key(k.as_str())).cloned());
        }
    }
    report.lost = lost.into_iter().collect();
    records.extend(restored);
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
