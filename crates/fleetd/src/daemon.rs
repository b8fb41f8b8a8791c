//! Puts the daemon together: configuration, registry, server, agent and API, and takes it down again in order.
//! Whatever ends fleetd, the machine's units are left as they are.

mod etcd;
mod known_servers;
mod moved;
mod tend;

use crate::agent::{Agent, Pulse};
use crate::api::{self, Api, MAX_CONNECTIONS};
use crate::config::{Command, Config, Flags, OnStop, environment};
use crate::identity::{self, IdentityFiles};
use crate::lock::{self, LockError};
use crate::server::{MembershipError, Server, ServerConfig};
use crate::{address, guard, listen, logging, notify::Notifier};
use anyhow::{Context, bail};
use fleet_cluster::{engine::Policy, model::Machine};
use fleet_link::dial::{Address, Dialer};
use fleet_link::{AgentEnd, Hello, KeepAlive, ca, peer::PeerService, serve, serve::Guests};
use fleet_registry::{EmbeddedStore, EtcdStore, Store};
use fleet_systemd::dbus::{Directories, SystemdHost};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::{io, sync::Arc, time::Duration};
use tokio::net::TcpSocket;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// How long open connections and tasks may take to end when fleetd stops.
const STOP_DEADLINE: Duration = Duration::from_secs(8);
/// How long the agent may take when it takes its units along; together with the other deadline less than the service's
/// TimeoutStopSec=.
const PURGE_DEADLINE: Duration = Duration::from_secs(75);
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;
/// How long to wait before asking for the cluster's CA again.
const AUTHORITY_RETRY: Duration = Duration::from_secs(1);
/// How long to wait before beginning the session with our own agent again after it broke.
const SESSION_RETRY: Duration = Duration::from_millis(500);

/// Runs what the command line asks for.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    // It has no configuration: what it has to know it is told by fleetd.
    if let Some(Command::Guard) = &flags.command {
        return guard::run();
    }
    let (config, warnings) = Config::load(flags)?;
    if let Some(Command::Registry(command)) = &flags.command {
        return tend::run(command, &config);
    }
    let environment = environment()?;
    let log = logging::start(config.verbosity, &environment)?;
    info!("Starting fleetd version {}", env!("CARGO_PKG_VERSION"));
    info!("{}", config.file);
    for warning in warnings {
        warn!("{warning}");
    }
    let sockets = listen::open(&config.api_socket)?;
    for warning in &sockets.warnings {
        warn!("{warning}");
    }
    let notifier = Notifier::new(&environment, std::process::id());
    // A daemon mostly waits: two threads are enough, and small.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("unable to start the async runtime")?;
    let notifier = Arc::new(notifier);
    let mut signals = {
        let _runtime = runtime.enter();
        Signals::new().context("unable to receive signals")?
    };
    let mut next = config;
    let ended = loop {
        let config = next;
        match runtime.block_on(serve(&config, flags, &sockets, notifier.clone(), &mut signals)) {
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
            Ok(Some(changed)) => {
                if changed.api_socket != config.api_socket {
                    warn!("another api_socket is used when fleetd is restarted");
                }
                log.set_verbosity(changed.verbosity);
                info!("{}", changed.file);
                next = *changed;
            }
        }
    };
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

/// What fleetd is told by signals. They outlast a reload: what comes while one is under way is heard after it.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    /// What the original wrote then was for its developers; but nobody must end fleetd by asking for it.
    _asked: Signal,
}

impl Signals {
    /// Within a runtime.
    fn new() -> std::io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            _asked: signal(SignalKind::user_defined1())?,
        })
    }
}

/// Reads the configuration again, for SIGHUP; one that can't be used is none: fleetd goes on with what it has.
fn read_again(flags: &Flags) -> Option<Box<Config>> {
    match Config::load(flags) {
        Ok((config, warnings)) => {
            for warning in warnings {
                warn!("{warning}");
            }
            Some(Box::new(config))
        }
        Err(error) => {
            error!("Received SIGHUP: {error}; going on with the configuration as it was");
            None
        }
    }
}

/// Runs fleetd until it is told to stop, or, with the configuration to go on with, to read that again. The API's sockets stay
/// open meanwhile: who asks then waits a moment.
async fn serve(
    config: &Config,
    flags: &Flags,
    sockets: &listen::Sockets,
    notifier: Arc<Notifier>,
    signals: &mut Signals,
) -> anyhow::Result<Option<Box<Config>>> {
    let mut changed = None;
    let id = address::machine_id(Path::new("/etc/machine-id"))?;
    let public_ip = match &config.public_ip {
        Some(ip) => ip.clone(),
        None => {
            let published = address::published();
            if let Some(warning) = published.warning {
                warn!("{warning}");
            }
            published.address
        }
    };
    let beside = config.units_directory.parent().unwrap_or(Path::new("/run/fleet"));
    let directories = Directories {
        starts: beside.join("starts"),
        units: config.units_directory.clone(),
        // Wherever unit files are: that is where the guard looks.
        ..Directories::default()
    };
    // The registry first: who can't have it must not touch the machine.
    let registry = if !config.join.is_empty() {
        Registry::Elsewhere
    } else if config.embedded_registry() {
        moved::check_own(&config.state_directory)?;
        Registry::Own(EmbeddedStore::open(&config.state_directory)?)
    } else {
        let store = etcd::open(&config.etcd, &config.state_directory)?;
        tokio::select! {
            checked = moved::check_etcd(&store, &config.state_directory) => checked?,
            told = etcd::tell(store.contact(), notifier.clone(), CancellationToken::new()) => told?,
            _ = signals.terminate.recv() => return Ok(None),
            _ = signals.interrupt.recv() => return Ok(None),
        }
        Registry::Etcd(store)
    };
    let _only_one = hold_units(&config.units_directory)?;
    let systemd = SystemdHost::connect(directories)
        .await
        .context("unable to reach systemd on this machine; is dbus running? (systemctl status dbus)")?;
    let agent =
        Agent::new(Arc::new(systemd)).await.context("unable to see what fleet has on this machine")?;

    let machine = Machine {
        public_ip,
        metadata: config.metadata.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Machine::default()
    };
    let mut daemon = Daemon {
        hello: Hello { id, machine },
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        purge: CancellationToken::new(),
        agent_cancel: CancellationToken::new(),
        agent_ended: CancellationToken::new(),
        cancel: CancellationToken::new(),
        exchanged: CancellationToken::new(),
        tasks: JoinSet::new(),
    };
    let pulse = agent.pulse();
    let sessions = daemon.run_agent(agent);
    let listeners = sockets.listeners().context("unable to serve the API")?;
    daemon.tasks.spawn(watch_over(notifier.clone(), pulse, daemon.cancel.clone()));
    let ready = match &registry {
        Registry::Own(store) => daemon.be_server(config, store, false, listeners, sessions).await?,
        Registry::Etcd(store) => {
            let state_directory = config.state_directory.clone();
            let (prefix, cancel) = (config.etcd.key_prefix.clone(), daemon.cancel.clone());
            daemon.tasks.spawn(etcd::remember(store.clone(), prefix, state_directory, cancel));
            daemon.tasks.spawn(etcd::tell(store.contact(), notifier.clone(), daemon.cancel.clone()));
            daemon.be_server(config, store, true, listeners, sessions).await?
        }
        Registry::Elsewhere => daemon.be_agent(config, listeners, sessions),
    };

    let exchanged = daemon.exchanged.clone();
    let first = tokio::select! {
        ready = ready => match ready {
            Ok(status) => {
                notifier.ready(&status);
                info!("Ready: {status}");
                None
            }
            // Its sender is gone: the task that would have told ended.
            Err(_) => daemon.tasks.join_next().await,
        },
        // The loop sees it, too.
        () = exchanged.cancelled() => None,
        ended = daemon.tasks.join_next() => ended,
        _ = signals.terminate.recv() => daemon.told_to_stop("SIGTERM", config.on_stop),
        _ = signals.interrupt.recv() => daemon.told_to_stop("SIGINT", config.on_stop),
    };
    let ended = match first {
        Some(ended) => Some(ended),
        None => loop {
            tokio::select! {
                ended = daemon.tasks.join_next() => break ended,
                _ = signals.terminate.recv() => break daemon.told_to_stop("SIGTERM", config.on_stop),
                _ = signals.interrupt.recv() => break daemon.told_to_stop("SIGINT", config.on_stop),
                () = exchanged.cancelled() => {
                    changed = Some(Box::new(config.clone()));
                    info!("Beginning again with the registry as it is now; units go on until it says otherwise");
                    break None;
                }
                _ = signals.hang_up.recv() => {
                    changed = read_again(flags);
                    if changed.is_some() {
                        info!("Received SIGHUP: beginning again with the configuration as it is now; units go on");
                        break None;
                    }
                }
            }
        },
    };
    let outcome = match ended {
        None | Some(Ok(Ok(()))) => Ok(()),
        Some(Ok(Err(error))) => Err(error),
        Some(Err(error)) => Err(anyhow::Error::new(error).context("a task of fleetd failed")),
    };
    if let Err(error) = &outcome {
        error!("{error:#}; stopping, units go on");
    }

    match changed {
        None => notifier.stopping("stopping"),
        Some(_) => notifier.status("beginning again"),
    }
    daemon.end().await;
    if let Registry::Own(store) = registry {
        store.close().await;
    }
    outcome.map(|()| changed)
}

/// Takes the machine's units for this process. A second fleetd with another registry would take away what this one runs.
fn hold_units(directory: &Path) -> anyhow::Result<OwnedFd> {
    if let Some(parent) = directory.parent() {
        std::fs::create_dir_all(parent).with_context(|| format!("unable to make {}", parent.display()))?;
    }
    lock::beside(directory).map_err(|error| match error {
        LockError::Held(_) => anyhow::anyhow!(
            "another fleetd looks after the units in {}: stop that one first",
            directory.display()
        ),
        LockError::System(step, errno) => {
            anyhow::anyhow!("{}: unable to {step}: {errno}", directory.display())
        }
    })
}

/// Where the registry is.
enum Registry {
    /// In a file of this server.
    Own(EmbeddedStore),
    /// In etcd, with any number of servers on it.
    Etcd(EtcdStore),
    /// With the servers of which this fleetd is an agent.
    Elsewhere,
}

/// The tasks of a running daemon, and what they share.
struct Daemon {
    hello: Hello,
    connections: Arc<Semaphore>,
    /// Whether the agent takes its units along when it ends.
    purge: CancellationToken,
    /// The agent ends first, while its session can still say goodbye.
    agent_cancel: CancellationToken,
    agent_ended: CancellationToken,
    cancel: CancellationToken,
    /// Cancelled when another registry was accepted, or imported.
    exchanged: CancellationToken,
    tasks: JoinSet<anyhow::Result<()>>,
}

/// How a task of the daemon ended.
type TaskEnd = Result<anyhow::Result<()>, tokio::task::JoinError>;

/// Tells when the daemon is ready, with a status for systemd.
type Ready = oneshot::Receiver<String>;

impl Daemon {
    /// Starts the agent; what it needs is sessions.
    fn run_agent(&mut self, agent: Agent<SystemdHost>) -> mpsc::Sender<AgentEnd> {
        let (sessions, ends) = mpsc::channel(1);
        let agent = agent.purged_by(self.purge.clone());
        let (cancel, ended) = (self.agent_cancel.clone(), self.agent_ended.clone());
        self.tasks.spawn(async move {
            let _ended = ended.drop_guard();
            agent.run(ends, cancel.clone()).await;
            if cancel.is_cancelled() { Ok(()) } else { bail!("the agent ended") }
        });
        sessions
    }

    /// The role of a server: registry, engine, API, and a port for other machines' agents.
    async fn be_server<S: Store>(
        &mut self,
        config: &Config,
        store: &S,
        shared_registry: bool,
        listeners: Vec<listen::Listener>,
        sessions: mpsc::Sender<AgentEnd>,
    ) -> anyhow::Result<Ready> {
        let server_config = ServerConfig {
            machine: self.hello.id.clone(),
            agent_ttl: config.agent_ttl,
            policy: policy(config),
            disable_engine: config.disable_engine,
            shared_registry,
            address: config
                .listen
                .first()
                .map(|listen| Address::new(&self.hello.machine.public_ip, listen.port()).to_string()),
        };
        let server = Server::new(store.clone(), server_config, self.cancel.clone());
        server.start(&mut self.tasks);
        if shared_registry {
            server.start_among_others(&mut self.tasks);
        }
        self.exchanged = server.exchanged();
        self.tasks.spawn(own_session(server.clone(), self.hello.clone(), sessions, self.cancel.clone()));
        let page_size = u16::try_from(config.token_limit).unwrap_or(u16::MAX);
        let api = Arc::new(Api::new(server.clone(), page_size, self.cancel.clone()));
        if !config.listen.is_empty() {
            let api = api.clone();
            let users = Guests::new(move |stream, visitor| api.clone().serve_guest(stream, visitor));
            self.open_port(config, &server, users).await?;
        }
        for listener in listeners {
            let api = api.clone();
            self.accept(listener, move |stream| api.clone().serve(stream));
        }
        let (send, ready) = oneshot::channel();
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = server.hub().reached(1) => drop(send.send("serving".to_owned())),
            }
            cancel.cancelled().await;
            Ok(())
        });
        Ok(ready)
    }

    /// Opens the port for agents and users, and serves each agent in a task of its own.
    async fn open_port<S: Store>(
        &mut self,
        config: &Config,
        server: &Server<S>,
        users: Guests,
    ) -> anyhow::Result<()> {
        let (send, mut ends) = mpsc::channel(64);
        for address in &config.listen {
            // It is ours from now on, or fleetd does not start. But nobody is let in before the registry is read, and who tries is
            // better off with a refusal than with silence: there may be another server.
            let socket = bind(*address).with_context(|| format!("unable to listen on {address}"))?;
            let options = serve::Options {
                addresses: own_names(&self.hello.machine.public_ip, address.ip()),
                guests: Some(users.clone()),
                peers: server.shares_registry().then(|| Arc::new(server.clone()) as Arc<dyn PeerService>),
                ..serve::Options::default()
            };
            let (address, server, send) = (*address, Arc::new(server.clone()), send.clone());
            let cancel = self.cancel.clone();
            self.tasks.spawn(async move {
                let authority = tokio::select! {
                    () = cancel.cancelled() => return Ok(()),
                    authority = authority(&server) => Arc::new(authority?),
                };
                let listener =
                    socket.listen(BACKLOG).with_context(|| format!("unable to listen on {address}"))?;
                info!("Letting agents and users in on {address}; CA {}", authority.root().fingerprint());
                Ok(serve::serve(listener, authority, server, options, send, cancel).await?)
            });
        }
        let (server, cancel) = (server.clone(), self.cancel.clone());
        self.tasks.spawn(async move {
            let mut agents: JoinSet<()> = JoinSet::new();
            loop {
                tokio::select! {
                    () = cancel.cancelled() => break,
                    Some(_) = agents.join_next() => {}
                    end = ends.recv() => {
                        let Some(end) = end else { break };
                        let server = server.clone();
                        agents.spawn(async move {
                            let id = end.hello.id.clone();
                            if let Err(error) = server.serve_agent(end).await {
                                warn!(machine = %id, "the session with machine {id} broke: {error:#}");
                            }
                        });
                    }
                }
            }
            while agents.join_next().await.is_some() {}
            cancel.cancelled().await;
            Ok(())
        });
        Ok(())
    }

    /// The role of an agent only: sessions come from servers elsewhere.
    fn be_agent(
        &mut self,
        config: &Config,
        listeners: Vec<listen::Listener>,
        sessions: mpsc::Sender<AgentEnd>,
    ) -> Ready {
        let servers = config.join.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        for listener in listeners {
            let (servers, cancel) = (servers.clone(), self.cancel.clone());
            self.accept(listener, move |stream| api::refuse(stream, servers.clone(), cancel.clone()));
        }
        let (send, ready) = oneshot::channel();
        let (config, hello, cancel) = (config.clone(), self.hello.clone(), self.cancel.clone());
        self.tasks.spawn(async move {
            let Some(identity) = identity::obtain(&config, &hello.id, &cancel).await? else { return Ok(()) };
            let _ = send.send(format!("agent of {servers}"));
            // Different on every machine and at every start; only spreads the attempts to connect.
            let seed = hello.id.as_str().bytes().fold(u64::from(std::process::id()), |seed, byte| {
                seed.wrapping_mul(31).wrapping_add(u64::from(byte))
            });
            let dialer = Dialer::new(config.join.clone(), identity, hello, KeepAlive::default(), seed)?;
            let dialer = dialer.knowing(known_servers::recall(&config.state_directory));
            let files = IdentityFiles::new(&config.state_directory);
            let store = tokio::spawn(files.keep_stored(dialer.identity()));
            let servers = tokio::spawn(known_servers::keep(config.state_directory.clone(), dialer.servers()));
            dialer.run(sessions, cancel.clone()).await;
            store.await.context("storing renewed certificates")?;
            servers.await.context("storing where the servers are")??;
            if cancel.is_cancelled() { Ok(()) } else { bail!("nobody takes sessions any more") }
        });
        ready
    }

    /// Accepts connections of one listener until cancelled; each is served in a task of its own, which holds a permit.
    fn accept<F>(&mut self, listener: listen::Listener, serve: impl Fn(listen::Stream) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (connections, cancel) = (self.connections.clone(), self.cancel.clone());
        self.tasks.spawn(async move {
            loop {
                let permit = tokio::select! {
                    () = cancel.cancelled() => return Ok(()),
                    permit = connections.clone().acquire_owned() => permit.context("no more permits")?,
                };
                let stream = tokio::select! {
                    () = cancel.cancelled() => return Ok(()),
                    stream = listener.accept() => stream,
                };
                let served = serve(stream);
                tokio::spawn(async move {
                    served.await;
                    drop(permit);
                });
            }
        });
    }

    /// Notes that fleetd ends because it was told so, which is no failure of a task. The original took both signals alike.
    fn told_to_stop(&self, signal: &str, on_stop: OnStop) -> Option<TaskEnd> {
        match on_stop {
            OnStop::Keep => info!("Received {signal}: stopping; units go on"),
            OnStop::Purge => {
                info!("Received {signal}: stopping, with all units (on_stop=purge)");
                self.purge.cancel();
            }
        }
        Some(Ok(Ok(())))
    }

    /// Ends all tasks and connections.
    async fn end(mut self) {
        let agent_deadline = if self.purge.is_cancelled() { PURGE_DEADLINE } else { STOP_DEADLINE };
        self.agent_cancel.cancel();
        if tokio::time::timeout(agent_deadline, self.agent_ended.cancelled()).await.is_err() {
            warn!("the agent did not end in time");
        }
        self.cancel.cancel();
        let rest = async {
            while self.tasks.join_next().await.is_some() {}
            // The last permits come back when the last connections end.
            let _ = self.connections.acquire_many(u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX)).await;
        };
        if tokio::time::timeout(STOP_DEADLINE, rest).await.is_err() {
            warn!("some connections did not end in time");
        }
    }
}

/// A socket for the port, on which nobody is listened to yet.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // What a fleetd before this one has left of its connections is no reason to wait.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// How carefully units are moved.
fn policy(config: &Config) -> Policy {
    let (pace_units, pace_period) = config.mass_loss_rate;
    let mass_loss = config.mass_loss_fraction;
    let recheck = config.engine_reconcile_interval;
    Policy { mass_loss, pace_units, pace_period, recheck, ..Policy::for_ttl(config.agent_ttl) }
}

/// What a client may call this server by: agents and fleetctl do not look at it, curl and other clients do.
fn own_names(public_ip: &str, listen: IpAddr) -> Vec<String> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let names = [public_ip, &listen.to_string(), &host, "localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut names: Vec<String> = names.into_iter().filter(|name| ca::can_name(name)).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// The cluster's CA; waits for the registry, which the log tells about elsewhere.
async fn authority<S: Store>(server: &Server<S>) -> anyhow::Result<ca::Authority> {
    // Of a registry that is being imported the CA may not be there yet.
    server.hub().reached(1).await;
    loop {
        match server.authority().await {
            Err(MembershipError::Store(error)) if error.may_pass() => {
                debug!("waiting for the cluster's CA: {error}");
                tokio::time::sleep(AUTHORITY_RETRY).await;
            }
            other => return Ok(other?),
        }
    }
}

/// The session between this fleetd's server and its own agent, begun again should it break.
async fn own_session<S: Store>(
    server: Server<S>,
    hello: Hello,
    sessions: mpsc::Sender<AgentEnd>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    loop {
        let (server_end, agent_end) = fleet_link::local(hello.clone());
        if sessions.send(agent_end).await.is_err() {
            return Ok(());
        }
        let ended = server.serve_agent(server_end).await;
        if cancel.is_cancelled() {
            return Ok(());
        }
        if let Err(error) = ended {
            warn!("the session with this machine's agent broke: {error:#}");
        }
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(SESSION_RETRY) => {}
        }
    }
}

/// Tells systemd's watchdog that fleetd lives, as long as its agent gets on.
async fn watch_over(
    notifier: Arc<Notifier>,
    pulse: Arc<Pulse>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    notifier.watchdog(move || pulse.is_well(), cancel.clone()).await;
    cancel.cancelled().await;
    Ok(())
}
