//! The contract every store keeps.
use std::{future::Future, sync::Arc, time::Duration};

pub use fleet_cluster::model::Revision;

/// A lease: keys put under it vanish when it is not kept alive for its TTL, or is revoked.
/// A store may drop all leases and their keys when it restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// A key and its value, with the revision it was last written at (> 0).
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Entry {
    pub key: Arc<str>,
    pub value: Arc<[u8]>,
    pub revision: Revision,
}

/// All entries under a prefix, in key order, as they were at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Snapshot {
    pub entries: Vec<Entry>,
    pub revision: Revision,
}

/// A condition of a transaction: the key was last written at this revision; 0: it does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Compare {
    pub key: String,
    pub revision: Revision,
}

/// A write of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Put { key: String, value: Vec<u8>, lease: Option<LeaseId> },
    Delete { key: String },
}

/// Writes that happen together, if and only if all conditions hold. At most [`MAX_OPS`] conditions
/// and writes together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub ops: Vec<Op>,
}

/// The most conditions and writes in one transaction (etcd's default limit).
pub const MAX_OPS: usize = 128;

/// One change of one key. `entry` is `None` when it was deleted or its lease ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Event {
    pub key: Arc<str>,
    pub entry: Option<Entry>,
}

/// All changes made at one revision, in the order of the transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct WatchBatch {
    pub revision: Revision,
    pub events: Vec<Event>,
}

/// What a store may answer instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A condition did not hold; nothing was written.
    #[error("{0}")]
    Conflict(#[from] Conflict),
    /// The changes since the revision asked for are no longer kept: list anew.
    #[error("changes since revision {asked} are no longer kept (oldest: {oldest})")]
    #[allow(missing_docs)]
    Compacted { asked: Revision, oldest: Revision },
    /// The lease ended.
    #[error("the lease has ended")]
    LeaseEnded,
    /// The transaction is larger than [`MAX_OPS`], or a key or value is too large.
    #[error("too large: {0}")]
    TooLarge(String),
    /// The store can't be reached or can't write now; nothing was written.
    #[error("registry unavailable: {0}")]
    Unavailable(String),
    /// It is not known whether the transaction was carried out: read before repeating.
    #[error("registry answer unknown: {0}")]
    Unknown(String),
    /// The store's data is damaged, lost, or of a newer format; it refuses to work.
    #[error("registry damaged: {0}")]
    Damaged(String),
}

/// The first condition of a transaction that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} was written at revision {found}, not {expected}")]
#[allow(missing_docs)]
pub struct Conflict {
    pub key: String,
    pub expected: Revision,
    pub found: Revision,
}

/// A stream of changes. It ends with an error, after which it is over.
pub trait Watch: Send {
    /// The next changes, in order, none left out; waits for them. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Result<WatchBatch, StoreError>> + Send;
}

/// A small ordered store. Clones share the same store.
///
/// Guarantees: an acknowledged commit is durable (except keys under leases, which may end with the
/// store); commits are strictly serialised, each at the next revisions; revisions never go back, not
/// even across restarts; a snapshot followed by a watch from its revision misses nothing.
pub trait Store: Clone + Send + Sync + 'static {
    /// What [`watch`](Self::watch) gives.
    type Watch: Watch;
    /// All entries whose keys begin with `prefix`.
    fn range(&self, prefix: &str) -> impl Future<Output = Result<Snapshot, StoreError>> + Send;
    /// One entry, if it exists.
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;
    /// Carries out a transaction; answers when it is durable, with its revision. A transaction without
    /// writes checks its conditions and answers the current revision.
    fn commit(&self, txn: Txn) -> impl Future<Output = Result<Revision, StoreError>> + Send;
    /// Begins a lease.
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<LeaseId, StoreError>> + Send;
    /// Renews a lease for its whole TTL.
    fn keep_alive(&self, lease: LeaseId) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Ends a lease at once, with its keys.
    fn revoke(&self, lease: LeaseId) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// The changes after revision `after` of keys that begin with `prefix`.
    fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> impl Future<Output = Result<Self::Watch, StoreError>> + Send;
}
