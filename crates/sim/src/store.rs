//! The registry: a model of a store, and the handle through which a server speaks to it.
//!
//! The model keeps the contract of [`fleet_registry::Store`] (a test runs its conformance suite over it). What lies
//! between the two, delay, loss and unknown outcomes, is the world's business: a handle only leaves calls in a queue and waits
//! for an answer, as a client of etcd does for as long as it has patience.

use fleet_registry::store::check_size;
use fleet_registry::{
    Compare, Conflict, Entry, Event, LeaseId, Op, Snapshot, Store, StoreError, Txn, Watch, WatchBatch,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

use crate::process::Time;

type Revision = u64;

#[derive(Clone, Debug)]
struct Item {
    value: Arc<[u8]>,
    revision: Revision,
    lease: Option<LeaseId>,
}

#[derive(Clone, Debug)]
struct Lease {
    ttl: Duration,
    expires: Time,
    keys: BTreeSet<Arc<str>>,
}

/// All that a store holds. Times are those of its own clock.
#[derive(Clone, Debug, Default)]
pub(crate) struct StoreModel {
    entries: BTreeMap<Arc<str>, Item>,
    leases: BTreeMap<LeaseId, Lease>,
    leases_granted: i64,
    revision: Revision,
    log: VecDeque<WatchBatch>,
    /// Changes up to this revision are not kept.
    floor: Revision,
    /// Another program writes to it as well, which takes revisions that nobody is told of.
    is_foreign_too: bool,
}

impl StoreModel {
    pub(crate) fn new(is_foreign_too: bool) -> Self {
        StoreModel { is_foreign_too, ..StoreModel::default() }
    }

    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn range(&self, prefix: &str) -> Snapshot {
        let entries = self.entries.iter().filter(|(key, _)| key.starts_with(prefix));
        Snapshot { entries: entries.map(|(key, item)| entry(key, item)).collect(), revision: self.revision }
    }

    pub(crate) fn get(&self, key: &str) -> Option<Entry> {
        self.entries.get_key_value(key).map(|(key, item)| entry(key, item))
    }

    fn written_at(&self, key: &str) -> Revision {
        self.entries.get(key).map_or(0, |item| item.revision)
    }

    /// The first condition that does not hold.
    pub(crate) fn conflict(&self, compares: &[Compare]) -> Option<Conflict> {
        let broken = compares.iter().find(|compare| self.written_at(&compare.key) != compare.revision)?;
        let found = self.written_at(&broken.key);
        Some(Conflict { key: broken.key.clone(), expected: broken.revision, found })
    }

    pub(crate) fn commit(&mut self, txn: &Txn) -> Result<Revision, StoreError> {
        check_size(txn)?;
        self.revision += u64::from(self.is_foreign_too);
        if let Some(conflict) = self.conflict(&txn.compares) {
            return Err(conflict.into());
        }
        let mut writes: Vec<&Op> = Vec::new();
        for op in &txn.ops {
            writes.retain(|write| write.key() != op.key());
            writes.push(op);
        }
        for op in &writes {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(StoreError::LeaseEnded);
            }
        }
        let mut events = Vec::new();
        let revision = self.revision + 1;
        for op in writes {
            let key: Arc<str> = op.key().into();
            let old = self.entries.get(&key).and_then(|item| item.lease);
            if let Some(lease) = old.and_then(|lease| self.leases.get_mut(&lease)) {
                lease.keys.remove(&key);
            }
            match op {
                Op::Put { value, lease, .. } => {
                    let item = Item { value: value.as_slice().into(), revision, lease: *lease };
                    if let Some(lease) = lease.and_then(|lease| self.leases.get_mut(&lease)) {
                        lease.keys.insert(key.clone());
                    }
                    events.push(Event { key: key.clone(), entry: Some(entry(&key, &item)) });
                    self.entries.insert(key, item);
                }
                Op::Delete { .. } => {
                    if self.entries.remove(&key).is_some() {
                        events.push(Event { key, entry: None });
                    }
                }
            }
        }
        self.publish(events);
        Ok(self.revision)
    }

    fn publish(&mut self, events: Vec<Event>) {
        if !events.is_empty() {
            self.revision += 1;
            self.log.push_back(WatchBatch { revision: self.revision, events });
        }
    }

    /// See [`Store::barrier`].
    pub(crate) fn barrier(&mut self) -> Revision {
        if self.is_foreign_too {
            self.revision += 1;
            self.log.push_back(WatchBatch { revision: self.revision, events: Vec::new() });
        }
        self.revision
    }

    pub(crate) fn grant(&mut self, ttl: Duration, now: Time) -> LeaseId {
        self.leases_granted += 1;
        let id = LeaseId(self.leases_granted);
        self.leases.insert(id, Lease { ttl, expires: now + ttl, keys: BTreeSet::new() });
        id
    }

    pub(crate) fn keep_alive(&mut self, lease: LeaseId, now: Time) -> Result<(), StoreError> {
        let lease = self.leases.get_mut(&lease).ok_or(StoreError::LeaseEnded)?;
        lease.expires = now + lease.ttl;
        Ok(())
    }

    pub(crate) fn revoke(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        let lease = self.leases.remove(&lease).ok_or(StoreError::LeaseEnded)?;
        let mut events = Vec::new();
        for key in lease.keys {
            self.entries.remove(&key);
            events.push(Event { key, entry: None });
        }
        self.publish(events);
        Ok(())
    }

    /// When the next lease runs out, if it is not renewed.
    pub(crate) fn next_expiry(&self) -> Option<Time> {
        self.leases.values().map(|lease| lease.expires).min()
    }

    /// Ends the leases that have run out.
    pub(crate) fn expire(&mut self, now: Time) {
        let out: Vec<_> =
            self.leases.iter().filter(|(_, lease)| lease.expires <= now).map(|(id, _)| *id).collect();
        for lease in out {
            // It was there a moment ago.
            let _ = self.revoke(lease);
        }
    }

    /// The embedded store ends with its process: leases, and what is under them, are not on disk. Revisions go on with a jump.
    pub(crate) fn forget_leases(&mut self) {
        let leases = std::mem::take(&mut self.leases);
        for key in leases.into_values().flat_map(|lease| lease.keys) {
            self.entries.remove(&key);
        }
        self.revision += 100;
        self.floor = self.revision;
        self.log.clear();
    }

    /// Deliberate mistake: the newest durable write is undone.
    pub(crate) fn undo_last(&mut self) {
        let durable = self.entries.iter().filter(|(_, item)| item.lease.is_none());
        if let Some(key) = durable.max_by_key(|(_, item)| item.revision).map(|(key, _)| key.clone()) {
            self.entries.remove(&key);
        }
    }

    /// A new leader of etcd gives every lease its whole TTL again.
    pub(crate) fn refresh_leases(&mut self, now: Time) {
        for lease in self.leases.values_mut() {
            lease.expires = now + lease.ttl;
        }
    }

    pub(crate) fn leases(&self) -> BTreeSet<LeaseId> {
        self.leases.keys().copied().collect()
    }

    /// Forgets the changes up to a revision.
    pub(crate) fn compact(&mut self, to: Revision) {
        while self.log.front().is_some_and(|batch| batch.revision <= to) {
            self.log.pop_front();
        }
        self.floor = self.floor.max(to.min(self.revision));
    }

    /// The changes after a revision.
    pub(crate) fn changes(&self, prefix: &str, after: Revision) -> Result<Vec<WatchBatch>, StoreError> {
        if after < self.floor || after > self.revision {
            return Err(StoreError::Compacted { asked: after, oldest: self.floor + 1 });
        }
        let start = self.log.partition_point(|batch| batch.revision <= after);
        let batches = self.log.iter().skip(start).filter_map(|batch| {
            let events = batch.events.iter().filter(|event| event.key.starts_with(prefix));
            let events: Vec<_> = events.cloned().collect();
            let told = !events.is_empty() || batch.events.is_empty() && prefix.is_empty();
            told.then_some(WatchBatch { revision: batch.revision, events })
        });
        Ok(batches.collect())
    }
}

fn entry(key: &Arc<str>, item: &Item) -> Entry {
    Entry { key: key.clone(), value: item.value.clone(), revision: item.revision }
}

/// What a server asks of the store.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Range(String),
    Get(String),
    Commit(Txn),
    Barrier,
    Grant(Duration),
    KeepAlive(LeaseId),
    Revoke(LeaseId),
    Watch(String, Revision),
}

/// What it is answered.
#[derive(Debug)]
pub(crate) enum Answer {
    Snapshot(Snapshot),
    Entry(Option<Entry>),
    Revision(Revision),
    Lease(LeaseId),
    Done,
    Watch(mpsc::UnboundedReceiver<Result<WatchBatch, StoreError>>),
}

/// A call on its way.
#[derive(Debug)]
pub(crate) struct Call {
    /// The host and the process there that made it.
    pub(crate) host: usize,
    pub(crate) incarnation: u64,
    pub(crate) request: Request,
    pub(crate) reply: oneshot::Sender<Result<Answer, StoreError>>,
}

/// The calls that processes have made and the world has not looked at yet.
pub(crate) type Calls = Arc<Mutex<Vec<Call>>>;

/// A process's handle of the store.
#[derive(Clone, Debug)]
pub(crate) struct SimStore {
    pub(crate) calls: Calls,
    pub(crate) host: usize,
    pub(crate) incarnation: u64,
    /// How long an answer is waited for; a store of one's own always answers.
    pub(crate) patience: Option<Duration>,
    /// Deliberate mistake: see [`crate::Mutation::UnknownIsDone`].
    pub(crate) unknown_is_done: bool,
}

impl SimStore {
    async fn ask(&self, request: Request) -> Result<Answer, StoreError> {
        let writes = matches!(request, Request::Commit(_));
        let (reply, answer) = oneshot::channel();
        let call = Call { host: self.host, incarnation: self.incarnation, request, reply };
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        let answer = match self.patience {
            Some(patience) => tokio::time::timeout(patience, answer).await.ok(),
            None => Some(answer.await),
        };
        match answer {
            Some(Ok(answer)) => answer,
            _ if writes => Err(StoreError::Unknown("no answer in time".to_owned())),
            _ => Err(StoreError::Unavailable("no answer in time".to_owned())),
        }
    }
}

fn wrong<T>(answer: &Answer) -> Result<T, StoreError> {
    Err(StoreError::Unavailable(format!("another answer than was asked for: {answer:?}")))
}

impl Store for SimStore {
    type Watch = SimWatch;

    async fn range(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        match self.ask(Request::Range(prefix.to_owned())).await? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            other => wrong(&other),
        }
    }
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        match self.ask(Request::Get(key.to_owned())).await? {
            Answer::Entry(entry) => Ok(entry),
            other => wrong(&other),
        }
    }
    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        match self.ask(Request::Commit(txn)).await {
            Ok(Answer::Revision(revision)) => Ok(revision),
            Err(StoreError::Unknown(_)) if self.unknown_is_done => Ok(1),
            Ok(other) => wrong(&other),
            Err(error) => Err(error),
        }
    }
    async fn barrier(&self) -> Result<Revision, StoreError> {
        match self.ask(Request::Barrier).await? {
            Answer::Revision(revision) => Ok(revision),
            other => wrong(&other),
        }
    }
    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        match self.ask(Request::Grant(ttl)).await? {
            Answer::Lease(lease) => Ok(lease),
            other => wrong(&other),
        }
    }
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        match self.ask(Request::KeepAlive(lease)).await? {
            Answer::Done => Ok(()),
            other => wrong(&other),
        }
    }
    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        match self.ask(Request::Revoke(lease)).await? {
            Answer::Done => Ok(()),
            other => wrong(&other),
        }
    }
    async fn watch(&self, prefix: &str, after: Revision) -> Result<SimWatch, StoreError> {
        match self.ask(Request::Watch(prefix.to_owned(), after)).await? {
            Answer::Watch(batches) => Ok(SimWatch(batches)),
            other => wrong(&other),
        }
    }
}

/// A watch of a process.
#[derive(Debug)]
pub(crate) struct SimWatch(mpsc::UnboundedReceiver<Result<WatchBatch, StoreError>>);

impl Watch for SimWatch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        match self.0.recv().await {
            Some(batch) => batch,
            None => Err(StoreError::Unavailable("the watch ended".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    /// The model, asked at once, in the time of the test's runtime.
    #[derive(Clone)]
    struct Direct {
        model: Arc<Mutex<StoreModel>>,
        began: Instant,
    }

    struct DirectWatch {
        store: Direct,
        prefix: String,
        after: Revision,
    }

    impl Direct {
        fn with<T>(&self, act: impl FnOnce(&mut StoreModel, Time) -> T) -> T {
            let mut model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.began.elapsed();
            model.expire(now);
            act(&mut model, now)
        }
    }

    impl Store for Direct {
        type Watch = DirectWatch;
        async fn range(&self, prefix: &str) -> Result<Snapshot, StoreError> {
            Ok(self.with(|model, _| model.range(prefix)))
        }
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            Ok(self.with(|model, _| model.get(key)))
        }
        async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
            // As a store of the real world, it is done when asked and takes a while to say so.
            tokio::task::yield_now().await;
            self.with(|model, _| model.commit(&txn))
        }
        async fn barrier(&self) -> Result<Revision, StoreError> {
            Ok(self.with(|model, _| model.barrier()))
        }
        async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
            Ok(self.with(|model, now| model.grant(ttl, now)))
        }
        async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.with(|model, now| model.keep_alive(lease, now))
        }
        async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
            self.with(|model, _| model.revoke(lease))
        }
        async fn watch(&self, prefix: &str, after: Revision) -> Result<DirectWatch, StoreError> {
            Ok(DirectWatch { store: self.clone(), prefix: prefix.to_owned(), after })
        }
    }

    impl Watch for DirectWatch {
        async fn next(&mut self) -> Result<WatchBatch, StoreError> {
            loop {
                let changes = self.store.with(|model, _| model.changes(&self.prefix, self.after))?;
                if let Some(batch) = changes.into_iter().next() {
                    self.after = batch.revision;
                    return Ok(batch);
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_model_is_a_store_as_any_other() {
        fleet_registry::conformance::all(async || Direct {
            model: Arc::new(Mutex::new(StoreModel { revision: 1, ..StoreModel::default() })),
            began: Instant::now(),
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_barrier_comes_to_it_whatever_others_write() {
        let model = StoreModel { revision: 1, is_foreign_too: true, ..StoreModel::default() };
        let store = Direct { model: Arc::new(Mutex::new(model)), began: Instant::now() };
        fleet_registry::conformance::barriers(store).await;
    }

    #[test]
    fn what_was_compacted_is_not_given() {
        let mut model = StoreModel::default();
        for value in ["a", "b", "c"] {
            model.commit(&Txn::of(Op::put("k", value))).unwrap();
        }
        assert_eq!(model.changes("", 1).unwrap().len(), 2);
        model.compact(2);
        assert!(matches!(model.changes("", 1), Err(StoreError::Compacted { .. })));
        assert_eq!(model.changes("", 2).unwrap().len(), 1);
        model.forget_leases();
        assert!(matches!(model.changes("", 3), Err(StoreError::Compacted { .. })));
    }
}
