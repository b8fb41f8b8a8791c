//! Export and import of the whole registry: a backup, and the way from one store to another.
//!
//! Exported is what lasts: units with their desired states, the schedule, what operators said of machines, who belongs to the
//! cluster, its users, tokens and CA. Presences, reports, servers and the leader go with their leases and are never in a file. With
//! the schedule and the CA machines find themselves where they were: they come with the certificates they have, and run on what
//! they run.
//!
//! # How an import is never half done
//!
//! More than one transaction may be needed, and anything may end in between. So the first one writes the record `import`
//! ([`IMPORT`]), and the last one takes it away when all records are there:
//!
//! - A server that sees it stops following the registry: its view goes no further, so no session tells its agent anything, no engine
//!   has anything to decide from, and the API answers 503 (`follow`). Every decision of an engine is guarded by its absence, too.
//! - When it is gone, each server begins anew, as at its start: with the CA that is there now, and with the time that machines
//!   have to show that they are there. The leader's record goes with it, so that nobody takes over without that grace.
//! - An import that was cut off leaves it, and is completed by being repeated: each time only what differs is written.
//!
//! A registry that has something in it is only replaced when asked to. What every server makes by itself, a CA of which nobody has
//! a certificate yet, is nothing.

mod file;

pub use file::{Archive, FileError, MAX_FILE};

use super::membership::{self, check_member_record};
use super::peers::{LEADER, SERVERS};
use super::users::check_user_record;
use super::{engine::FENCE, now_seconds};
use fleet_registry::records::{PRESENCES, Reader, STATES};
use fleet_registry::store::{MAX_BYTES, MAX_OPS};
use fleet_registry::{Compare, Entry, Event, Op, Snapshot, Store, StoreError, Txn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use tracing::info;

/// The key of the record that an import is under way.
pub(super) const IMPORT: &str = "import";
const FORMAT: u32 = 1;
/// How often an import is begun again when others write at the same time.
const ATTEMPTS: usize = 16;

/// What goes with a lease, or with an import.
const PASSING: [&str; 6] = [PRESENCES, STATES, SERVERS, LEADER, FENCE, IMPORT];

/// What kinds of records are called in messages, by what their keys begin with.
const KINDS: [(&str, &str); 8] = [
    ("unit/", "units"),
    ("schedule/", "units' places"),
    ("leaving/", "units that leave a machine"),
    ("machine/", "machines' metadata or marks"),
    ("member/", "members"),
    ("removed/", "removed machines"),
    ("token/", "join tokens"),
    ("user/", "users"),
];

/// That an import is under way.
#[derive(Serialize, Deserialize)]
struct ImportRecord {
    format: u32,
    /// What tells its contents from others'.
    digest: String,
    /// When it was begun, seconds since 1970.
    begun: u64,
}

/// What an import did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// How many records there are.
    pub records: usize,
    /// How many of them were written, or removed.
    pub changed: usize,
}

/// Why a registry is not exported or imported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The file is not what it should be. Nothing was changed.
    #[error("{0}")]
    File(#[from] FileError),
    /// There is something that is not in the file.
    #[error(
        "the registry is not empty ({0}); nothing was changed. --replace makes it what the file says, and removes all else"
    )]
    NotEmpty(String),
    /// Another one was begun.
    #[error(
        "the import of another file was begun and has not ended; repeat that one. --replace gives it up and makes the registry what \
         this file says"
    )]
    Another,
    /// There is only a part of a registry.
    #[error("an import was begun and has not ended: the registry is not complete; repeat the import first")]
    Incomplete,
    /// Others kept writing at the same time.
    #[error("others kept writing to the registry; repeat the import")]
    Contended,
    /// The registry did not answer, or not take it.
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// Whether a snapshot is of a registry of which there is only a part yet.
pub(super) fn is_under_way(snapshot: &Snapshot) -> bool {
    snapshot.entries.iter().any(|entry| &*entry.key == IMPORT)
}

/// Whether an event says that an import began.
pub(super) fn begins(event: &Event) -> bool {
    &*event.key == IMPORT && event.entry.is_some()
}

/// Whether an event says that an import is complete.
pub(super) fn ends(event: &Event) -> bool {
    &*event.key == IMPORT && event.entry.is_none()
}

fn passes(key: &str) -> bool {
    PASSING.iter().any(|passing| key == *passing || (passing.ends_with('/') && key.starts_with(passing)))
}

/// All that lasts in a registry, and what is wrong with it: records that can't be read are exported as they are, and could not be imported.
pub async fn export<S: Store>(store: &S) -> Result<(Archive, Vec<String>), TransferError> {
    let snapshot = store.range("").await?;
    if is_under_way(&snapshot) {
        return Err(TransferError::Incomplete);
    }
    let lasting = snapshot.entries.iter().filter(|entry| !passes(&entry.key));
    let archive = Archive::of(lasting, snapshot.revision, now_seconds());
    let wrong = archive.records.iter().filter_map(|(key, value)| {
        let reason = check_record(key, value).err()?;
        Some(format!("registry record {key}: {reason}"))
    });
    let wrong = wrong.collect();
    Ok((archive, wrong))
}

/// Reads a file, and checks each record in it.
pub fn read(text: &[u8]) -> Result<Archive, FileError> {
    let archive = Archive::read(text)?;
    // The first record stands in the second line.
    for ((key, value), line) in archive.records.iter().zip(2..) {
        check_record(key, value).map_err(|reason| FileError { line, reason: format!("{key}: {reason}") })?;
    }
    Ok(archive)
}

/// Whether this fleetd can read a record. Kinds that it does not know are of newer ones, and are none of its business.
fn check_record(key: &str, value: &Arc<[u8]>) -> Result<(), String> {
    if key.is_empty() || passes(key) {
        return Err("this is no record that lasts, and belongs into no file".to_owned());
    }
    let entry = Entry { key: key.into(), value: value.clone(), revision: 1 };
    check_member_record(&entry)?;
    check_user_record(&entry)?;
    let event = Event { key: entry.key.clone(), entry: Some(entry) };
    Reader::default().event(&event).map(drop).map_err(|error| error.reason)
}

/// Makes a registry what an archive says, however often it takes; see the module. Afterwards it is that, or an error says why not; the
/// same import may be repeated after any.
pub async fn import<S: Store>(
    store: &S,
    archive: &Archive,
    replace: bool,
) -> Result<Imported, TransferError> {
    for _ in 0..ATTEMPTS {
        match try_import(store, archive, replace).await {
            Err(TransferError::Store(StoreError::Conflict(_))) => {}
            other => return other,
        }
    }
    Err(TransferError::Contended)
}

async fn try_import<S: Store>(
    store: &S,
    archive: &Archive,
    replace: bool,
) -> Result<Imported, TransferError> {
    let snapshot = store.range("").await?;
    let marker = snapshot.entries.iter().find(|entry| &*entry.key == IMPORT);
    let writes = differences(&snapshot, archive);
    let mark = ImportRecord { format: FORMAT, digest: archive.digest(), begun: now_seconds() };
    let begun = match marker {
        None if writes.is_empty() => return Ok(Imported { records: archive.records.len(), changed: 0 }),
        None => {
            if let (Some(what), false) = (occupants(&snapshot), replace) {
                return Err(TransferError::NotEmpty(what));
            }
            info!("importing {} records into the registry", archive.records.len());
            mark_begun(store, &mark, 0).await?
        }
        Some(marker) => {
            let same = serde_json::from_slice::<ImportRecord>(&marker.value)
                .is_ok_and(|known| known.digest == mark.digest);
            if !same && !replace {
                return Err(TransferError::Another);
            }
            info!("going on with the import of {} records into the registry", archive.records.len());
            if same { marker.revision } else { mark_begun(store, &mark, marker.revision).await? }
        }
    };
    let guard = Compare { key: IMPORT.to_owned(), revision: begun };
    let changed = writes.len();
    for txn in transactions(writes, &guard) {
        store.commit(txn).await?;
    }
    // Who had not yet seen that an import is under way may have written meanwhile.
    let now = store.range("").await?;
    if !differences(&now, archive).is_empty() {
        return Err(StoreError::Conflict(fleet_registry::Conflict {
            key: IMPORT.to_owned(),
            expected: begun,
            found: now.revision,
        })
        .into());
    }
    let ops = vec![Op::delete(IMPORT), Op::delete(LEADER), Op::delete(FENCE)];
    store.commit(Txn { compares: vec![guard], ops }).await?;
    info!(
        "imported {} records into the registry, of which {changed} were new or different",
        archive.records.len()
    );
    Ok(Imported { records: archive.records.len(), changed })
}

/// Says in the registry that an import is under way; with the revision of that.
async fn mark_begun<S: Store>(store: &S, mark: &ImportRecord, before: u64) -> Result<u64, TransferError> {
    let value =
        serde_json::to_vec(mark).map_err(|error| StoreError::Damaged(format!("{IMPORT}: {error}")))?;
    let txn = Txn::of(Op::put(IMPORT, value)).when(IMPORT, before);
    Ok(store.commit(txn).await?)
}

/// What there is in a registry, in words; `None` for nothing.
fn occupants(snapshot: &Snapshot) -> Option<String> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for entry in snapshot.entries.iter().filter(|entry| !passes(&entry.key)) {
        if &*entry.key == membership::CA || &*entry.key == fleet_registry::records::FORMAT_KEY {
            continue;
        }
        let kind = KINDS.iter().position(|(prefix, _)| entry.key.starts_with(prefix));
        *counts.entry(kind.unwrap_or(KINDS.len())).or_default() += 1;
    }
    let word = |kind: &usize| KINDS.get(*kind).map_or("other records", |(_, word)| word);
    let words: Vec<_> = counts.iter().map(|(kind, count)| format!("{count} {}", word(kind))).collect();
    (!words.is_empty()).then(|| words.join(", "))
}

/// The writes that make a registry what an archive says, each with its guard.
fn differences(snapshot: &Snapshot, archive: &Archive) -> Vec<(Compare, Op)> {
    let there: BTreeMap<&str, &Entry> =
        snapshot.entries.iter().filter(|e| !passes(&e.key)).map(|e| (&*e.key, e)).collect();
    let mut writes = Vec::new();
    for (key, value) in &archive.records {
        let known = there.get(key.as_str());
        if known.is_some_and(|entry| entry.value == *value) {
            continue;
        }
        let revision = known.map_or(0, |entry| entry.revision);
        writes.push((Compare { key: key.clone(), revision }, Op::put(key.clone(), &**value)));
    }
    for (key, entry) in there.iter().filter(|(key, _)| !archive.records.contains_key(**key)) {
        writes.push((Compare { key: (*key).to_owned(), revision: entry.revision }, Op::delete(*key)));
    }
    writes
}

/// As few transactions as take all of these, each guarded by the import's own record, too.
fn transactions(writes: Vec<(Compare, Op)>, guard: &Compare) -> Vec<Txn> {
    let mut txns: Vec<Txn> = Vec::new();
    let mut bytes = MAX_BYTES;
    for (compare, op) in writes {
        let size = 2 * compare.key.len()
            + match &op {
                Op::Put { value, .. } => value.len(),
                Op::Delete { .. } => 0,
            };
        let full = txns.last().is_none_or(|txn| txn.compares.len() == MAX_OPS) || bytes + size > MAX_BYTES;
        if full {
            txns.push(Txn { compares: vec![guard.clone()], ops: Vec::new() });
            bytes = guard.key.len();
        }
        bytes += size;
        if let Some(txn) = txns.last_mut() {
            txn.compares.push(compare);
            txn.ops.push(op);
        }
    }
    txns
}

#[cfg(test)]
mod tests;
