//! The server's side of the link: one TLS port, on which machines join, agents keep their sessions, and users reach the API.
//!
//! [`serve`] accepts connections, lets machines join with a token, renews their certificates, and hands out a
//! [`ServerEnd`] for every session. What it does not know is who belongs to the cluster: it asks the [`Membership`], which the
//! daemon answers from the registry, at every one of these. So removing a machine takes effect at its next session, whatever
//! its certificate says; to end the present one too, the daemon drops its end.
//!
//! Nothing a peer does without belonging to the cluster takes much: a connection that is no session yet has to finish its
//! handshake in [`Limits::handshake`] and to become a session in [`Limits::idle`]; there are at most [`Limits::waiting`] of
//! them, and one too many pushes out the oldest of the busiest address. A session's messages are bounded in size and
//! checked, what comes in faster than it is taken is merged, and an agent that does not read is cut off after
//! [`Limits::stalled`]. A machine has one session: a second one is refused while the first answers, and replaces it when
//! it does not (its connection was cut, and nobody has noticed yet).
//!
//! Connections that speak HTTP/1.1 are passed on, with whose certificate was shown ([`Guests`]). They share the port, and the bounds of
//! strangers, and nothing else: what is a session and what a guest is settled in the handshake, by ALPN.
//!
//! Other servers of the cluster have calls of their own, on connections of their own ([`crate::peer`]): which calls a connection has is settled by
//! the kind of certificate that it shows.
//!
//! Refusals are logged here, with the peer's address and no secrets, each once a minute per address.

mod guest;
mod peers;
mod refusals;
mod service;
mod session;
mod waiting;

pub use guest::{GuestStream, Guests, Visitor};

use crate::ca::{
    Authority, CaError, ClientCertificate, KeyId, MACHINE_VALIDITY, MachineCertificate, ServerCertificate,
};
use crate::peer::PeerService;
use crate::token::{TokenError, TokenId, TokenSecret};
use crate::wire::generated::{link_server::LinkServer, peers_server::PeersServer};
use crate::wire::{MAX_DOWN, MAX_UP};
use crate::{KeepAlive, ServerEnd, tls};
use fleet_cluster::model::MachineId;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use refusals::RefusalLog;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use service::{Live, Service};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, error, warn};
use waiting::Waiting;

/// Who belongs to the cluster. Each method has [`Limits::membership`] to answer.
///
/// Everything has to be idempotent: an answer may get lost, and the same comes again (guarantee G6).
pub trait Membership: Send + Sync + 'static {
    /// Lets a machine in, or says why not: checks the token with
    /// [`TokenRecord::check`](crate::token::TokenRecord::check), that no machine of that ID is known with another key,
    /// and commits the machine with its key and the token's use in one transaction. A machine that is known with this very key
    /// joins again without using the token up.
    fn join(&self, joining: Joining) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Whether a machine gets a fresh certificate: whether it is of the cluster, with this key. Its present certificate may
    /// have expired.
    fn renew(&self, member: &Member) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Whether a machine may have a session: whether it is of the cluster, with this key.
    fn admit(&self, member: &Member) -> impl Future<Output = Result<(), Refusal>> + Send;
}

/// A machine that wants to join.
#[derive(Clone, Debug)]
pub struct Joining {
    /// Of its token.
    pub token: TokenId,
    /// Of its token.
    pub secret: TokenSecret,
    /// What it says to be.
    pub machine: MachineId,
    /// The key that it has proved to have.
    pub key: KeyId,
    /// Where it connects from.
    pub peer: SocketAddr,
}

/// A machine that has proved to have a certificate of this cluster, and its key.
#[derive(Clone, Debug)]
pub struct Member {
    /// Whom the certificate is for.
    pub machine: MachineId,
    /// The key that it is for.
    pub key: KeyId,
    /// The certificate's serial number, hexadecimal.
    pub serial: String,
    /// Until when the certificate is valid.
    pub not_after: SystemTime,
    /// Where the machine connects from.
    pub peer: SocketAddr,
}

/// Why a machine is refused. The texts go to the machine and to the log of both sides.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its token does not let it in.
    #[error("{0}")]
    Token(#[from] TokenError),
    /// The ID is another machine's, or this machine has lost its key.
    #[error(
        "machine {0} is already in the cluster with another key: if this is a second machine with the same \
         /etc/machine-id, give it one of its own; if it is the same machine installed anew, remove it first \
         (fleetctl machine remove {0})"
    )]
    OtherKey(MachineId),
    /// It is not, or no longer, of the cluster.
    #[error("machine {0} is not in this cluster (any more); it can join with a token")]
    Unknown(MachineId),
    /// It may be of the cluster, but that can't be found out now.
    #[error("the server can't answer now: {0}")]
    NotNow(String),
}

/// Bounds of what peers can take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are no session (yet).
    pub waiting: usize,
    /// Sessions.
    pub sessions: usize,
    /// Connections of guests who were admitted.
    pub guests: usize,
    /// Connections of other servers.
    pub peers: usize,
    /// How long a TLS handshake may take.
    pub handshake: Duration,
    /// How long a connection may last without a session.
    pub idle: Duration,
    /// How long an agent may leave a message unread.
    pub stalled: Duration,
    /// How long the [`Membership`] may take to answer.
    pub membership: Duration,
    /// How long the first of two sessions of one machine may take to show that it lives.
    pub probe: Duration,
    /// How long sessions may take to end when the server stops.
    pub stop: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            waiting: 512,
            sessions: 16_384,
            guests: 1024,
            peers: 4096,
            handshake: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            stalled: Duration::from_secs(60),
            membership: Duration::from_secs(10),
            probe: Duration::from_secs(2),
            stop: Duration::from_secs(3),
        }
    }
}

/// How to serve.
#[derive(Clone)]
pub struct Options {
    /// IP addresses and host names of this server, for its certificate.
    pub addresses: Vec<String>,
    /// How cut connections are found out.
    pub keep_alive: KeepAlive,
    /// What peers can take.
    pub limits: Limits,
    /// How long the certificates of machines are valid that are signed here.
    pub machine_validity: Duration,
    /// What serves connections that speak HTTP/1.1; without it they are refused.
    pub guests: Option<Guests>,
    /// What answers other servers of the cluster; without it they are refused.
    pub peers: Option<Arc<dyn PeerService>>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            addresses: Vec::new(),
            keep_alive: KeepAlive::default(),
            limits: Limits::default(),
            machine_validity: MACHINE_VALIDITY,
            guests: None,
            peers: None,
        }
    }
}

/// Why serving can't begin.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No certificate for this server.
    #[error("unable to sign this server's certificate: {0}")]
    Certificate(#[from] CaError),
    /// TLS can't be set up.
    #[error("unable to set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Serves the listener until cancelled; then ends all sessions and waits for that, for [`Limits::stop`] at most.
///
/// Sessions come out of `sessions`' other end, after the [`Membership`] has admitted them.
///
/// # Errors
/// Only at the beginning; what goes wrong with a connection is logged and ends that one.
pub async fn serve<M: Membership>(
    listener: TcpListener,
    authority: Arc<Authority>,
    membership: Arc<M>,
    options: Options,
    sessions: mpsc::Sender<ServerEnd>,
    cancel: CancellationToken,
) -> Result<(), ServeError> {
    let certificate = authority.sign_server(&options.addresses, SystemTime::now())?;
    let resolver = Arc::new(Resolver { certified: RwLock::new(Arc::new(certificate.certified()?)) });
    let config = tls::server(authority.root(), resolver.clone(), options.guests.is_some())?;
    let shared = Arc::new(Shared {
        waiting: Waiting::new(options.limits.waiting),
        guest_slots: Arc::new(Semaphore::new(options.limits.guests)),
        peer_slots: Semaphore::new(options.limits.peers),
        options,
        authority,
        membership,
        sessions,
        live: Mutex::default(),
        refusals: Arc::default(),
        // Connections end with `serve`, also when its future is dropped.
        cancel: cancel.child_token(),
        tasks: TaskTracker::new(),
    });
    let _end = shared.cancel.clone().drop_guard();
    shared.accept(listener, TlsAcceptor::from(Arc::new(config)), &resolver, certificate).await;
    shared.cancel.cancel();
    shared.tasks.close();
    if tokio::time::timeout(shared.options.limits.stop * 2, shared.tasks.wait()).await.is_err() {
        warn!("some sessions did not end in time");
    }
    Ok(())
}

/// The server's certificate of the moment.
#[derive(Debug)]
struct Resolver {
    certified: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// What all connections share.
struct Shared<M> {
    options: Options,
    authority: Arc<Authority>,
    membership: Arc<M>,
    sessions: mpsc::Sender<ServerEnd>,
    /// The session of each machine.
    live: Mutex<HashMap<MachineId, Live>>,
    waiting: Arc<Waiting>,
    guest_slots: Arc<Semaphore>,
    peer_slots: Semaphore,
    refusals: Arc<RefusalLog>,
    cancel: CancellationToken,
    /// Every connection and every session.
    tasks: TaskTracker,
}

/// What a connection has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No session (yet), or a guest of whom nothing is known.
    Waiting,
    /// Its session is under way, or it is a guest who was admitted.
    Session,
    /// Its session is over, and so is the connection.
    Over,
}

/// Who is at the other end of a connection.
#[derive(Debug)]
struct Peer {
    address: SocketAddr,
    /// Verified, but maybe expired.
    certificate: Option<MachineCertificate>,
}

impl<M: Membership> Shared<M> {
    async fn accept(
        self: &Arc<Self>,
        listener: TcpListener,
        acceptor: TlsAcceptor,
        resolver: &Resolver,
        mut certificate: ServerCertificate,
    ) {
        loop {
            let accepted = tokio::select! {
                () = self.cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: trying again at once would only burn time.
                    warn!("unable to accept a connection: {error}");
                    tokio::select! {
                        () = self.cancel.cancelled() => return,
                        () = tokio::time::sleep(Duration::from_millis(100)) => continue,
                    }
                }
            };
            if !certificate.is_current(SystemTime::now()) {
                match self.renew_own(resolver) {
                    Ok(fresh) => certificate = fresh,
                    Err(error) => error!("unable to renew this server's certificate: {error}"),
                }
            }
            let place = self.waiting.add(address.ip());
            let (shared, acceptor) = (self.clone(), acceptor.clone());
            self.tasks.spawn(async move { shared.connection(stream, address, acceptor, place).await });
        }
    }

    fn renew_own(&self, resolver: &Resolver) -> Result<ServerCertificate, CaError> {
        let fresh = self.authority.sign_server(&self.options.addresses, SystemTime::now())?;
        *resolver.certified.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh.certified()?);
        Ok(fresh)
    }

    /// A connection from its beginning to its end. What it comes to is boxed: the task of a session, of which there are thousands, has no
    /// room for what it did not become.
    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        address: SocketAddr,
        acceptor: TlsAcceptor,
        place: waiting::Place,
    ) {
        if let Err(error) = self.options.keep_alive.prepare(&stream) {
            debug!(peer = %address, "{address} is gone already: {error}");
            return;
        }
        let greeted = Box::pin(self.greet(stream, address, acceptor, &place)).await;
        let Some((stream, certificate)) = greeted else { return };
        let served: Pin<Box<dyn Future<Output = ()> + Send + '_>> =
            match (&self.options.guests, stream.get_ref().1.alpn_protocol(), certificate) {
                (Some(guests), protocol, certificate) if protocol != Some(tls::H2) => {
                    Box::pin(self.guest(stream, address, certificate, guests.clone(), place))
                }
                (_, _, None) => Box::pin(self.agent(stream, Peer { address, certificate: None }, place)),
                (_, _, Some(ClientCertificate::Machine(machine))) => {
                    Box::pin(self.agent(stream, Peer { address, certificate: Some(machine) }, place))
                }
                (_, _, Some(ClientCertificate::User(_))) => {
                    return self
                        .refused(address, "its certificate is a user's, and it wants to be a machine");
                }
                (_, _, Some(ClientCertificate::Server(server))) => {
                    // Who has proved to hold the CA's key is no stranger.
                    drop(place);
                    Box::pin(self.peer(stream, address, server))
                }
            };
        served.await;
    }

    /// Goes through the TLS handshake, and finds out whose certificate was shown; `None`: refused.
    async fn greet(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        acceptor: TlsAcceptor,
        place: &waiting::Place,
    ) -> Option<(GuestStream, Option<ClientCertificate>)> {
        let shaken = tokio::select! {
            () = self.cancel.cancelled() => return None,
            () = place.pushed_out.cancelled() => {
                self.refused(address, "too many connections that are no session");
                return None;
            }
            shaken = tokio::time::timeout(self.options.limits.handshake, shake_hands(stream, acceptor)) => shaken,
        };
        let stream = match shaken {
            Ok(Ok(stream)) => stream,
            Ok(Err(Unshaken { reason, stream })) => {
                self.refused(address, &reason);
                part(stream).await;
                return None;
            }
            Err(_) => {
                self.refused(address, "it did not finish the TLS handshake in time");
                return None;
            }
        };
        let shown =
            stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(ClientCertificate::read);
        match shown.transpose() {
            Ok(certificate) => Some((stream, certificate)),
            Err(error) => {
                self.refused(address, &error.to_string());
                None
            }
        }
    }

    /// A connection of a machine: it joins, renews its certificate, or becomes a session.
    async fn agent(self: &Arc<Self>, stream: GuestStream, peer: Peer, place: waiting::Place) {
        let (limits, address) = (self.options.limits, peer.address);
        let (phase, mut phases) = watch::channel(Phase::Waiting);
        let (expires, _) = watch::channel(tokio::time::Instant::now());
        let service = LinkServer::new(Service { shared: self.clone(), peer, phase, expires })
            .max_decoding_message_size(MAX_UP)
            .max_encoding_message_size(MAX_DOWN);
        let connection = self
            .http2()
            .initial_stream_window_size(128 << 10)
            .initial_connection_window_size(256 << 10)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        let mut connection = std::pin::pin!(connection);

        // Until it has become a session.
        let idle = tokio::time::sleep(limits.idle);
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = &ended && is_misuse(error) {
                    return self.refused(address, &format!("it does not speak HTTP/2 as it should: {}", last_cause(error)));
                }
                return self.ended(address, ended);
            }
            () = self.cancel.cancelled() => {}
            () = place.pushed_out.cancelled() => {
                return self.refused(address, "too many connections that are no session");
            }
            () = idle => return self.refused(address, "its connection did not become a session in time"),
            _ = phases.wait_for(|phase| *phase != Phase::Waiting) => {}
        }
        drop(place);
        // While it is one.
        tokio::select! {
            ended = connection.as_mut() => return self.ended(address, ended),
            () = self.cancel.cancelled() => {}
            _ = phases.wait_for(|phase| *phase == Phase::Over) => {}
        }
        // The last words are still to be sent.
        connection.as_mut().graceful_shutdown();
        if let Ok(ended) = tokio::time::timeout(limits.stop, connection).await {
            self.ended(address, ended);
        }
    }

    /// HTTP/2 as all who are no guests speak it here: few streams at once, and found out when it is cut.
    fn http2(&self) -> http2::Builder<TokioExecutor> {
        let keep_alive = self.options.keep_alive;
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(keep_alive.after)
            .keep_alive_timeout(keep_alive.deadline)
            .max_concurrent_streams(4)
            .max_header_list_size(16 << 10)
            .max_send_buf_size(64 << 10);
        builder
    }

    /// A connection of another server.
    async fn peer(&self, stream: GuestStream, address: SocketAddr, asking: MachineId) {
        let Some(peers) = self.options.peers.clone() else {
            return self.refused(address, "it is a server, and this one shares its registry with no other");
        };
        let Ok(_slot) = self.peer_slots.try_acquire() else {
            return self.refused(address, "too many connections of other servers");
        };
        let service = PeersServer::new(peers::Service { peers, asking, cancel: self.cancel.clone() })
            .max_decoding_message_size(MAX_UP)
            .max_encoding_message_size(MAX_DOWN);
        let connection =
            self.http2().serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            ended = connection.as_mut() => return self.ended(address, ended),
            () = self.cancel.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        if let Ok(ended) = tokio::time::timeout(self.options.limits.stop, connection).await {
            self.ended(address, ended);
        }
    }

    /// A connection that speaks HTTP/1.1.
    async fn guest(
        &self,
        stream: GuestStream,
        address: SocketAddr,
        certificate: Option<ClientCertificate>,
        guests: Guests,
        place: waiting::Place,
    ) {
        let limits = self.options.limits;
        if let Err(error) = KeepAlive::prepare_reader(stream.get_ref().0) {
            debug!(peer = %address, "{address} is gone already: {error}");
            return;
        }
        let (phase, mut phases) = watch::channel(Phase::Waiting);
        let visitor = Visitor {
            address,
            certificate,
            phase,
            slots: self.guest_slots.clone(),
            slot: Mutex::default(),
            refusals: self.refusals.clone(),
        };
        let mut served = guests.serve(stream, visitor);
        let idle = tokio::time::sleep(limits.idle);
        tokio::select! {
            () = served.as_mut() => return,
            () = self.cancel.cancelled() => {}
            () = place.pushed_out.cancelled() => {
                return self.refused(address, "too many connections of which nothing is known");
            }
            () = idle => return debug!(peer = %address, "{address} did not say in time who it is"),
            Ok(_) = phases.wait_for(|phase| *phase != Phase::Waiting) => {}
        }
        drop(place);
        tokio::select! {
            () = served.as_mut() => return,
            () = self.cancel.cancelled() => {}
        }
        // The request under way is still to be answered.
        let _ = tokio::time::timeout(limits.stop, served).await;
    }

    fn ended(&self, address: SocketAddr, ended: Result<(), hyper::Error>) {
        match ended {
            Ok(()) => debug!(peer = %address, "connection with {address} closed"),
            Err(error) => debug!(peer = %address, "connection with {address} broke: {error}"),
        }
    }

    /// Says that a peer was refused, and why.
    fn refused(&self, address: SocketAddr, reason: &str) {
        self.refusals.refused(address, reason);
    }
}

/// Whether a connection broke because of what the peer sent, and not because it went away.
fn is_misuse(error: &hyper::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<std::io::Error>() {
            return false;
        }
        cause = error.source();
    }
    !error.is_closed() && !error.is_canceled()
}

/// The innermost of an error's causes: the others say where, not what.
fn last_cause(error: &hyper::Error) -> String {
    let mut cause: &(dyn std::error::Error + 'static) = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// A connection that did not get through its handshake.
struct Unshaken {
    reason: String,
    stream: TcpStream,
}

async fn shake_hands(mut stream: TcpStream, acceptor: TlsAcceptor) -> Result<GuestStream, Unshaken> {
    // TLS begins with the byte 22, all methods of HTTP with a capital letter.
    let mut first = [0];
    if let Ok(1) = stream.peek(&mut first).await
        && first[0].is_ascii_uppercase()
    {
        let _ = stream.write_all(PLAIN_HTTP).await;
        let reason = "it does not speak TLS; is it http where https is due?".to_owned();
        return Err(Unshaken { reason, stream });
    }
    acceptor
        .accept(stream)
        .into_fallible()
        .await
        .map_err(|(error, stream)| Unshaken { reason: tls::explain(&error), stream })
}

/// The answer to http where https is due.
const PLAIN_HTTP: &[u8] =
    b"HTTP/1.0 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
    {\"error\":{\"code\":400,\"message\":\"this port of fleetd speaks https, not http\"}}";

/// Closes a connection so that its peer can read the last words: what it sends is read until it has, since the kernel cuts a
/// connection off that is closed with something unread.
async fn part(mut stream: TcpStream) {
    let rest = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(MOST_UNREAD), &mut tokio::io::sink()).await
    };
    let _ = tokio::time::timeout(PARTING, rest).await;
}

/// How much is read of a peer that was refused, bytes, and for how long.
const MOST_UNREAD: u64 = 64 << 10;
const PARTING: Duration = Duration::from_secs(1);

/// A lock whose holder never panics halfway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
