//! Calls of the store: on their way there, carried out, and on their way back; and watches.

use super::*;
use crate::oracle::{MEMBERS, REMOVED};
use crate::scenario::Slow;
use crate::store::{Answer, Request};
use fleet_registry::records::{
    FORMAT, LEAVING, MACHINES, PRESENCES, SCHEDULE, STATES, UNITS, put_format, unit_key,
};
use fleet_registry::{Entry, Event as Change, LeaseId, Op, StoreError, Txn, WatchBatch};
use std::collections::BTreeSet;
use tokio::sync::oneshot;

/// How the store is.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreTrouble {
    /// How slow it is, until then.
    pub(super) slow: Option<(Time, Slow)>,
    /// Until then calls, or their answers, are lost with this probability.
    pub(super) lossy: Option<(Time, f64)>,
    /// Until then calls fail with this probability.
    pub(super) failing: Option<(Time, f64)>,
    /// Until then its data is lost, as far as it knows.
    pub(super) lost: Option<Time>,
    /// Servers that are cut off: calls to the store, and answers, until then.
    pub(super) cuts: Vec<(usize, bool, bool, Time)>,
    /// Writes of an embedded store of which it is not known whether they reached the disk: so far they count as not written, and
    /// the next restart may find them.
    pub(super) limbo: Option<Txn>,
    /// Hosts that were suspended with a member of the store that led until then.
    pub(super) deposed: BTreeMap<usize, Deposed>,
    /// Deliberate mistake: the next listing of that host is empty.
    pub(super) empty_listing: Option<usize>,
}

/// A member of the store that does not know that another leads.
#[derive(Clone, Debug)]
pub(super) struct Deposed {
    /// What it renews though it can't.
    leases: BTreeSet<LeaseId>,
    /// When it learns of it; none while its machine sleeps.
    until: Option<Time>,
}

/// An answer on its way.
pub(super) struct Reply {
    host: usize,
    send: oneshot::Sender<Result<Answer, StoreError>>,
    answer: Result<Answer, StoreError>,
}

/// Somebody who follows the store.
pub(super) struct Watcher {
    host: usize,
    prefix: String,
    sent: u64,
    send: mpsc::UnboundedSender<Result<WatchBatch, StoreError>>,
    /// A flush is on its way.
    flushing: bool,
}

impl World {
    /// The store's own clock.
    pub(super) fn store_now(&self) -> Time {
        self.now.mul_f64(self.store_rate)
    }

    pub(super) fn format_store(&mut self) {
        self.in_store(None, |store| {
            // A store without conditions takes everything.
            let _ = store.commit(&Txn::of(put_format()));
        });
        for host in self.scenario.servers..self.hosts.len() {
            self.join(host);
        }
    }

    /// A machine joins the cluster, unless it is in it, as one does with a token.
    pub(super) fn join(&mut self, host: usize) {
        let id = self.hosts[host].id.clone();
        let key = format!("{MEMBERS}{id}");
        if self.store.get(&key).is_some() {
            return;
        }
        let record = format!(r#"{{"format":1,"key":"{host:064x}","joined":0}}"#);
        let mut txn = Txn::of(Op::put(&key, record));
        txn.ops.push(Op::delete(format!("{REMOVED}{id}")));
        self.in_store(None, |store| {
            // Without conditions everything is taken.
            let _ = store.commit(&txn);
        });
    }

    /// Does something in the store, and follows what that changed.
    pub(super) fn in_store<T>(&mut self, by: Option<usize>, act: impl FnOnce(&mut StoreModel) -> T) -> T {
        let before = self.store.revision();
        let done = act(&mut self.store);
        if self.store.revision() > before {
            let batches = self.store.changes("", before).unwrap_or_default();
            for batch in batches {
                self.note(|| format!("revision {}: {}", batch.revision, shown(&batch.events)));
                self.oracle.follow_formats(self.now, &batch, |value| format_of(value) == NEWER);
                // It knows what a newer version says.
                let mut batch = batch;
                batch.events.iter_mut().filter_map(|event| event.entry.as_mut()).for_each(translate);
                self.oracle.follow(self.now, &batch, by);
                for event in batch.events.iter().filter(|event| event.entry.is_none()) {
                    let removed = event.key.strip_prefix(MEMBERS);
                    let host = self.hosts.iter().position(|host| Some(host.id.as_str()) == removed);
                    if let Some(host) = host {
                        let after = self.rng.spread(500, 120_000);
                        self.after(after, Event::Join(host));
                    }
                }
            }
            self.wake_watchers();
        }
        done
    }

    fn wake_watchers(&mut self) {
        for number in 0..self.watchers.len() {
            if !std::mem::replace(&mut self.watchers[number].flushing, true) {
                let delay = if self.scenario.shared { self.rng.spread(1, 40) } else { Duration::ZERO };
                self.after(delay, Event::Flush(number));
            }
        }
    }

    fn store_cut(&self, host: usize) -> (bool, bool) {
        let cuts = self.store_trouble.cuts.iter().filter(|(on, .., until)| *on == host && *until > self.now);
        cuts.fold((false, false), |(to, from), (_, cut_to, cut_from, _)| (to || *cut_to, from || *cut_from))
    }

    /// How long a call, or its answer, is on its way. `writes`: it waits for the store's disk.
    fn call_delay(&mut self, writes: bool) -> Duration {
        let slow = self.store_trouble.slow.filter(|(until, _)| *until > self.now);
        let more = match slow {
            Some((_, Slow::All(most))) => self.rng.spread(1, most),
            Some((_, Slow::Some(most, part))) if self.rng.chance(part) => self.rng.millis(1, most),
            Some((_, Slow::Writes(most, part))) if writes && self.rng.chance(part) => {
                self.rng.millis(1, most)
            }
            _ => Duration::ZERO,
        };
        more + if self.scenario.shared { self.rng.spread(1, 20) } else { Duration::ZERO }
    }

    pub(super) fn take_calls(&mut self) {
        let calls = std::mem::take(&mut *self.calls.lock().unwrap_or_else(PoisonError::into_inner));
        self.unanswered.retain(|call| !call.reply.is_closed());
        self.busy |= !calls.is_empty();
        for call in calls {
            let (to, _) = self.store_cut(call.host);
            if to || self.is_lost() {
                self.unanswered.push(call);
            } else {
                let writes = matches!(call.request, Request::Commit(_) | Request::Barrier);
                let delay = self.call_delay(writes);
                self.after(delay, Event::Call(call));
            }
        }
    }

    /// Whether a message to or from the store is lost.
    fn is_lost(&mut self) -> bool {
        let lossy = self.store_trouble.lossy.filter(|(until, _)| *until > self.now);
        lossy.is_some_and(|(_, probability)| self.rng.chance(probability))
    }

    pub(super) fn called(&mut self, call: Call) {
        let Call { host, incarnation, request, reply } = call;
        let alive = self.hosts[host].incarnation == incarnation && self.hosts[host].process.is_some();
        if !self.scenario.shared && !alive {
            // The embedded store ended with its process.
            return;
        }
        let failing = self.store_trouble.failing.filter(|(until, _)| *until > self.now);
        let fails = failing.is_some_and(|(_, probability)| self.rng.chance(probability));
        let answer = if self.store_trouble.lost.is_some_and(|until| until > self.now) {
            Err(StoreError::Damaged("another registry than before".to_owned()))
        } else if fails {
            self.fail(host, request)
        } else {
            self.carry_out(host, request)
        };
        let delay = self.call_delay(false);
        self.after(delay, Event::Reply(Reply { host, send: reply, answer }));
    }

    fn fail(&mut self, host: usize, request: Request) -> Result<Answer, StoreError> {
        if !self.scenario.shared {
            return self.fail_on_disk(host, request);
        }
        if matches!(request, Request::Commit(_)) && self.rng.chance(0.6) {
            if self.rng.chance(0.5) {
                // It is done all the same; nobody knows.
                let _ = self.carry_out(host, request);
            }
            return Err(StoreError::Unknown("the connection broke".to_owned()));
        }
        Err(StoreError::Unavailable("no leader".to_owned()))
    }

    /// As the embedded store behaves when its disk is full or fails: what is read, leases, and what is under them go on, and
    /// what has to be durable is refused. When it is the sync that failed, nobody knows whether it is durable.
    fn fail_on_disk(&mut self, host: usize, request: Request) -> Result<Answer, StoreError> {
        let Request::Commit(txn) = request else { return self.carry_out(host, request) };
        let durable = |op: &Op| match op {
            Op::Put { lease, .. } => lease.is_none(),
            Op::Delete { key } => !key.starts_with(PRESENCES) && !key.starts_with(STATES),
        };
        if !txn.ops.iter().any(durable) {
            return self.carry_out(host, Request::Commit(txn));
        }
        if let Some(conflict) = self.store.conflict(&txn.compares) {
            return Err(conflict.into());
        }
        if self.rng.chance(0.3) {
            // Conditions held when it was written; that is how it may be found.
            self.store_trouble.limbo = Some(Txn { compares: Vec::new(), ops: txn.ops });
            return Err(StoreError::Unknown("the disk did not take it".to_owned()));
        }
        Err(StoreError::Unavailable("no space left".to_owned()))
    }

    fn carry_out(&mut self, host: usize, request: Request) -> Result<Answer, StoreError> {
        let now = self.store_now();
        match request {
            Request::Range(prefix) => {
                let mut snapshot = self.store.range(&prefix);
                if self.is_newer(host) {
                    snapshot.entries.iter_mut().for_each(translate);
                }
                if self.store_trouble.empty_listing == Some(host) {
                    self.store_trouble.empty_listing = None;
                    snapshot.entries.clear();
                }
                if self.mutation == Some(Mutation::UnreadableIsGone) {
                    snapshot.entries.retain(|entry| is_readable(&entry.value));
                }
                Ok(Answer::Snapshot(snapshot))
            }
            Request::Get(key) => {
                let mut entry = self.store.get(&key);
                if self.is_newer(host) {
                    entry.iter_mut().for_each(translate);
                }
                Ok(Answer::Entry(entry))
            }
            Request::Commit(mut txn) => {
                self.mutate(&mut txn);
                self.write_as(host, &mut txn);
                let before = self.unknown_fields(&txn);
                let done = self.in_store(Some(host), |store| store.commit(&txn));
                if before != self.unknown_fields(&txn) && !before.is_empty() {
                    let what = format!("of {before:?} a field was lost that this version does not know");
                    self.violate("G9", what);
                }
                if done.is_ok() && !txn.ops.is_empty() {
                    // The file was brought back to what is known before anything else was written to it.
                    self.store_trouble.limbo = None;
                }
                done.map(Answer::Revision)
            }
            Request::Barrier => Ok(Answer::Revision(self.in_store(Some(host), StoreModel::barrier))),
            Request::Grant(ttl) => {
                let presence = ttl == self.scenario.ttl;
                let early = presence && self.mutation == Some(Mutation::EarlyExpiry);
                let ttl = if early { ttl.mul_f64(0.6) } else { ttl };
                Ok(Answer::Lease(self.store.grant(ttl, now)))
            }
            Request::KeepAlive(lease) if self.is_renewed_in_vain(host, lease) => Ok(Answer::Done),
            Request::KeepAlive(lease) => self.store.keep_alive(lease, now).map(|()| Answer::Done),
            Request::Revoke(lease) => {
                self.in_store(Some(host), |store| store.revoke(lease)).map(|()| Answer::Done)
            }
            Request::Watch(prefix, after) => {
                self.store.changes(&prefix, after)?;
                let (send, receive) = mpsc::unbounded_channel();
                self.watchers.push(Watcher { host, prefix, sent: after, send, flushing: true });
                self.after(Duration::ZERO, Event::Flush(self.watchers.len() - 1));
                Ok(Answer::Watch(receive))
            }
        }
    }

    /// A host is suspended for so long that another member of the store leads than the one on it.
    pub(super) fn elect(&mut self, host: usize) {
        if lock(&self.hosts[host].machine).asleep.is_none() {
            return;
        }
        let now = self.store_now();
        self.store.refresh_leases(now);
        let deposed = Deposed { leases: self.store.leases(), until: None };
        self.store_trouble.deposed.insert(host, deposed);
        self.note(|| format!("another member of the store leads than that of host {host}"));
    }

    /// It goes on, and its member of the store believes for a moment that it leads.
    pub(super) fn believes_to_lead(&mut self, host: usize) {
        if self.store_trouble.deposed.contains_key(&host) {
            let until = self.now + self.rng.spread(10, 1_500);
            self.store_trouble.deposed.entry(host).and_modify(|deposed| deposed.until = Some(until));
        }
    }

    /// The member on a host, if that has missed who leads now.
    fn deposed(&self, host: usize) -> Option<&Deposed> {
        let deposed = self.store_trouble.deposed.get(&host)?;
        deposed.until.is_none_or(|until| until > self.now).then_some(deposed)
    }

    fn is_renewed_in_vain(&self, host: usize, lease: LeaseId) -> bool {
        self.deposed(host).is_some_and(|deposed| deposed.leases.contains(&lease))
    }

    /// Deliberate mistakes of who wrote a transaction.
    fn mutate(&mut self, txn: &mut Txn) {
        let schedule = txn.ops.iter().any(|op| op.key().starts_with(SCHEDULE));
        let drops: &dyn Fn(&str, u64) -> bool = match self.mutation {
            Some(Mutation::NoUnitGuard) => &|key, _| key.starts_with(UNITS),
            Some(Mutation::NoFence) => &|key, _| key == "fence" || key.starts_with(SCHEDULE),
            Some(Mutation::NoTermGuard) => &|key, _| key == crate::oracle::LEADER && schedule,
            Some(Mutation::NoAbsenceGuard) => &|key, revision| key.starts_with(PRESENCES) && revision == 0,
            Some(Mutation::NoSessionGuard) => &|key, revision| key.starts_with(PRESENCES) && revision != 0,
            _ => return,
        };
        txn.compares.retain(|compare| !drops(&compare.key, compare.revision));
    }

    /// Whether a server is of a newer version, which can read what the others can't.
    fn is_newer(&self, host: usize) -> bool {
        host >= self.scenario.servers - self.scenario.newer.min(self.scenario.servers)
    }

    /// What the version of a server does to what it writes.
    fn write_as(&mut self, host: usize, txn: &mut Txn) {
        let newer = self.is_newer(host);
        for op in &mut txn.ops {
            let Op::Put { key, value, .. } = op else { continue };
            if newer {
                let kinds = [UNITS, SCHEDULE, LEAVING, MACHINES];
                let other = self.scenario.formats > 0.0 && kinds.iter().any(|kind| key.starts_with(kind));
                if other && self.rng.chance(self.scenario.formats) {
                    edit(value, |record| drop(record.insert("format".to_owned(), NEWER.into())));
                }
                edit(value, |record| {
                    drop(record.insert(LATER.to_owned(), serde_json::json!({"is": [1, "x"]})))
                });
            } else if self.mutation == Some(Mutation::UnknownFieldsLost) {
                edit(value, |record| drop(record.remove(LATER)));
            }
        }
    }

    /// G9: the fields of machines' records, which are read, changed and written back, that this version does not know.
    fn unknown_fields(&self, txn: &Txn) -> Vec<String> {
        let written = txn.ops.iter().filter(|op| matches!(op, Op::Put { .. }));
        let keys = written.map(Op::key).filter(|key| key.starts_with(MACHINES));
        let has = |key: &&str| {
            let entry = self.store.get(key);
            entry.is_some_and(|entry| String::from_utf8_lossy(&entry.value).contains(LATER))
        };
        keys.filter(has).map(str::to_owned).collect()
    }

    /// A version that no server is of writes a unit's record in a format that none reads.
    pub(super) fn make_unreadable(&mut self, pick: usize) -> Option<UnitName> {
        let names: Vec<_> = self.oracle.view().units().map(|(name, _)| name.clone()).collect();
        let name = names.get(pick % names.len().max(1))?.clone();
        self.rewrite(&name, NEWEST);
        Some(name)
    }

    /// It is written as before.
    pub(super) fn make_readable(&mut self, name: &UnitName) {
        self.rewrite(name, FORMAT);
    }

    fn rewrite(&mut self, name: &UnitName, format: u32) {
        let key = unit_key(name);
        let Some(entry) = self.store.get(&key) else { return };
        if (format_of(&entry.value) == NEWEST) == (format == NEWEST) {
            return;
        }
        let mut value = entry.value.to_vec();
        edit(&mut value, |record| drop(record.insert("format".to_owned(), format.into())));
        self.in_store(None, |store| {
            // Without conditions everything is taken.
            let _ = store.commit(&Txn::of(Op::put(&key, value)));
        });
    }

    pub(super) fn replied(&mut self, reply: Reply) {
        let (_, from) = self.store_cut(reply.host);
        if from || self.is_lost() {
            // It never comes; who waits for it gives up.
            self.unanswered.push(Call {
                host: reply.host,
                incarnation: 0,
                request: Request::Get(String::new()),
                reply: reply.send,
            });
            return;
        }
        // Who asked may be gone.
        let _ = reply.send.send(reply.answer);
    }

    /// Brings a watcher what is new.
    pub(super) fn flush(&mut self, number: usize) {
        let host = self.watchers[number].host;
        let lost = self.store_trouble.lost.is_some_and(|until| until > self.now);
        let (_, from) = self.store_cut(host);
        if self.watchers[number].send.is_closed() {
            return;
        }
        if from || self.deposed(host).is_some() {
            return self.after(Duration::from_millis(200), Event::Flush(number));
        }
        let slow = self.store_trouble.slow.filter(|(until, _)| *until > self.now);
        let most = match slow {
            Some((_, Slow::All(most) | Slow::Some(most, _))) => most,
            _ => 0,
        };
        if most > 0 && self.rng.chance(0.3) {
            let more = self.rng.spread(1, most);
            return self.after(more, Event::Flush(number));
        }
        let drop_one = self.mutation == Some(Mutation::LostChange) && self.rng.chance(0.02);
        let newer = self.is_newer(host);
        let watcher = &mut self.watchers[number];
        watcher.flushing = false;
        let changes = match lost {
            true => Err(StoreError::Damaged("another registry than before".to_owned())),
            false => self.store.changes(&watcher.prefix, watcher.sent),
        };
        // Nobody listens any more when a send fails.
        match changes {
            Ok(mut batches) => {
                if newer {
                    let events = batches.iter_mut().flat_map(|batch| &mut batch.events);
                    events.filter_map(|event| event.entry.as_mut()).for_each(translate);
                }
                if self.mutation == Some(Mutation::UnreadableIsGone) {
                    let events = batches.iter_mut().flat_map(|batch| &mut batch.events);
                    for event in events {
                        event.entry = event.entry.take().filter(|entry| is_readable(&entry.value));
                    }
                }
                let skipped = if drop_one { batches.len().checked_sub(1) } else { None };
                for (place, batch) in batches.into_iter().enumerate() {
                    watcher.sent = batch.revision;
                    if skipped != Some(place) {
                        let _ = watcher.send.send(Ok(batch));
                    }
                }
            }
            Err(error) => {
                let _ = watcher.send.send(Err(error));
                // The watch is over.
                watcher.send = mpsc::unbounded_channel().0;
            }
        }
    }

    /// The process of the embedded store ended: leases go.
    pub(super) fn restart_store(&mut self) {
        if self.mutation == Some(Mutation::LostWrites) {
            self.store.undo_last();
        }
        self.store.forget_leases();
        let limbo = self.store_trouble.limbo.take();
        if let Some(txn) = limbo.filter(|_| self.rng.chance(0.5)) {
            self.note(|| "the store finds on its disk what it was not sure of".to_owned());
            self.in_store(None, |store| {
                // Without conditions everything is taken.
                let _ = store.commit(&txn);
            });
        }
        let mut snapshot = self.store.range("");
        snapshot.entries.iter_mut().for_each(translate);
        self.oracle.reset(self.now, &snapshot);
        for watcher in &mut self.watchers {
            watcher.send = mpsc::unbounded_channel().0;
        }
    }
}

/// The field that a newer version writes into records.
const LATER: &str = "later";

/// The format that newer servers write, and read, and one that nobody reads.
const NEWER: u32 = FORMAT + 1;
const NEWEST: u32 = FORMAT + 2;

/// Whether this version can read a record, as far as its format goes.
fn is_readable(value: &[u8]) -> bool {
    format_of(value) <= FORMAT
}

/// The format of a record; of what is none, this one's.
fn format_of(value: &[u8]) -> u32 {
    let record: serde_json::Value = serde_json::from_slice(value).unwrap_or_default();
    record["format"].as_u64().and_then(|format| u32::try_from(format).ok()).unwrap_or(FORMAT)
}

/// What a newer version reads in a record.
fn translate(entry: &mut Entry) {
    if format_of(&entry.value) == NEWER {
        let mut value = entry.value.to_vec();
        edit(&mut value, |record| drop(record.insert("format".to_owned(), FORMAT.into())));
        entry.value = value.into();
    }
}

/// Changes a record as JSON; what is none stays as it is.
fn edit(value: &mut Vec<u8>, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    if let Ok(serde_json::Value::Object(mut record)) = serde_json::from_slice(value) {
        change(&mut record);
        if let Ok(changed) = serde_json::to_vec(&record) {
            *value = changed;
        }
    }
}

/// Changes as the trace shows them. The servers' own records have times of day in them.
fn shown(events: &[Change]) -> String {
    let timed = ["server/", REMOVED];
    let shown = events.iter().map(|event| match &event.entry {
        Some(entry) if event.key.starts_with(STATES) => {
            let record: serde_json::Value = serde_json::from_slice(&entry.value).unwrap_or_default();
            let rows = record["units"].as_array().into_iter().flatten();
            let rows =
                rows.map(|row| format!("{} {} {} {}", row[0], row[1], row[4], row[6]).replace('"', ""));
            format!("{} = {}", event.key, rows.collect::<Vec<_>>().join(", "))
        }
        Some(entry) if event.key.contains('/') && !timed.iter().any(|kind| event.key.starts_with(kind)) => {
            format!("{} = {}", event.key, String::from_utf8_lossy(&entry.value))
        }
        Some(_) => format!("{} = …", event.key),
        None => format!("{} is gone", event.key),
    });
    shown.collect::<Vec<_>>().join("; ")
}
