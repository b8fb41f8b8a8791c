//! The contract every store keeps.
use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

pub use fleet_cluster::model::Revision;

/// A lease: keys put under it vanish when it is not kept alive for its TTL, or is revoked.
/// A store may drop all leases and their keys when it restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
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

/// Writes that happen together, if and only if all conditions hold. At most [`MAX_OPS`] conditions,
/// as many writes, and at most [`MAX_BYTES`] of keys and values. Of several writes of one key in
/// one transaction only the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub ops: Vec<Op>,
}

impl Txn {
    /// A transaction of one write without a condition.
    pub fn of(op: Op) -> Self {
        Txn { compares: Vec::new(), ops: vec![op] }
    }
    /// Adds the condition that `key` was last written at `revision` (0: does not exist).
    pub fn when(mut self, key: impl Into<String>, revision: Revision) -> Self {
        self.compares.push(Compare { key: key.into(), revision });
        self
    }
    /// Adds a write.
    pub fn then(mut self, op: Op) -> Self {
        self.ops.push(op);
        self
    }
}

impl Op {
    /// A durable write.
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Op::Put { key: key.into(), value: value.into(), lease: None }
    }
    /// A write that goes when the lease ends.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Vec<u8>>, lease: LeaseId) -> Self {
        Op::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }
    /// A deletion; of a key that does not exist it changes nothing.
    pub fn delete(key: impl Into<String>) -> Self {
        Op::Delete { key: key.into() }
    }
    /// The key it writes.
    pub fn key(&self) -> &str {
        match self {
            Op::Put { key, .. } | Op::Delete { key } => key,
        }
    }
}

/// The most conditions, and the most writes, in one transaction (etcd's default limit).
pub const MAX_OPS: usize = 128;

/// The longest key, bytes. A key has at least 1 byte.
pub const MAX_KEY: usize = 512;

/// The most bytes of keys and values in one transaction, so also the largest value: etcd's default
/// limit of 1.5 MiB for a request, less room for its framing.
pub const MAX_BYTES: usize = 1_500_000;

/// The size of a transaction, bytes of keys and values.
///
/// # Errors
/// [`StoreError::TooLarge`] when it exceeds a limit every store has, or has a key without a byte.
pub fn check_size(txn: &Txn) -> Result<usize, StoreError> {
    let (conditions, writes) = (txn.compares.len(), txn.ops.len());
    if conditions.max(writes) > MAX_OPS {
        return Err(StoreError::TooLarge(format!(
            "a transaction of {conditions} conditions and {writes} writes (at most {MAX_OPS} each)"
        )));
    }
    let mut bytes = 0;
    for key in txn.compares.iter().map(|c| c.key.as_str()).chain(txn.ops.iter().map(Op::key)) {
        if key.is_empty() || key.len() > MAX_KEY {
            let start: String = key.chars().take(40).collect();
            let length = key.len();
            return Err(StoreError::TooLarge(format!(
                "the key {start:?}… of {length} bytes (1 to {MAX_KEY} bytes)"
            )));
        }
        bytes += key.len();
    }
    for op in &txn.ops {
        if let Op::Put { key, value, .. } = op {
            bytes += value.len();
            if value.len() > MAX_BYTES {
                let length = value.len();
                return Err(StoreError::TooLarge(format!(
                    "the value of {key}, {length} bytes (at most {MAX_BYTES})"
                )));
            }
        }
    }
    if bytes > MAX_BYTES {
        return Err(StoreError::TooLarge(format!("a transaction of {bytes} bytes (at most {MAX_BYTES})")));
    }
    Ok(bytes)
}

/// One change of one key. `entry` is `None` when it was deleted or its lease ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Event {
    pub key: Arc<str>,
    pub entry: Option<Entry>,
}

/// All changes made at one revision, in the order of the transaction; none: see [`Store::barrier`].
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
    /// The store refuses this client, until somebody has changed its credentials, certificates or permissions; nothing
    /// was written.
    #[error("registry access denied: {0}")]
    Denied(String),
    /// What was found is no store that fleet can use; nothing was written.
    #[error("registry unusable: {0}")]
    Unusable(String),
    /// The store's data is damaged, lost, or of a newer format; it refuses to work.
    #[error("registry damaged: {0}")]
    Damaged(String),
}

impl StoreError {
    /// Whether it is worth trying again: the store may be back, or put right, meanwhile.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            StoreError::Unavailable(_)
                | StoreError::Unknown(_)
                | StoreError::Damaged(_)
                | StoreError::Denied(_)
                | StoreError::Unusable(_)
        )
    }
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

/// How a part of a store is: a member of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Health {
    /// Where it is reached.
    pub endpoint: String,
    /// Whether this server uses it now.
    pub in_use: bool,
    /// Whether it can be reached, and works.
    pub healthy: bool,
    /// How it is, in words for the user.
    pub detail: String,
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
    /// Carries out a transaction; answers when it is durable, with its revision. A transaction that
    /// changes nothing (no writes, or only deletions of absent keys) checks its conditions and
    /// answers the current revision.
    fn commit(&self, txn: Txn) -> impl Future<Output = Result<Revision, StoreError>> + Send;
    /// A revision that everybody comes to who watches all keys, be it with an empty batch, and at which all is in that was committed
    /// before this was called. For who has to see something without knowing at which revision it was written. What [`commit`](Self::commit) answers
    /// where nothing changed, or [`range`](Self::range), is no such revision if others write to the same store: nobody is told of theirs.
    fn barrier(&self) -> impl Future<Output = Result<Revision, StoreError>> + Send {
        self.commit(Txn::default())
    }
    /// Begins a lease.
    fn grant(&self, ttl: Duration) -> impl Future<Output = Result<LeaseId, StoreError>> + Send;
    /// Renews a lease for its whole TTL.
    fn keep_alive(&self, lease: LeaseId) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Ends a lease at once, with its keys.
    fn revoke(&self, lease: LeaseId) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Takes the registry that is there now for the right one, after it was refused with [`StoreError::Damaged`] because it is not
    /// the one that was there before. What can't be told apart has nothing to accept.
    fn accept(&self) -> impl Future<Output = Result<(), StoreError>> + Send {
        async {
            Err(StoreError::Unusable("a registry of one server can't be exchanged behind its back".into()))
        }
    }
    /// How the parts of the store are, for a store that has parts.
    fn health(&self) -> impl Future<Output = Vec<Health>> + Send {
        async { Vec::new() }
    }
    /// Forgets changes that nobody follows any more, again and again; for one server at a time. A store that keeps no more than it needs
    /// has nothing to do.
    fn tidy(&self) -> impl Future<Output = Infallible> + Send {
        std::future::pending()
    }
    /// The changes after revision `after` of keys that begin with `prefix`. When they are no longer
    /// kept, or `after` has not been yet, this or the first [`next`](Watch::next) answers
    /// [`StoreError::Compacted`].
    fn watch(
        &self,
        prefix: &str,
        after: Revision,
    ) -> impl Future<Output = Result<Self::Watch, StoreError>> + Send;
}
