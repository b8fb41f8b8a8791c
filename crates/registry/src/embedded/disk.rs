//! The file: opening, reading and writing it, and getting it back to a known state after an error.
use super::{
    backend::{Health, Watched},
    backup,
    error::{OpenError, io_text},
    memory::{DurableChange, Record},
    record::{FORMAT, Meta, decode, encode},
};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};
use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
/// The key of [`Meta`] in its table.
const META_KEY: &str = "store";
/// Pages redb may keep. Reads are answered from memory, so this serves the writes alone.
const CACHE_BYTES: usize = 2 << 20;

/// The name of the file.
pub(super) const FILE: &str = "registry.redb";
/// The name of the marker that there was a registry, which also carries the lock.
pub(super) const MARKER: &str = "registry.made";

/// The lock on a registry's directory and the marker that there was a registry. Held while the
/// registry is open.
#[derive(Debug)]
pub(super) struct Marker {
    file: File,
    path: PathBuf,
}

impl Marker {
    /// Takes the lock. `make`: makes the directory when it is not there.
    pub(super) fn lock(directory: &Path, make: bool) -> Result<Self, OpenError> {
        if make {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(OpenError::io("make the directory", directory))?;
        }
        let path = directory.join(MARKER);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(OpenError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Marker { file, path }),
            Err(TryLockError::WouldBlock) => Err(OpenError::InUse { file: directory.join(FILE) }),
            Err(TryLockError::Error(e)) => Err(OpenError::io("lock", path)(e)),
        }
    }

    /// Whether a registry was made here.
    pub(super) fn is_set(&self) -> Result<bool, OpenError> {
        let length = self.file.metadata().map_err(OpenError::io("read", &self.path))?.len();
        Ok(length > 0)
    }

    /// Notes, durably, that a registry was made here.
    pub(super) fn set(&mut self) -> Result<(), OpenError> {
        let text =
            "fleet made a registry here. While this file is there, fleetd refuses to begin an empty one.\n";
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(text.as_bytes())?;
            file.sync_all()
        };
        write(&mut self.file).map_err(OpenError::io("write", &self.path))?;
        sync_directory(self.path.parent().unwrap_or(Path::new(".")))
    }
}

/// Makes renames and new files in a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), OpenError> {
    File::open(directory).and_then(|d| d.sync_all()).map_err(OpenError::io("write", directory))
}

/// Why something was not written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WriteError {
    pub(super) reason: String,
    /// It may have been written all the same.
    pub(super) unsure: bool,
}

/// The open file.
pub(super) struct Disk {
    directory: PathBuf,
    /// `None` after an error, until it has been recovered.
    db: Option<Database>,
    health: Arc<Health>,
    /// A sync failed: the kernel may hold pages of the file as clean that never reached the disk, so
    /// that only a new file can be trusted.
    poisoned: bool,
    pub(super) meta: Meta,
    _marker: Marker,
}

impl Disk {
    /// Opens the registry in a directory, or makes one where there never was any. Gives its records too.
    pub(super) fn open(directory: &Path, health: Arc<Health>) -> Result<(Self, Vec<Record>), OpenError> {
        let mut marker = Marker::lock(directory, true)?;
        let path = directory.join(FILE);
        let there = path.try_exists().map_err(OpenError::io("read", &path))?;
        if !there {
            let backup = backup::age(directory);
            if marker.is_set()? || backup.is_some() {
                return Err(OpenError::Missing { directory: directory.into(), backup });
            }
            let meta = Meta { format: FORMAT, cluster: new_cluster_id()?, ceiling: 1 };
            let db = build(directory, &[], &meta, &health)?;
            marker.set()?;
            return Ok((Disk::with(directory, db, health, meta, marker), Vec::new()));
        }
        let db = open_file(directory, &health)?;
        let (meta, records) = load(directory, &db)?;
        if !marker.is_set()? {
            marker.set()?;
        }
        Ok((Disk::with(directory, db, health, meta, marker), records))
    }

    fn with(directory: &Path, db: Database, health: Arc<Health>, meta: Meta, marker: Marker) -> Self {
        Disk { directory: directory.into(), db: Some(db), health, poisoned: false, meta, _marker: marker }
    }

    /// The directory it is in.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether writes can be tried without [`recover`](Self::recover).
    pub(super) fn is_open(&self) -> bool {
        self.db.is_some()
    }

    /// Writes changes and, when given, a new ceiling, all or nothing; durable when it returns.
    /// After an error the file is closed until it has been [recovered](Self::recover).
    pub(super) fn write(
        &mut self,
        changes: &[DurableChange],
        ceiling: Option<u64>,
    ) -> Result<(), WriteError> {
        let Some(db) = &self.db else {
            return Err(WriteError { reason: "the file is closed after an error".into(), unsure: false });
        };
        let meta = ceiling.map(|ceiling| Meta { ceiling, ..self.meta.clone() });
        self.health.forget();
        let attempt = catch_unwind(AssertUnwindSafe(|| write(db, changes, meta.as_ref())));
        let error = match attempt {
            Ok(Ok(())) => {
                if let Some(meta) = meta {
                    self.meta = meta;
                }
                return Ok(());
            }
            Ok(Err(e)) => e,
            // redb's own consistency checks panic; the file is read anew like after any other error
            Err(_) => WriteError { reason: "the database library failed".into(), unsure: true },
        };
        self.db = None;
        self.poisoned |= self.health.sync_failed();
        let reason = self.health.reason().unwrap_or(error.reason);
        Err(WriteError { reason: format!("{}: {reason}", self.directory.join(FILE).display()), ..error })
    }

    /// Brings the file back to exactly `truth` after an error, and opens it. In place where the file turns
    /// out to hold just that, else, and after a failed sync, as a new file.
    pub(super) fn recover(&mut self, truth: &[Record]) -> Result<(), String> {
        self.db = None;
        if !self.poisoned {
            let found = open_file(&self.directory, &self.health)
                .and_then(|db| load(&self.directory, &db).map(|(meta, records)| (db, meta, records)));
            match found {
                Ok((db, meta, records)) if records == truth && meta.cluster == self.meta.cluster => {
                    // A raised ceiling may have got through with what failed: only ever go up.
                    self.meta.ceiling = self.meta.ceiling.max(meta.ceiling);
                    self.db = Some(db);
                    return Ok(());
                }
                Ok(_) => {}
                Err(e) => tracing::warn!("{e}; the registry is being written anew from memory"),
            }
            self.poisoned |= self.health.sync_failed();
        }
        let db = build(&self.directory, truth, &self.meta, &self.health).map_err(|e| e.to_string())?;
        self.db = Some(db);
        self.poisoned = false;
        Ok(())
    }

    /// Closes the file cleanly, so that the next opening need not check it as after a crash.
    pub(super) fn close(self) {
        if let Some(Err(e)) = self.db.map(Database::close) {
            tracing::warn!("closing {}: {e}", self.directory.join(FILE).display());
        }
    }
}

pub(crate) fn new_cluster_id() -> Result<String, OpenError> {
    let path = "/proc/sys/kernel/random/uuid";
    let mut id = String::new();
    File::open(path).and_then(|f| f.take(64).read_to_string(&mut id)).map_err(OpenError::io("read", path))?;
    Ok(id.trim().to_owned())
}

pub(super) fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    // Without it redb trusts a file that was closed cleanly, and may panic on a damaged one.
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

/// Opens the file, which has to be there, and checks it as far as redb can.
fn open_file(directory: &Path, health: &Arc<Health>) -> Result<Database, OpenError> {
    let path = directory.join(FILE);
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(OpenError::io("open", &path))?;
    let metadata = file.metadata().map_err(OpenError::io("read", &path))?;
    if !metadata.is_file() {
        let reason = "it is not a regular file".into();
        return Err(OpenError::Damaged { directory: directory.into(), reason });
    }
    lock(&file, directory)?;
    // redb takes an empty file for a new database
    if metadata.len() == 0 {
        return Err(OpenError::Damaged {
            directory: directory.into(),
            reason: "it is empty (0 bytes)".into(),
        });
    }
    health.forget();
    let backend = Watched::new(file, health.clone());
    open_database(directory, || builder().create_with_backend(backend))
}

/// Locks the file itself. The marker's lock would do, were it not that somebody could remove the marker.
pub(super) fn lock(file: &File, directory: &Path) -> Result<(), OpenError> {
    let path = directory.join(FILE);
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { file: path }),
        Err(TryLockError::Error(e)) => Err(OpenError::io("lock", path)(e)),
    }
}

/// Runs redb's opening, and says what its answer means.
pub(super) fn open_database<D>(
    directory: &Path,
    open: impl FnOnce() -> Result<D, DatabaseError>,
) -> Result<D, OpenError> {
    let path = || directory.join(FILE);
    let damaged = |reason: String| OpenError::Damaged { directory: directory.into(), reason };
    match catch_unwind(AssertUnwindSafe(open)) {
        Ok(Ok(db)) => Ok(db),
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(OpenError::InUse { file: path() }),
        Ok(Err(DatabaseError::Storage(StorageError::Io(e)))) => match e.kind() {
            io::ErrorKind::InvalidData => Err(damaged(format!("it is not a registry file ({e})"))),
            io::ErrorKind::UnexpectedEof => Err(damaged("its end is missing".into())),
            _ => Err(OpenError::io("open", path())(e)),
        },
        Ok(Err(DatabaseError::UpgradeRequired(version))) => {
            Err(damaged(format!("its database format {version} is not one fleet ever wrote")))
        }
        Ok(Err(e)) => Err(damaged(e.to_string())),
        Err(_) => Err(damaged("the database library failed on it".into())),
    }
}

/// Reads all there is in the file; anything wrong anywhere is an error.
pub(super) fn load(directory: &Path, db: &Database) -> Result<(Meta, Vec<Record>), OpenError> {
    let damaged = |reason: String| OpenError::Damaged { directory: directory.into(), reason };
    let found = catch_unwind(AssertUnwindSafe(|| {
        let meta = read_meta(db)?;
        // Nothing of a newer format is looked at.
        if matches!(&meta, Some(m) if m.format > FORMAT) {
            return Ok((meta, Vec::new(), Vec::new()));
        }
        let (mut records, mut wrong) = (Vec::new(), Vec::new());
        let table = db.begin_read()?.open_table(RECORDS)?;
        for row in table.iter()? {
            let (key, bytes) = row?;
            match decode(key.value(), bytes.value()) {
                Some(record) => records.push(record),
                None => wrong.push(key.value().to_owned()),
            }
        }
        Ok::<_, redb::Error>((meta, records, wrong))
    }));
    let (meta, records, wrong) = match found {
        Ok(Ok(found)) => found,
        Ok(Err(redb::Error::Io(e))) => return Err(OpenError::io("read", directory.join(FILE))(e)),
        Ok(Err(e)) => return Err(damaged(e.to_string())),
        Err(_) => return Err(damaged("the database library failed on it".into())),
    };
    let meta = meta.ok_or_else(|| damaged("the record of its format is missing or damaged".into()))?;
    if meta.format > FORMAT {
        return Err(OpenError::NewerFormat { file: directory.join(FILE), found: meta.format, known: FORMAT });
    }
    if let Some(first) = wrong.first() {
        let count = wrong.len();
        return Err(damaged(format!("{count} records have a wrong checksum, the first is {first}")));
    }
    Ok((meta, records))
}

/// The store's own data; `None` when there is none that can be read.
pub(super) fn read_meta(db: &impl ReadableDatabase) -> Result<Option<Meta>, redb::Error> {
    let table = match db.begin_read()?.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        other => other?,
    };
    let bytes = table.get(META_KEY)?;
    let record = bytes.and_then(|b| decode(META_KEY, b.value()));
    Ok(record.and_then(|r| serde_json::from_slice(&r.value).ok()))
}

/// The table of records, for reading what can be read of a damaged file.
pub(super) fn records_table(
    db: &impl ReadableDatabase,
) -> Result<redb::ReadOnlyTable<&'static str, &'static [u8]>, redb::Error> {
    Ok(db.begin_read()?.open_table(RECORDS)?)
}

fn write(db: &Database, changes: &[DurableChange], meta: Option<&Meta>) -> Result<(), WriteError> {
    let fill = || {
        let txn = db.begin_write()?;
        if !changes.is_empty() {
            let mut table = txn.open_table(RECORDS)?;
            for (key, change) in changes {
                match change {
                    Some((revision, value)) => {
                        table.insert(&**key, encode(key, *revision, value).as_slice())?;
                    }
                    None => {
                        table.remove(&**key)?;
                    }
                }
            }
        }
        if let Some(meta) = meta {
            write_meta(&txn, meta)?;
        }
        Ok::<_, redb::Error>(txn)
    };
    let failed = |e: redb::Error, unsure| WriteError { reason: error_text(&e), unsure };
    let txn = fill().map_err(|e| failed(e, false))?;
    txn.commit().map_err(|e| failed(e.into(), true))
}

fn write_meta(txn: &redb::WriteTransaction, meta: &Meta) -> Result<(), redb::Error> {
    let json = serde_json::to_vec(meta).map_err(|e| redb::Error::Io(e.into()))?;
    txn.open_table(META)?.insert(META_KEY, encode(META_KEY, 0, &json).as_slice())?;
    Ok(())
}

fn error_text(error: &redb::Error) -> String {
    match error {
        redb::Error::Io(e) => io_text(e),
        e => e.to_string(),
    }
}

/// Makes the file anew with these records, beside the old one, and puts it in its place when it is
/// whole and durable.
pub(super) fn build(
    directory: &Path,
    records: &[Record],
    meta: &Meta,
    health: &Arc<Health>,
) -> Result<Database, OpenError> {
    let (path, new) = (directory.join(FILE), directory.join("registry.redb.new"));
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(OpenError::io("remove", new)(e)),
        _ => {}
    }
    match build_file(directory, &new, &path, records, meta, health) {
        Ok(db) => sync_directory(directory).map(|()| db),
        Err(e) => {
            // Half a file is of no use, and may be what fills the disk.
            let _ = fs::remove_file(&new);
            Err(e)
        }
    }
}

fn build_file(
    directory: &Path,
    new: &Path,
    path: &Path,
    records: &[Record],
    meta: &Meta,
    health: &Arc<Health>,
) -> Result<Database, OpenError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(new)
        .map_err(OpenError::io("make", new))?;
    let failed = |reason: String| OpenError::io("write", path)(io::Error::other(reason));
    lock(&file, directory)?;
    health.forget();
    let backend = Watched::new(file.try_clone().map_err(OpenError::io("make", new))?, health.clone());
    let db = builder().create_with_backend(backend).map_err(|e| failed(e.to_string()))?;
    let changes: Vec<DurableChange> =
        records.iter().map(|r| (r.key.clone(), Some((r.revision, r.value.clone())))).collect();
    // Makes the tables even when there is nothing to put in them.
    let tables = || {
        let txn = db.begin_write()?;
        txn.open_table(RECORDS)?;
        write_meta(&txn, meta)?;
        txn.commit()?;
        Ok::<_, redb::Error>(())
    };
    tables().map_err(|e| failed(health.reason().unwrap_or_else(|| error_text(&e))))?;
    write(&db, &changes, Some(meta)).map_err(|e| failed(health.reason().unwrap_or(e.reason)))?;
    file.sync_all().map_err(OpenError::io("write", new))?;
    fs::rename(new, path).map_err(OpenError::io("rename", new))?;
    Ok(db)
}
