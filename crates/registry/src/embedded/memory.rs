//! What the store holds in memory, and how transactions change it: everything that is not I/O.
//!
//! Reads are answered from here alone. A batch of transactions is first worked out as a [`Plan`]
//! beside the state; only when the plan's durable part is on disk is it [published](Memory::publish),
//! so that no reader ever sees what a crash could take back.
use crate::store::*;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// The most events kept for watchers.
pub(super) const LOG_EVENTS: usize = 65_536;
/// The most bytes of keys and values kept for watchers. Much less than the events could hold: a
/// small cluster must stay small, and a watcher that falls this far behind lists anew.
pub(super) const LOG_BYTES: usize = 16 << 20;

/// The value of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) value: Arc<[u8]>,
    pub(super) revision: Revision,
    pub(super) lease: Option<LeaseId>,
}

/// A key, value and revision as they are on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: Arc<str>,
    pub(super) revision: Revision,
    pub(super) value: Arc<[u8]>,
}

/// A durable change: the new record of a key, or that it has none any more.
pub(super) type DurableChange = (Arc<str>, Option<(Revision, Arc<[u8]>)>);

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    expires: Instant,
    /// It is being ended: keep-alives come too late.
    ending: bool,
    keys: BTreeSet<Arc<str>>,
}

/// The changes kept for watchers, oldest first.
#[derive(Debug)]
struct Log {
    batches: VecDeque<WatchBatch>,
    events: usize,
    bytes: usize,
    /// The changes up to and including this revision are not kept.
    floor: Revision,
}

impl Log {
    fn push(&mut self, batch: WatchBatch) {
        self.events += batch.events.len();
        self.bytes += bytes(&batch);
        self.batches.push_back(batch);
        while self.events > LOG_EVENTS || self.bytes > LOG_BYTES {
            let Some(old) = self.batches.pop_front() else { break };
            self.events -= old.events.len();
            self.bytes -= bytes(&old);
            self.floor = old.revision;
        }
        if self.batches.capacity() > 1024 && self.batches.len() < self.batches.capacity() / 4 {
            self.batches.shrink_to(self.batches.len() * 2);
        }
    }
}

fn bytes(batch: &WatchBatch) -> usize {
    // 100: the event itself and what allocating it costs
    batch.events.iter().map(|e| 100 + e.key.len() + e.entry.as_ref().map_or(0, |e| e.value.len())).sum()
}

/// The state of the store.
#[derive(Debug)]
pub(super) struct Memory {
    /// The last published revision.
    pub(super) revision: Revision,
    entries: BTreeMap<Arc<str>, Item>,
    leases: HashMap<LeaseId, Lease>,
    log: Log,
}

/// What one step of a watch found.
pub(super) enum Step {
    /// Changes; the watch stands at their revision now.
    Batch(WatchBatch),
    /// Nothing for this watch up to this revision; more may be there.
    Passed(Revision),
    /// It is at the end.
    AtEnd,
}

impl Memory {
    /// The state at `revision` with these durable records.
    pub(super) fn new(revision: Revision, records: impl IntoIterator<Item = Record>) -> Self {
        let entries = records
            .into_iter()
            .map(|r| (r.key, Item { value: r.value, revision: r.revision, lease: None }))
            .collect();
        let log = Log { batches: VecDeque::new(), events: 0, bytes: 0, floor: revision };
        Memory { revision, entries, leases: HashMap::new(), log }
    }

    pub(super) fn get(&self, key: &str) -> Option<Entry> {
        self.entries.get_key_value(key).map(|(k, i)| entry(k, i))
    }

    pub(super) fn range(&self, prefix: &str) -> Snapshot {
        let entries = self
            .entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(k, _)| k.starts_with(prefix))
            .map(|(k, i)| entry(k, i))
            .collect();
        Snapshot { entries, revision: self.revision }
    }

    /// All that is durable, in key order.
    pub(super) fn durable(&self) -> Vec<Record> {
        let durable = self.entries.iter().filter(|(_, i)| i.lease.is_none());
        durable
            .map(|(k, i)| Record { key: k.clone(), revision: i.revision, value: i.value.clone() })
            .collect()
    }

    /// Whether the changes after `after` are all kept.
    pub(super) fn check_watch(&self, after: Revision) -> Result<(), StoreError> {
        if after < self.log.floor || after > self.revision {
            return Err(StoreError::Compacted { asked: after, oldest: self.log.floor });
        }
        Ok(())
    }

    /// The first changes after `after` under `prefix`. Looks at a bounded number of batches, so that
    /// the state is not locked for long.
    pub(super) fn step(&self, prefix: &str, after: Revision) -> Result<Step, StoreError> {
        self.check_watch(after)?;
        let batches = &self.log.batches;
        let start = batches.partition_point(|b| b.revision <= after);
        for batch in batches.range(start..).take(1024) {
            let mine = || batch.events.iter().filter(|e| e.key.starts_with(prefix));
            if mine().next().is_some() {
                let events = mine().cloned().collect();
                return Ok(Step::Batch(WatchBatch { revision: batch.revision, events }));
            }
        }
        match batches.get(start + 1023) {
            Some(last) if start + 1024 < batches.len() => Ok(Step::Passed(last.revision)),
            _ if after < self.revision => Ok(Step::Passed(self.revision)),
            _ => Ok(Step::AtEnd),
        }
    }

    pub(super) fn grant(&mut self, id: LeaseId, ttl: Duration, now: Instant) {
        self.leases.insert(id, Lease { ttl, expires: later(now, ttl), ending: false, keys: BTreeSet::new() });
    }

    pub(super) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> Result<(), StoreError> {
        match self.leases.get_mut(&id) {
            Some(lease) if !lease.ending => {
                lease.expires = later(now, lease.ttl);
                Ok(())
            }
            _ => Err(StoreError::LeaseEnded),
        }
    }

    /// When the next lease ends unless it is kept alive.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|l| l.expires).min()
    }

    /// Marks the leases that have run out as ending, and gives them.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<LeaseId> {
        let mut due: Vec<_> = self.leases.iter_mut().filter(|(_, l)| l.expires <= now && !l.ending).collect();
        due.sort_by_key(|(id, lease)| (lease.expires, **id));
        due.into_iter()
            .map(|(id, lease)| {
                lease.ending = true;
                *id
            })
            .collect()
    }

    /// Marks a lease as ending; false when there is none.
    pub(super) fn revoke(&mut self, id: LeaseId) -> bool {
        match self.leases.get_mut(&id) {
            Some(lease) if !lease.ending => {
                lease.ending = true;
                true
            }
            _ => false,
        }
    }

    /// Takes [`expire`](Self::expire) or [`revoke`](Self::revoke) back, when the end could not be carried out.
    pub(super) fn unmark(&mut self, id: LeaseId) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.ending = false;
        }
    }

    /// Makes a plan visible to readers and watchers. The plan has to be made from this very state.
    pub(super) fn publish(&mut self, plan: Outcome) {
        for (key, change) in plan.changes {
            let old = match change {
                Some(item) => {
                    if let Some(lease) = item.lease.and_then(|l| self.leases.get_mut(&l)) {
                        lease.keys.insert(key.clone());
                    }
                    let lease = item.lease;
                    self.entries.insert(key.clone(), item).and_then(|i| i.lease).filter(|l| lease != Some(*l))
                }
                None => self.entries.remove(&key).and_then(|i| i.lease),
            };
            if let Some(lease) = old.and_then(|l| self.leases.get_mut(&l)) {
                lease.keys.remove(&key);
            }
        }
        for id in plan.ended {
            self.leases.remove(&id);
        }
        for batch in plan.log {
            self.log.push(batch);
        }
        self.revision = plan.revision;
    }
}

/// A lease of some hundred years never ends.
fn later(now: Instant, ttl: Duration) -> Instant {
    now.checked_add(ttl.min(Duration::from_secs(1 << 32))).unwrap_or(now)
}

fn entry(key: &Arc<str>, item: &Item) -> Entry {
    Entry { key: key.clone(), value: item.value.clone(), revision: item.revision }
}

/// A transaction, checked for its size and made ready to be planned any number of times.
#[derive(Debug)]
pub(super) struct Prepared {
    compares: Vec<Compare>,
    writes: Vec<Write>,
    /// Bytes of keys and values.
    pub(super) bytes: usize,
}

#[derive(Debug)]
struct Write {
    key: Arc<str>,
    put: Option<(Arc<[u8]>, Option<LeaseId>)>,
}

impl Prepared {
    pub(super) fn new(txn: Txn) -> Result<Self, StoreError> {
        let bytes = check_size(&txn)?;
        let mut writes: Vec<Write> = Vec::with_capacity(txn.ops.len());
        for op in txn.ops {
            let write = match op {
                Op::Put { key, value, lease } => Write { key: key.into(), put: Some((value.into(), lease)) },
                Op::Delete { key } => Write { key: key.into(), put: None },
            };
            writes.retain(|w| w.key != write.key);
            writes.push(write);
        }
        Ok(Prepared { compares: txn.compares, writes, bytes })
    }
}

/// A batch of transactions being worked out, one after the other, over the state.
#[derive(Debug)]
pub(super) struct Plan<'m> {
    base: &'m Memory,
    /// The next revision to give.
    next: Revision,
    /// Revisions from this one on must not be given.
    ceiling: Revision,
    /// Why nothing durable may be written, when so.
    refusal: Option<StoreError>,
    out: Outcome,
}

/// A batch worked out.
#[derive(Debug)]
pub(super) struct Outcome {
    changes: BTreeMap<Arc<str>, Option<Item>>,
    ended: BTreeSet<LeaseId>,
    log: Vec<WatchBatch>,
    /// The last revision given, or that of the state.
    pub(super) revision: Revision,
    /// What has to be on disk before it is published.
    pub(super) durable: Vec<DurableChange>,
}

impl Outcome {
    /// Whether there is anything to publish.
    pub(super) fn is_empty(&self) -> bool {
        self.log.is_empty() && self.ended.is_empty()
    }
}

impl<'m> Plan<'m> {
    pub(super) fn new(
        base: &'m Memory,
        next: Revision,
        ceiling: Revision,
        refusal: Option<StoreError>,
    ) -> Self {
        let out = Outcome {
            changes: BTreeMap::new(),
            ended: BTreeSet::new(),
            log: Vec::new(),
            revision: base.revision,
            durable: Vec::new(),
        };
        Plan { base, next, ceiling, refusal, out }
    }

    fn find(&self, key: &str) -> Option<&Item> {
        match self.out.changes.get(key) {
            Some(change) => change.as_ref(),
            None => self.base.entries.get(key),
        }
    }

    fn lease_lives(&self, id: LeaseId) -> bool {
        !self.out.ended.contains(&id) && self.base.leases.get(&id).is_some_and(|l| !l.ending)
    }

    fn take_revision(&mut self) -> Result<Revision, StoreError> {
        if self.next >= self.ceiling {
            return Err(self
                .refusal
                .clone()
                .unwrap_or_else(|| StoreError::Unavailable("no revisions are reserved; try again".into())));
        }
        let revision = self.next;
        self.next += 1;
        Ok(revision)
    }

    /// Adds one transaction.
    pub(super) fn commit(&mut self, txn: &Prepared) -> Result<Revision, StoreError> {
        for compare in &txn.compares {
            let found = self.find(&compare.key).map_or(0, |i| i.revision);
            if found != compare.revision {
                let (key, expected) = (compare.key.clone(), compare.revision);
                return Err(Conflict { key, expected, found }.into());
            }
        }
        let mut effective = false;
        for write in &txn.writes {
            let old = self.find(&write.key);
            if let Some((_, Some(lease))) = write.put
                && !self.lease_lives(lease)
            {
                return Err(StoreError::LeaseEnded);
            }
            let to_disk = matches!(write.put, Some((_, None))) || old.is_some_and(|i| i.lease.is_none());
            if let Some(refusal) = self.refusal.as_ref().filter(|_| to_disk) {
                return Err(refusal.clone());
            }
            effective |= write.put.is_some() || old.is_some();
        }
        if !effective {
            return Ok(self.out.revision);
        }
        let revision = self.take_revision()?;
        let mut events = Vec::with_capacity(txn.writes.len());
        for write in &txn.writes {
            let item = write.put.as_ref().map(|(value, lease)| Item {
                value: value.clone(),
                revision,
                lease: *lease,
            });
            if item.is_none() && self.find(&write.key).is_none() {
                continue;
            }
            events.push(Event { key: write.key.clone(), entry: item.as_ref().map(|i| entry(&write.key, i)) });
            self.out.changes.insert(write.key.clone(), item);
        }
        self.out.log.push(WatchBatch { revision, events });
        self.out.revision = revision;
        Ok(revision)
    }

    /// Adds the end of a lease that was marked as ending: one revision at which all its keys go.
    pub(super) fn end_lease(&mut self, id: LeaseId) -> Result<(), StoreError> {
        let Some(lease) = self.base.leases.get(&id) else { return Ok(()) };
        let mut keys = lease.keys.clone();
        for (key, change) in &self.out.changes {
            if change.as_ref().is_some_and(|i| i.lease == Some(id)) {
                keys.insert(key.clone());
            } else {
                keys.remove(key);
            }
        }
        if !keys.is_empty() {
            let revision = self.take_revision()?;
            let events = keys.iter().map(|k| Event { key: k.clone(), entry: None }).collect();
            self.out.log.push(WatchBatch { revision, events });
            self.out.revision = revision;
            self.out.changes.extend(keys.into_iter().map(|k| (k, None)));
        }
        self.out.ended.insert(id);
        Ok(())
    }

    /// Ends planning; the next revision to give after it stands beside the outcome.
    pub(super) fn finish(mut self) -> (Outcome, Revision) {
        for (key, change) in &self.out.changes {
            match change {
                Some(Item { value, revision, lease: None }) => {
                    self.out.durable.push((key.clone(), Some((*revision, value.clone()))));
                }
                // Whatever became of it, its copy on disk has to go.
                _ if self.base.entries.get(key).is_some_and(|i| i.lease.is_none()) => {
                    self.out.durable.push((key.clone(), None));
                }
                _ => {}
            }
        }
        (self.out, self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEASES: i64 = 3;

    /// One step of a batch, by small numbers.
    #[derive(Clone, Debug)]
    enum Deed {
        Commit { compares: Vec<(u8, u64)>, ops: Vec<(u8, Option<Option<i64>>)> },
        End(i64),
    }

    fn deeds() -> impl Strategy<Value = Vec<Deed>> {
        let lease = prop::option::of(1..=LEASES);
        let op = (0..6u8, prop::option::weighted(0.7, lease));
        let commit = (prop::collection::vec((0..6u8, 0..12u64), 0..2), prop::collection::vec(op, 0..4))
            .prop_map(|(compares, ops)| Deed::Commit { compares, ops });
        let deed = prop_oneof![9 => commit, 1 => (1..=LEASES).prop_map(Deed::End)];
        prop::collection::vec(deed, 0..40)
    }

    fn key(n: u8) -> String {
        format!("{}/{n}", if n.is_multiple_of(2) { "a" } else { "b" })
    }

    fn prepare(deed: &Deed, n: usize) -> Option<Prepared> {
        let Deed::Commit { compares, ops } = deed else { return None };
        let ops = ops.iter().enumerate().map(|(i, (k, put))| match put {
            Some(lease) => Op::Put { key: key(*k), value: vec![n as u8, i as u8], lease: lease.map(LeaseId) },
            None => Op::delete(key(*k)),
        });
        let compares = compares.iter().map(|(k, revision)| Compare { key: key(*k), revision: *revision });
        Some(Prepared::new(Txn { compares: compares.collect(), ops: ops.collect() }).unwrap())
    }

    fn with_leases() -> Memory {
        let mut memory = Memory::new(1, []);
        for id in 1..=LEASES {
            memory.grant(LeaseId(id), Duration::from_secs(9), Instant::now());
        }
        memory
    }

    type Answers = Vec<Result<Revision, StoreError>>;

    type Disk = BTreeMap<Arc<str>, Record>;

    /// Runs deeds as batches of at most `size`, as the writer does, and gives the answers.
    fn run(memory: &mut Memory, disk: &mut Disk, deeds: &[Deed], size: usize) -> Answers {
        let (mut answers, mut next) = (Vec::new(), memory.revision + 1);
        let mut n = 0;
        for batch in deeds.chunks(size) {
            // Ends come first in a batch, and mark their leases before anything else is looked at.
            let ends = batch.iter().filter_map(|d| match d {
                Deed::End(id) => Some(LeaseId(*id)),
                Deed::Commit { .. } => None,
            });
            let ends: Vec<_> = ends.filter(|id| memory.revoke(*id)).collect();
            let mut plan = Plan::new(memory, next, Revision::MAX, None);
            for id in ends {
                plan.end_lease(id).unwrap();
            }
            for deed in batch {
                answers.extend(prepare(deed, n).map(|txn| plan.commit(&txn)));
                n += 1;
            }
            let (outcome, after) = plan.finish();
            for (key, change) in &outcome.durable {
                match change.clone() {
                    Some((revision, value)) => {
                        disk.insert(key.clone(), Record { key: key.clone(), revision, value });
                    }
                    None => assert!(disk.remove(key).is_some(), "{key} was not on disk"),
                }
            }
            next = after;
            memory.publish(outcome);
        }
        answers
    }

    fn check(memory: &Memory, disk: &Disk) {
        assert_eq!(memory.durable(), disk.values().cloned().collect::<Vec<_>>());
        // The leases know their keys.
        for (id, lease) in &memory.leases {
            let held = memory.entries.iter().filter(|(_, i)| i.lease == Some(*id));
            assert_eq!(lease.keys, held.map(|(k, _)| k.clone()).collect());
        }
        let orphan = |i: &&Item| i.lease.is_some_and(|l| !memory.leases.contains_key(&l));
        assert_eq!(memory.entries.values().find(orphan), None);
        // Watches tell the whole story, each its part.
        for prefix in ["", "a/", "b/", "none"] {
            let (mut state, mut after) = (BTreeMap::new(), 1);
            loop {
                match memory.step(prefix, after).unwrap() {
                    Step::Batch(batch) => {
                        assert!(batch.revision > after && !batch.events.is_empty());
                        after = batch.revision;
                        for Event { key, entry } in batch.events {
                            match entry {
                                Some(entry) => drop(state.insert(key, entry)),
                                None => assert!(state.remove(&key).is_some(), "{key} was not there"),
                            }
                        }
                    }
                    Step::Passed(revision) => after = revision,
                    Step::AtEnd => break,
                }
            }
            assert_eq!(state.into_values().collect::<Vec<_>>(), memory.range(prefix).entries);
        }
    }

    proptest! {
        /// Commits in groups are just what they would be one by one.
        #[test]
        fn groups_are_as_good_as_single_commits(deeds in deeds(), size in 2..20usize) {
            let (mut single, mut grouped) = (with_leases(), with_leases());
            let (mut one, mut many) = ((Answers::new(), Disk::new()), (Answers::new(), Disk::new()));
            // The end of a lease goes to the front of its group: so that it is at the same place in both,
            // it is a group of its own.
            for part in deeds.chunk_by(|a, b| matches!((a, b), (Deed::Commit { .. }, Deed::Commit { .. }))) {
                one.0.extend(run(&mut single, &mut one.1, part, 1));
                many.0.extend(run(&mut grouped, &mut many.1, part, size));
            }
            prop_assert_eq!(&one, &many);
            prop_assert_eq!(&single.entries, &grouped.entries);
            prop_assert_eq!(&single.log.batches, &grouped.log.batches);
            prop_assert_eq!(single.revision, grouped.revision);
            check(&single, &one.1);
        }

        /// However ends of leases fall among commits, memory, disk, leases and watches agree.
        #[test]
        fn all_parts_agree(deeds in deeds(), size in 1..20usize) {
            let mut memory = with_leases();
            let mut disk = Disk::new();
            let answers = run(&mut memory, &mut disk, &deeds, size);
            check(&memory, &disk);
            let given: Vec<_> = answers.into_iter().flatten().collect();
            prop_assert!(given.is_sorted());
        }

        /// With a disk that takes nothing, what is durable does not change, and the rest goes on.
        #[test]
        fn a_refusal_keeps_off_the_disk(before in deeds(), deeds in deeds()) {
            let mut memory = with_leases();
            let mut disk = Disk::new();
            run(&mut memory, &mut disk, &before, 5);
            let refusal = StoreError::Unavailable("full".into());
            let mut plan = Plan::new(&memory, memory.revision + 1, Revision::MAX, Some(refusal.clone()));
            for (n, deed) in deeds.iter().enumerate() {
                if let Some(txn) = prepare(deed, n) {
                    let durable = txn.writes.iter().any(|w| matches!(w.put, Some((_, None))));
                    let answer = plan.commit(&txn);
                    prop_assert!(!durable || answer.is_err());
                }
            }
            let (outcome, _) = plan.finish();
            prop_assert_eq!(&outcome.durable, &vec![]);
            memory.publish(outcome);
            check(&memory, &disk);
        }
    }
}
