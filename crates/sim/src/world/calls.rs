//! Calls of the store: on their way there, carried out, and on their way back; and watches.

use super::*;
use crate::store::{Answer, Request};
use fleet_registry::records::{PRESENCES, SCHEDULE, STATES, UNITS, put_format};
use fleet_registry::{Event as Change, StoreError, Txn, WatchBatch};
use tokio::sync::oneshot;

/// How the store is.
#[derive(Clone, Debug, Default)]
pub(super) struct StoreTrouble {
    /// Until then each call takes up to so many milliseconds more.
    pub(super) slow: Option<(Time, u64)>,
    /// Until then calls fail with this probability.
    pub(super) failing: Option<(Time, f64)>,
    /// Until then its data is lost, as far as it knows.
    pub(super) lost: Option<Time>,
    /// Servers that are cut off: calls to the store, and answers, until then.
    pub(super) cuts: Vec<(usize, bool, bool, Time)>,
    /// Deliberate mistake: the next listing of that host is empty.
    pub(super) empty_listing: Option<usize>,
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
    }

    /// Does something in the store, and follows what that changed.
    pub(super) fn in_store<T>(&mut self, by: Option<usize>, act: impl FnOnce(&mut StoreModel) -> T) -> T {
        let before = self.store.revision();
        let done = act(&mut self.store);
        if self.store.revision() > before {
            let batches = self.store.changes("", before).unwrap_or_default();
            for batch in batches {
                self.note(|| format!("revision {}: {}", batch.revision, shown(&batch.events)));
                self.oracle.follow(self.now, &batch, by);
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

    /// How long a call, or its answer, is on its way.
    fn call_delay(&mut self) -> Duration {
        let slow = self.store_trouble.slow.filter(|(until, _)| *until > self.now);
        let more = slow.map_or(Duration::ZERO, |(_, most)| self.rng.spread(1, most));
        more + if self.scenario.shared { self.rng.spread(1, 20) } else { Duration::ZERO }
    }

    pub(super) fn take_calls(&mut self) {
        let calls = std::mem::take(&mut *self.calls.lock().unwrap_or_else(PoisonError::into_inner));
        self.unanswered.retain(|call| !call.reply.is_closed());
        for call in calls {
            let (to, _) = self.store_cut(call.host);
            if to {
                self.unanswered.push(call);
            } else {
                let delay = self.call_delay();
                self.after(delay, Event::Call(call));
            }
        }
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
        let delay = self.call_delay();
        self.after(delay, Event::Reply(Reply { host, send: reply, answer }));
    }

    fn fail(&mut self, host: usize, request: Request) -> Result<Answer, StoreError> {
        let writes = matches!(request, Request::Commit(_));
        if writes && self.scenario.shared && self.rng.chance(0.6) {
            if self.rng.chance(0.5) {
                // It is done all the same; nobody knows.
                let _ = self.carry_out(host, request);
            }
            return Err(StoreError::Unknown("the connection broke".to_owned()));
        }
        // A disk that is full does not concern what is only read.
        match request {
            Request::Commit(_) | Request::Grant(_) | Request::KeepAlive(_) => {
                Err(StoreError::Unavailable("no space left".to_owned()))
            }
            _ if self.scenario.shared => Err(StoreError::Unavailable("no leader".to_owned())),
            other => self.carry_out(host, other),
        }
    }

    fn carry_out(&mut self, host: usize, request: Request) -> Result<Answer, StoreError> {
        let now = self.store_now();
        match request {
            Request::Range(prefix) => {
                let mut snapshot = self.store.range(&prefix);
                if self.store_trouble.empty_listing == Some(host) {
                    self.store_trouble.empty_listing = None;
                    snapshot.entries.clear();
                }
                Ok(Answer::Snapshot(snapshot))
            }
            Request::Get(key) => Ok(Answer::Entry(self.store.get(&key))),
            Request::Commit(mut txn) => {
                self.mutate(&mut txn);
                self.in_store(Some(host), |store| store.commit(&txn)).map(Answer::Revision)
            }
            Request::Grant(ttl) => {
                let presence = ttl == self.scenario.ttl;
                let early = presence && self.mutation == Some(Mutation::EarlyExpiry);
                let ttl = if early { ttl.mul_f64(0.6) } else { ttl };
                Ok(Answer::Lease(self.store.grant(ttl, now)))
            }
            Request::KeepAlive(lease) => match self.store.keep_alive(lease, now) {
                Err(StoreError::LeaseEnded) if self.mutation == Some(Mutation::EndedLeaseRenewed) => {
                    Ok(Answer::Done)
                }
                other => other.map(|()| Answer::Done),
            },
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

    /// Deliberate mistakes of who wrote a transaction.
    fn mutate(&mut self, txn: &mut Txn) {
        let schedule = txn.ops.iter().any(|op| op.key().starts_with(SCHEDULE));
        let drops: &dyn Fn(&str, u64) -> bool = match self.mutation {
            Some(Mutation::NoUnitGuard) => &|key, _| key.starts_with(UNITS),
            Some(Mutation::NoScheduleGuard) => &|key, _| key.starts_with(SCHEDULE),
            Some(Mutation::NoTermGuard) => &|key, _| key == crate::oracle::LEADER && schedule,
            Some(Mutation::NoAbsenceGuard) => &|key, revision| key.starts_with(PRESENCES) && revision == 0,
            Some(Mutation::NoSessionGuard) => &|key, revision| key.starts_with(PRESENCES) && revision != 0,
            _ => return,
        };
        txn.compares.retain(|compare| !drops(&compare.key, compare.revision));
    }

    pub(super) fn replied(&mut self, reply: Reply) {
        let (_, from) = self.store_cut(reply.host);
        if from {
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
        if from {
            return self.after(Duration::from_millis(200), Event::Flush(number));
        }
        let slow = self.store_trouble.slow.filter(|(until, _)| *until > self.now);
        if let Some((_, most)) = slow.filter(|_| self.rng.chance(0.3)) {
            let more = self.rng.spread(1, most);
            return self.after(more, Event::Flush(number));
        }
        let drop_one = self.mutation == Some(Mutation::LostChange) && self.rng.chance(0.02);
        let watcher = &mut self.watchers[number];
        watcher.flushing = false;
        let changes = match lost {
            true => Err(StoreError::Damaged("another registry than before".to_owned())),
            false => self.store.changes(&watcher.prefix, watcher.sent),
        };
        // Nobody listens any more when a send fails.
        match changes {
            Ok(batches) => {
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
        let snapshot = self.store.range("");
        self.oracle.reset(self.now, &snapshot);
        for watcher in &mut self.watchers {
            watcher.send = mpsc::unbounded_channel().0;
        }
    }
}

/// Changes as the trace shows them. The servers' own records have times of day in them.
fn shown(events: &[Change]) -> String {
    let shown = events.iter().map(|event| match &event.entry {
        Some(entry) if event.key.starts_with(STATES) => {
            let record: serde_json::Value = serde_json::from_slice(&entry.value).unwrap_or_default();
            let rows = record["units"].as_array().into_iter().flatten();
            let rows =
                rows.map(|row| format!("{} {} {} {}", row[0], row[1], row[4], row[6]).replace('"', ""));
            format!("{} = {}", event.key, rows.collect::<Vec<_>>().join(", "))
        }
        Some(entry) if event.key.contains('/') && !event.key.starts_with("server/") => {
            format!("{} = {}", event.key, String::from_utf8_lossy(&entry.value))
        }
        Some(_) => format!("{} = …", event.key),
        None => format!("{} is gone", event.key),
    });
    shown.collect::<Vec<_>>().join("; ")
}
