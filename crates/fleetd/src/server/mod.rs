//! The server role: holds the registry, follows it into an in-memory view, decides placement, and
//! serves agents and the API from that view.
//!
//! ```text
//! API ──▶ write ──▶ store ──watch──▶ follow ──▶ hub (view) ──▶ engine ──▶ store
//!                                               ├──▶ sessions ──▶ agents
//!                                               └──▶ event streams
//! ```
//!
//! Every arrow carries changes. Each consumer has a mailbox that merges what it has not looked at yet, so that a slow
//! one falls behind without holding anybody up and without growing.

mod catch_up;
mod dismiss;
mod engine;
mod follow;
#[cfg(test)]
mod gated;
pub(crate) mod hub;
mod leader;
mod membership;
mod others;
mod pace;
mod peers;
mod renewal;
mod said;
mod session;
pub mod transfer;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod unread_tests;
mod users;
mod write;

pub use hub::{Changed, EventCursor, Hub};
pub use membership::{ListedMember, MembershipError};
pub use others::Answer;
pub use peers::ServerRecord;
pub use session::AskError;
pub use users::{Access, Credential, Denied, NewUser, Role, UserRecord, Users};
pub use write::{MachineMark, MetadataEdit, Put, UnitChange, WriteError};

use crate::metrics::Metrics;
use fleet_cluster::engine::Policy;
use fleet_cluster::model::{MachineId, Time};
use fleet_link::{ServerEnd, peer::PeerDialer};
use fleet_registry::{Health, Store, StoreError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{collections::HashMap, sync::Arc, sync::Mutex};
use tokio::{sync::OnceCell, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// What a server has to be told.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The machine it runs on: nobody else may join with that ID.
    pub machine: MachineId,
    /// How long a machine counts as present after its last sign of life.
    pub agent_ttl: Duration,
    /// How carefully units are moved.
    pub policy: Policy,
    /// Whether this server never places units (`disable_engine`).
    pub disable_engine: bool,
    /// Whether other servers work on the same registry, so that a leader has to be elected.
    pub shared_registry: bool,
    /// Where other servers and agents reach this one, `HOST:PORT`; none when it listens on no port.
    pub address: Option<String>,
}

/// A server. Clones share it.
pub struct Server<S: Store> {
    store: S,
    config: ServerConfig,
    hub: Arc<Hub>,
    peers: Arc<peers::Peers>,
    /// What it says of itself to other servers.
    record: ServerRecord,
    users: Arc<Users>,
    sessions: Arc<Mutex<HashMap<MachineId, session::Handle>>>,
    /// The way to other servers, once the cluster's CA is known.
    dialer: Arc<OnceCell<PeerDialer>>,
    metrics: Arc<Metrics>,
    started: Instant,
    suspended: renewal::Suspended,
    /// Cancelled when another registry was accepted, or imported.
    exchanged: CancellationToken,
    /// Whether the registry is being imported.
    importing: Arc<AtomicBool>,
    cancel: CancellationToken,
}

impl<S: Store> Clone for Server<S> {
    fn clone(&self) -> Self {
        Server {
            store: self.store.clone(),
            config: self.config.clone(),
            hub: self.hub.clone(),
            peers: self.peers.clone(),
            record: self.record.clone(),
            users: self.users.clone(),
            sessions: self.sessions.clone(),
            dialer: self.dialer.clone(),
            metrics: self.metrics.clone(),
            started: self.started,
            suspended: self.suspended.clone(),
            exchanged: self.exchanged.clone(),
            importing: self.importing.clone(),
            cancel: self.cancel.clone(),
        }
    }
}

impl<S: Store> Server<S> {
    /// A server on a store; nothing runs yet.
    pub fn new(store: S, config: ServerConfig, cancel: CancellationToken) -> Self {
        let record = ServerRecord::new(config.address.clone(), env!("CARGO_PKG_VERSION"), now_seconds());
        Server {
            store,
            config,
            record,
            hub: Arc::new(Hub::new()),
            peers: Arc::default(),
            users: Arc::new(Users::new()),
            sessions: Arc::default(),
            dialer: Arc::default(),
            metrics: Arc::default(),
            started: Instant::now(),
            suspended: Arc::new(fleet_systemd::guard::suspended),
            exchanged: CancellationToken::new(),
            importing: Arc::default(),
            cancel,
        }
    }

    /// A server on a machine that says otherwise than this one for how long it has been suspended since it booted.
    pub fn with_suspended(self, suspended: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Server { suspended: Arc::new(suspended), ..self }
    }

    /// What the server knows.
    pub fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// The servers that are there, by the ID of their machines, and whether they lead.
    pub fn servers(&self) -> Vec<(MachineId, ServerRecord, bool)> {
        if !self.config.shared_registry {
            return vec![(self.config.machine.clone(), self.record.clone(), self.leads())];
        }
        let leader = self.peers.leader().borrow().as_ref().map(|leader| leader.record.server.clone());
        let servers = self.peers.servers().into_iter();
        servers.map(|(id, record)| (id.clone(), record, leader.as_ref() == Some(&id))).collect()
    }

    /// Whether other servers may be on its registry.
    pub fn shares_registry(&self) -> bool {
        self.config.shared_registry
    }

    /// Whether this server leads, as far as it knows. One that has its registry for itself does, unless it never may.
    pub fn leads(&self) -> bool {
        if !self.config.shared_registry {
            return !self.config.disable_engine;
        }
        let leader = self.peers.leader();
        let leader = leader.borrow();
        leader.as_ref().is_some_and(|leader| leader.record.server == self.config.machine)
    }

    /// How the registry is, by its parts.
    pub async fn registry_health(&self) -> Vec<Health> {
        self.store.health().await
    }

    /// Takes the registry that is there now for the right one.
    pub async fn accept_registry(&self) -> Result<(), StoreError> {
        self.store.accept().await?;
        warn!("the registry as it is now was accepted");
        self.exchanged.cancel();
        Ok(())
    }

    /// Cancelled when another registry was accepted, or one was imported: its CA, its members and its users are not those that this server knows and has
    /// sessions with, so it has to begin again.
    pub fn exchanged(&self) -> CancellationToken {
        self.exchanged.clone()
    }

    /// Whether the registry is being imported, so that nothing of it is known yet.
    pub fn is_importing(&self) -> bool {
        self.importing.load(Ordering::Relaxed)
    }

    /// All that lasts in the registry, and what is wrong with it.
    pub async fn export_registry(&self) -> Result<(transfer::Archive, Vec<String>), transfer::TransferError> {
        transfer::export(&self.store).await
    }

    /// Makes the registry what an archive says.
    pub async fn import_registry(
        &self,
        archive: &transfer::Archive,
        replace: bool,
    ) -> Result<transfer::Imported, transfer::TransferError> {
        transfer::import(&self.store, archive, replace).await
    }

    /// What it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// How many agents have a session with it.
    pub fn session_count(&self) -> usize {
        self.sessions.lock().map_or(0, |sessions| sessions.len())
    }

    /// For how long the registry has not been reached, if that is long enough to matter to who reads from the view.
    pub fn stale_for(&self) -> Option<Duration> {
        self.peers.stale_for()
    }

    /// Starts the server's tasks in `tasks`; they end when the server's token is cancelled. A task that ends with an
    /// error before that means that the server can't go on.
    pub fn start(&self, tasks: &mut JoinSet<anyhow::Result<()>>) {
        let server = self.clone();
        tasks.spawn(async move { server.follow().await });
        if !self.config.disable_engine {
            let server = self.clone();
            tasks.spawn(async move { server.lead().await });
        }
        if self.config.shared_registry {
            let server = self.clone();
            tasks.spawn(async move { server.announce().await });
        }
    }

    /// Starts what this server has to do with others on its registry, beside [`start`](Self::start); for one that shares it.
    pub fn start_among_others(&self, tasks: &mut JoinSet<anyhow::Result<()>>) {
        let server = self.clone();
        tasks.spawn(async move { server.follow_leader().await });
        let server = self.clone();
        tasks.spawn(async move { server.send_away().await });
        let server = self.clone();
        tasks.spawn(async move { server.end_presences().await });
    }

    /// Serves one agent until its session ends or the server's token is cancelled.
    pub async fn serve_agent(&self, end: ServerEnd) -> anyhow::Result<()> {
        self.run_session(end).await
    }

    /// The registry did not do what was asked. With one that others share, whoever keeps contact with it says so, once for all.
    fn trouble(&self, what: &str, error: &StoreError) {
        self.peers.had_trouble();
        if self.config.shared_registry && error.may_pass() {
            debug!("{what}: {error}");
        } else {
            warn!("{what}: {error}");
        }
    }

    /// The time of this process that the pure core is told.
    fn now(&self) -> Time {
        self.started.elapsed()
    }
}

/// The time of day, seconds since 1970.
fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
