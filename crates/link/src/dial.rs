//! The agent's side of the link: joining a cluster, and keeping a session with one of its servers.
//!
//! [`join`] turns a token into an [`Identity`]; it sends the token's secret only to a server that has shown the CA whose
//! fingerprint the token carries. [`Dialer`] then connects to one server after the other until one takes the session, hands
//! out the [`AgentEnd`], and begins again when that session ends, for as long as it runs. It also renews the certificate in
//! time. No inbound port is needed.
//!
//! Servers tell where all of them are, so an agent needs to be given the address of only one that lives when it joins. The next server is tried when
//! a session ends: at once when the server stops, or its process dies; when its machine is gone without a word keep-alive finds that out
//! ([`KeepAlive`]). One that does not answer is not waited for: after a moment the next one is tried beside it.

mod address;
mod backoff;
pub(crate) mod connection;
pub(crate) mod session;

pub use address::{Address, AddressError};
pub use connection::DialError;

use crate::ca::{CaError, Identity, MachineKey};
use crate::token::Token;
use crate::wire::generated as pb;
use crate::{AgentEnd, BEATS, Hello, KeepAlive, tls};
use backoff::{Backoff, Trouble};
use connection::{CALL_DEADLINE, Connection};
use fleet_cluster::model::MachineId;
use futures_util::stream::{FuturesUnordered, StreamExt};
use session::{End, Pump};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use zeroize::Zeroize;

/// A session that lasted that long was a good one: what ends it is a new trouble.
const GOOD_SESSION: Duration = Duration::from_secs(10);
/// A renewal that failed is tried again after that long.
const RENEW_RETRY: Duration = Duration::from_secs(3600);
/// After that long without an answer the next server is tried beside the one before.
const STAGGER: Duration = Duration::from_millis(250);
/// The longest wait for a time of day, since the clock may be set meanwhile.
const CLOCK_CHECK: Duration = Duration::from_secs(600);

/// Joins a cluster through the first of the addresses whose server takes or refuses us.
///
/// The caller stores the identity: its certificate and CA are no secrets, its key is.
///
/// # Errors
/// That of the server that refused us, otherwise that of the last address. [`DialError::is_refusal`] tells them apart: after
/// a refusal there is no use in trying again.
pub async fn join(
    addresses: &[Address],
    token: &Token,
    machine: &MachineId,
    key: MachineKey,
    keep_alive: KeepAlive,
) -> Result<Identity, DialError> {
    let mut last = None;
    for address in addresses {
        match join_at(address, token, machine, &key, keep_alive).await {
            Ok((root, certificate)) => {
                let checked = Identity::new(root, certificate, key);
                return checked.map_err(|error| DialError::wrong(address, &error));
            }
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(DialError::no_address))
}

async fn join_at(
    address: &Address,
    token: &Token,
    machine: &MachineId,
    key: &MachineKey,
    keep_alive: KeepAlive,
) -> Result<(crate::ca::Root, rustls::pki_types::CertificateDer<'static>), DialError> {
    let (config, found) = tls::joining(token.root).map_err(|error| DialError::wrong(address, &error))?;
    let request = key.request().map_err(|error| DialError::wrong(address, &error))?;
    let mut connection = Connection::open(address, config, keep_alive).await?;
    // The handshake is done, so the server has shown the CA that the token names.
    let root = found.get().ok_or_else(|| DialError::wrong(address, &"the server has shown no CA"))?.clone();
    let root = crate::ca::Root::from_der(root).map_err(|error| DialError::wrong(address, &error))?;
    let mut secret = token.secret.to_bytes();
    let call = connection.client.join(pb::JoinRequest {
        token: token.id.to_string(),
        secret: secret.clone(),
        machine: machine.as_str().to_owned(),
        request,
    });
    let answer = timeout(CALL_DEADLINE, call).await;
    secret.zeroize();
    let certified = connection.answered(answer)?.into_inner();
    let certificate = rustls::pki_types::CertificateDer::from(certified.certificate);
    match crate::ca::MachineCertificate::read(&certificate) {
        Ok(says) if says.machine == *machine => Ok((root, certificate)),
        Ok(_) => Err(DialError::wrong(address, &"the certificate is for another machine")),
        Err(error) => Err(DialError::wrong(address, &error)),
    }
}

/// Why an agent can't connect to anybody.
#[derive(Debug, thiserror::Error)]
pub enum DialerError {
    /// It was given no address.
    #[error("no address of a server")]
    NoAddress,
}

/// Keeps an agent connected.
#[derive(Debug)]
pub struct Dialer {
    /// As it was given.
    addresses: Vec<Address>,
    /// As the servers told.
    servers: watch::Sender<Vec<Address>>,
    identity: watch::Sender<Arc<Identity>>,
    hello: Hello,
    keep_alive: KeepAlive,
    backoff: Backoff,
    /// The last trouble with each address, so that each is logged once.
    troubles: HashMap<Address, String>,
    /// Not to be tried again before.
    next_renewal: Option<Instant>,
    /// By which certificates are due.
    clock: fn() -> SystemTime,
}

/// The servers that are still to be tried, and the least of the troubles with those before.
#[derive(Debug)]
struct Round {
    rest: VecDeque<Address>,
    least: Trouble,
}

impl Dialer {
    /// `seed` spreads the attempts of many agents: another one for each machine and start.
    pub fn new(
        addresses: Vec<Address>,
        identity: Identity,
        hello: Hello,
        keep_alive: KeepAlive,
        seed: u64,
    ) -> Result<Self, DialerError> {
        if addresses.is_empty() {
            return Err(DialerError::NoAddress);
        }
        Ok(Dialer {
            addresses,
            servers: watch::Sender::default(),
            identity: watch::Sender::new(Arc::new(identity)),
            hello,
            keep_alive,
            backoff: Backoff::new(seed),
            troubles: HashMap::new(),
            next_renewal: None,
            clock: SystemTime::now,
        })
    }

    /// With another clock.
    #[cfg(test)]
    pub(crate) fn with_clock(self, clock: fn() -> SystemTime) -> Self {
        Dialer { clock, ..self }
    }

    /// With what [`servers`](Self::servers) was when it last ran.
    pub fn knowing(self, servers: Vec<Address>) -> Self {
        self.servers.send_replace(servers);
        self
    }

    /// Where all servers are, as they told last: to be stored, so that the agent finds them after a restart, whichever of those it was
    /// given are gone by then.
    pub fn servers(&self) -> watch::Receiver<Vec<Address>> {
        self.servers.subscribe()
    }

    /// Where renewed certificates appear, to be stored. If one gets lost, the one before is renewed again.
    pub fn identity(&self) -> watch::Receiver<Arc<Identity>> {
        self.identity.subscribe()
    }

    /// Connects, hands out sessions, and connects again, until cancelled or nobody takes sessions any more.
    pub async fn run(mut self, sessions: mpsc::Sender<AgentEnd>, cancel: CancellationToken) {
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.dial(&sessions) => {}
        }
    }

    async fn dial(&mut self, sessions: &mpsc::Sender<AgentEnd>) {
        let mut last = None;
        let mut round = self.round(None);
        loop {
            // Sessions are made one at a time, for somebody who is ready for one.
            let Ok(room) = sessions.reserve().await else { return };
            let Some((address, connection)) = self.connect_first(&mut round).await else {
                let wait = self.backoff.wait(round.least);
                debug!("trying again in {wait:?}");
                tokio::time::sleep(wait).await;
                round = self.round(last.as_ref());
                continue;
            };
            match self.session(&address, connection, room).await {
                Ok((lasted, trouble)) => {
                    if lasted >= GOOD_SESSION {
                        self.backoff.reset();
                    }
                    // A new round, which begins with the next server.
                    round = self.round(Some(&address));
                    round.rest.retain(|other| *other != address);
                    round.least = trouble;
                }
                Err(error) => {
                    round.least = round.least.min(error.trouble);
                    self.complain(&address, &error);
                }
            }
            last = Some(address);
        }
    }

    /// All servers, beginning with the one after this.
    fn round(&self, after: Option<&Address>) -> Round {
        let mut all: Vec<Address> = Vec::new();
        for address in self.addresses.iter().chain(&*self.servers.borrow()) {
            if !all.contains(address) {
                all.push(address.clone());
            }
        }
        if let Some(at) = all.iter().position(|address| Some(address) == after) {
            let next = (at + 1) % all.len();
            all.rotate_left(next);
        }
        Round { rest: all.into(), least: Trouble::Refused }
    }

    /// Connects to the first of the servers still to be tried that answers; `None` when none of them does. One that takes its time does not
    /// keep the others from being tried.
    async fn connect_first(&mut self, round: &mut Round) -> Option<(Address, Connection)> {
        let identity = self.identity.borrow().clone();
        let mut trying = FuturesUnordered::new();
        let mut under_way: Vec<Address> = Vec::new();
        loop {
            if let Some(address) = round.rest.pop_front() {
                under_way.push(address.clone());
                let (identity, keep_alive) = (identity.clone(), self.keep_alive);
                trying.push(async move {
                    let connected = connect(&address, &identity, keep_alive).await;
                    (address, connected)
                });
            }
            let more = !round.rest.is_empty();
            let (address, connected) = tokio::select! {
                tried = trying.next() => tried?,
                () = tokio::time::sleep(STAGGER), if more => continue,
            };
            under_way.retain(|other| *other != address);
            match connected {
                Ok(connection) => {
                    round.rest.extend(under_way);
                    return Some((address, connection));
                }
                Err(error) => {
                    round.least = round.least.min(error.trouble);
                    self.complain(&address, &error);
                }
            }
        }
    }

    fn complain(&mut self, address: &Address, error: &DialError) {
        let text = error.to_string();
        if self.troubles.get(address) == Some(&text) {
            debug!("still no session: {text}");
            return;
        }
        warn!("no session with server {text}; trying on");
        self.troubles.insert(address.clone(), text);
    }

    /// One session with one server, over a fresh connection, to its end; says how long it lasted, and what its end means.
    async fn session(
        &mut self,
        address: &Address,
        mut connection: Connection,
        room: mpsc::Permit<'_, AgentEnd>,
    ) -> Result<(Duration, Trouble), DialError> {
        let mut identity = self.identity.borrow().clone();
        let now = (self.clock)();
        let may_renew = self.next_renewal.is_none_or(|at| at <= Instant::now());
        if now >= identity.certificate().renew_at() && may_renew {
            let expired = now >= identity.certificate().not_after;
            match renew(&mut connection, &identity).await {
                Ok(fresh) => {
                    self.renewed(&fresh);
                    // The session is to last as long as the new one, so it needs a connection with that.
                    identity = fresh;
                    connection = connect(address, &identity, self.keep_alive).await?;
                }
                Err(error) if expired || error.is_refusal() => return Err(error),
                Err(error) => {
                    warn!("unable to renew this machine's certificate: {error}; trying again later");
                    self.next_renewal = Some(Instant::now() + RENEW_RETRY);
                }
            }
        }
        let (pump, wire) = match Pump::begin(&mut connection, self.hello.clone()).await {
            // By the server's clock it has expired, by ours it has not.
            Err(error) if error.unauthenticated => {
                let Ok(fresh) = renew(&mut connection, &identity).await else { return Err(error) };
                self.renewed(&fresh);
                identity = fresh;
                connection = connect(address, &identity, self.keep_alive).await?;
                Pump::begin(&mut connection, self.hello.clone()).await?
            }
            begun => begun?,
        };
        let mut pump = pump.telling(self.servers.clone());
        let (send, from_agent) = mpsc::channel(16);
        let (to_agent, receive) = mpsc::channel(16);
        let (beat, beats) = mpsc::channel(BEATS);
        room.send(AgentEnd { send, receive, beats: beat });
        self.troubles.clear();
        info!("session with server {address}");
        let begun = Instant::now();
        let mut pass = std::pin::pin!(pump.pass(wire, from_agent, to_agent, beats));
        let end = loop {
            let due = self.renewal_due(&identity);
            tokio::select! {
                end = pass.as_mut() => break end,
                () = due => match renew(&mut connection, &identity).await {
                    Ok(fresh) => {
                        self.renewed(&fresh);
                        // Used from the next connection on; with its answer the server has prolonged this session.
                        identity = fresh;
                    }
                    Err(error) => {
                        warn!("unable to renew this machine's certificate: {error}; trying again later");
                        self.next_renewal = Some(Instant::now() + RENEW_RETRY);
                    }
                },
            }
        };
        let trouble = match end {
            End::Dropped => {
                debug!("session with server {address} ended here");
                Trouble::Soon
            }
            End::Ended(status) => {
                warn!("session with server {address} ended: {}", connection.reason(&status));
                // One that broke may be back at once, one that was refused will be again.
                if connection.broke() { Trouble::Soon } else { connection.error(&status).trouble }
            }
            End::Wrong(problem) => {
                warn!("session with server {address} ended: it sent a wrong message: {problem}");
                Trouble::Later
            }
        };
        Ok((begun.elapsed(), trouble))
    }

    fn renewed(&mut self, fresh: &Arc<Identity>) {
        info!("renewed this machine's certificate");
        // Where our clock is far ahead of the server's it is due again at once; once in a while will do.
        let is_due = (self.clock)() >= fresh.certificate().renew_at();
        self.next_renewal = is_due.then(|| Instant::now() + RENEW_RETRY);
        self.identity.send_replace(fresh.clone());
    }

    /// Waits until the certificate is to be renewed.
    fn renewal_due(&self, identity: &Identity) -> impl Future<Output = ()> + use<> {
        let at = identity.certificate().renew_at();
        let (not_before, clock) = (self.next_renewal, self.clock);
        async move {
            if let Some(not_before) = not_before {
                tokio::time::sleep_until(not_before).await;
            }
            while let Ok(left) = at.duration_since(clock()) {
                tokio::time::sleep(left.min(CLOCK_CHECK)).await;
            }
        }
    }
}

async fn connect(
    address: &Address,
    identity: &Identity,
    keep_alive: KeepAlive,
) -> Result<Connection, DialError> {
    let config = tls::member(identity).map_err(|error| DialError::wrong(address, &error))?;
    Connection::open(address, config, keep_alive).await
}

async fn renew(connection: &mut Connection, identity: &Identity) -> Result<Arc<Identity>, DialError> {
    let answer = timeout(CALL_DEADLINE, connection.client.renew(pb::RenewRequest {})).await;
    let certified = connection.answered(answer)?.into_inner();
    let fresh = identity.renewed(certified.certificate.into());
    fresh.map(Arc::new).map_err(|error: CaError| DialError::wrong(connection.address(), &error))
}
