//! The servers of one registry: who is there, and which of them leads.
//!
//! | key | record | lease |
//! |---|---|---|
//! | `server/ID` | [`ServerRecord`]: a server, by the ID of its machine | the server's |
//! | `leader` | [`LeaderRecord`]: the server whose engine decides | the leader's |
//!
//! The revision at which the leader's record was written is its *term*. Whatever an engine writes is guarded by its term, so a
//! leader that was paused, cut off or slow, and replaced meanwhile, changes nothing (see [`super::leader`]).
//!
//! Each server renews its own record. That is also how it knows for how long it has not reached the registry: what it answers
//! then may be old, and says so.

use super::Server;
use anyhow::Context;
use fleet_cluster::model::{MachineId, Revision};
use fleet_link::dial::Address;
use fleet_registry::records::{PRESENCES, PresenceRecord};
use fleet_registry::{Entry, Event, LeaseId, Op, Snapshot, Store, StoreError, Txn};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::warn;

/// The key of the leader's record.
pub(super) const LEADER: &str = "leader";
pub(super) const SERVERS: &str = "server/";
const FORMAT: u32 = 1;

/// For how long a server counts as there after it renewed its record last.
const TTL: Duration = Duration::from_secs(10);
/// How often it does: idle servers cost the registry this, and no more.
const RENEW: Duration = Duration::from_secs(3);
/// How long a renewal may take.
const DEADLINE: Duration = Duration::from_secs(3);
/// How long to wait after one that failed.
const RETRY: Duration = Duration::from_millis(500);
/// A server that has not reached its registry for that long says so with every answer.
const STALE: Duration = Duration::from_secs(7);

/// A server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRecord {
    format: u32,
    /// Where other servers and agents reach it, `HOST:PORT`; none when it listens on no port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Its version.
    pub version: String,
    /// Since when it runs, seconds since 1970.
    pub started: u64,
}

impl ServerRecord {
    /// The record of a server that begins now.
    pub fn new(address: Option<String>, version: &str, started: u64) -> Self {
        ServerRecord { format: FORMAT, address, version: version.to_owned(), started }
    }

    /// Where it is dialed, if it listens somewhere.
    pub(super) fn dialed(&self) -> Option<Address> {
        self.address.as_ref()?.parse().ok()
    }
}

/// Which server leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeaderRecord {
    format: u32,
    /// The server, by the ID of its machine.
    pub(super) server: MachineId,
    /// Since when, seconds since 1970. With [`lease`](Self::lease) it tells one attempt from another.
    pub(super) since: u64,
    /// The lease it leads by.
    pub(super) lease: i64,
}

impl LeaderRecord {
    pub(super) fn new(server: MachineId, since: u64, lease: LeaseId) -> Self {
        LeaderRecord { format: FORMAT, server, since, lease: lease.0 }
    }
    /// The write that makes it the leader.
    pub(super) fn put(&self, lease: LeaseId) -> Result<Op, serde_json::Error> {
        Ok(Op::put_leased(LEADER, serde_json::to_vec(self)?, lease))
    }
}

/// The leader, with its term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Leader {
    pub(super) term: Revision,
    pub(super) record: LeaderRecord,
}

/// What a server knows of all servers.
#[derive(Debug)]
pub(super) struct Peers {
    servers: Mutex<BTreeMap<MachineId, ServerRecord>>,
    /// Counts up whenever another server comes or goes.
    generation: AtomicU64,
    presences: Mutex<BTreeMap<MachineId, Presence>>,
    leader: watch::Sender<Option<Leader>>,
    /// When the registry was reached last; none before the first time.
    reached: watch::Sender<Option<Instant>>,
    /// When it last could not be reached, or could not be followed.
    trouble: Mutex<Option<Instant>>,
    /// Told when this server's record could not be renewed.
    lost: Notify,
    /// Machines that were removed, and were not looked at yet.
    removed: Mutex<BTreeSet<MachineId>>,
    /// Told when there is one more.
    removal: Notify,
}

/// By which session a machine is there.
#[derive(Clone, Debug)]
struct Presence {
    /// At which its presence was written.
    revision: Revision,
    /// The server that has its session; none when that did not say.
    server: Option<MachineId>,
}

impl Default for Peers {
    fn default() -> Self {
        Peers {
            servers: Mutex::default(),
            generation: AtomicU64::new(0),
            presences: Mutex::default(),
            leader: watch::Sender::new(None),
            reached: watch::Sender::new(None),
            trouble: Mutex::default(),
            lost: Notify::new(),
            removed: Mutex::default(),
            removal: Notify::new(),
        }
    }
}

impl Peers {
    /// Takes what a snapshot of the registry says of servers; forgets what was known.
    pub(super) fn reset(&self, snapshot: &Snapshot) {
        let mut servers = BTreeMap::new();
        let mut presences = BTreeMap::new();
        let mut leader = None;
        for entry in &snapshot.entries {
            if &*entry.key == LEADER {
                leader = read_leader(entry);
            } else if let Some((id, record)) = read_server(&entry.key, Some(entry)) {
                servers.extend(record.map(|record| (id, record)));
            } else if let Some(id) = present(&entry.key) {
                presences.insert(id, Presence::of(entry));
            }
        }
        *lock(&self.servers) = servers;
        self.generation.fetch_add(1, Ordering::Relaxed);
        *lock(&self.presences) = presences;
        self.set_leader(leader);
    }

    /// Takes one event, of whatever key.
    pub(super) fn note(&self, event: &Event) {
        if &*event.key == LEADER {
            self.set_leader(event.entry.as_ref().and_then(read_leader));
        } else if let Some((id, record)) = read_server(&event.key, event.entry.as_ref()) {
            let mut servers = lock(&self.servers);
            match record {
                Some(record) => servers.insert(id, record),
                None => servers.remove(&id),
            };
            self.generation.fetch_add(1, Ordering::Relaxed);
        } else if let Some(id) = present(&event.key) {
            let mut presences = lock(&self.presences);
            match &event.entry {
                Some(entry) => presences.insert(id, Presence::of(entry)),
                None => presences.remove(&id),
            };
        }
    }

    /// The revision at which a machine's presence was written; 0: it has none.
    pub(super) fn presence(&self, id: &MachineId) -> Revision {
        lock(&self.presences).get(id).map_or(0, |presence| presence.revision)
    }

    /// The server that has the session with a machine, as far as the registry knows.
    pub(super) fn session_of(&self, id: &MachineId) -> Option<MachineId> {
        lock(&self.presences).get(id)?.server.clone()
    }

    fn set_leader(&self, leader: Option<Leader>) {
        self.leader.send_if_modified(|known| {
            let changed = *known != leader;
            *known = leader;
            changed
        });
    }

    /// Follows who leads.
    pub(super) fn leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.subscribe()
    }

    /// The servers that are there.
    pub(super) fn servers(&self) -> BTreeMap<MachineId, ServerRecord> {
        lock(&self.servers).clone()
    }

    /// Where the servers are that listen somewhere, and a number that is another one when this may have changed.
    pub(super) fn addresses(&self) -> (u64, Vec<Address>) {
        // First the number: what changes meanwhile is told again.
        let generation = self.generation();
        let servers = lock(&self.servers);
        (generation, servers.values().filter_map(ServerRecord::dialed).collect())
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// How long ago the registry was last reached; `None`: never.
    pub(super) fn reached(&self) -> Option<Duration> {
        self.reached.borrow().map(|at| at.elapsed())
    }

    /// Waits until this server's record could not be renewed.
    pub(super) async fn lost(&self) {
        self.lost.notified().await;
    }

    /// A machine was removed from the cluster.
    pub(super) fn note_removed(&self, id: MachineId) {
        lock(&self.removed).insert(id);
        self.removal.notify_one();
    }

    /// Waits for a machine that was removed; each is told once. For one task.
    pub(super) async fn next_removed(&self) -> MachineId {
        loop {
            if let Some(id) = lock(&self.removed).pop_first() {
                return id;
            }
            self.removal.notified().await;
        }
    }

    /// The registry did not answer as it should.
    pub(super) fn had_trouble(&self) {
        *lock(&self.trouble) = Some(Instant::now());
    }

    /// How long ago the registry did not answer as it should; `None`: never.
    pub(super) fn trouble(&self) -> Option<Duration> {
        lock(&self.trouble).map(|at| at.elapsed())
    }

    /// For how long the registry has not been reached, if that is long enough to matter to who reads from the view.
    pub(super) fn stale_for(&self) -> Option<Duration> {
        let since = self.reached()?;
        (since > STALE).then_some(since)
    }
}

impl Presence {
    fn of(entry: &Entry) -> Self {
        // One that can't be read is complained of where the view is made.
        let record: Option<PresenceRecord> = serde_json::from_slice(&entry.value).ok();
        Presence { revision: entry.revision, server: record.and_then(|record| record.server) }
    }
}

fn read_leader(entry: &Entry) -> Option<Leader> {
    match serde_json::from_slice(&entry.value) {
        Ok(record) => Some(Leader { term: entry.revision, record }),
        Err(error) => {
            warn!("registry record {LEADER}: {error}; this record is left out");
            None
        }
    }
}

/// The machine whose presence is under a key; `None` when it is the key of something else.
fn present(key: &str) -> Option<MachineId> {
    MachineId::parse(key.strip_prefix(PRESENCES)?).ok()
}

/// What a key says of a server; `None` when it is the key of something else.
fn read_server(key: &str, entry: Option<&Entry>) -> Option<(MachineId, Option<ServerRecord>)> {
    let id = MachineId::parse(key.strip_prefix(SERVERS)?).ok()?;
    let record = entry.and_then(|entry| match serde_json::from_slice(&entry.value) {
        Ok(record) => Some(record),
        Err(error) => {
            warn!("registry record {key}: {error}; this record is left out");
            None
        }
    });
    Some((id, record))
}

/// Single steps change what is locked here, so it is whole even if a task panicked meanwhile.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Store> Server<S> {
    /// Keeps this server's record until cancelled.
    pub(super) async fn announce(&self) -> anyhow::Result<()> {
        let key = format!("{SERVERS}{}", self.config.machine);
        let value = serde_json::to_vec(&self.record).context("encoding the record of this server")?;
        let mut lease = None;
        loop {
            let renewed = tokio::select! {
                biased;
                () = self.cancel.cancelled() => break,
                renewed = tokio::time::timeout(DEADLINE, self.renew(&mut lease, &key, &value)) => renewed,
            };
            let pause = match renewed {
                Ok(Ok(())) => {
                    self.peers.reached.send_replace(Some(Instant::now()));
                    RENEW
                }
                Ok(Err(error)) => {
                    self.trouble("renewing the record of this server", &error);
                    self.peers.lost.notify_one();
                    RETRY
                }
                Err(_) => {
                    self.peers.had_trouble();
                    self.peers.lost.notify_one();
                    RETRY
                }
            };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        if let Some(lease) = lease {
            // Should it fail, the record goes by itself.
            let _ = tokio::time::timeout(DEADLINE, self.store.revoke(lease)).await;
        }
        Ok(())
    }

    async fn renew(&self, lease: &mut Option<LeaseId>, key: &str, value: &[u8]) -> Result<(), StoreError> {
        if let Some(held) = *lease {
            match self.store.keep_alive(held).await {
                Err(StoreError::LeaseEnded) => *lease = None,
                other => return other,
            }
        }
        let granted = self.store.grant(TTL).await?;
        self.store.commit(Txn::of(Op::put_leased(key, value, granted))).await?;
        *lease = Some(granted);
        Ok(())
    }
}
