//! Puts the daemon together: configuration, registry, server, agent and API, and takes it down again in order.
//! Whatever ends fleetd, the machine's units are left as they are.

use crate::agent::{Agent, Pulse};
use crate::api::{Api, MAX_CONNECTIONS};
use crate::config::{Command, Config, Flags, RegistryCommand, environment};
use crate::server::{Server, ServerConfig};
use crate::{address, listen, logging, notify::Notifier};
use anyhow::{Context, bail};
use fleet_cluster::model::Machine;
use fleet_link::{AgentEnd, Hello};
use fleet_registry::{EmbeddedStore, Store, embedded};
use fleet_systemd::dbus::{Directories, SystemdHost};
use std::path::{Path, PathBuf};
use std::{sync::Arc, time::Duration};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

/// How long open connections and tasks may take to end when fleetd stops.
const STOP_DEADLINE: Duration = Duration::from_secs(8);
/// How long to wait before beginning the session with our own agent again after it broke.
const SESSION_RETRY: Duration = Duration::from_millis(500);

/// Runs what the command line asks for.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let (config, warnings) = Config::load(flags)?;
    if let Some(Command::Registry(command)) = &flags.command {
        return tend_registry(command, &config.state_directory);
    }
    let environment = environment()?;
    logging::start(config.verbosity, &environment)?;
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
    let ended = runtime.block_on(serve(config, sockets, notifier));
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

async fn serve(config: Config, sockets: listen::Sockets, notifier: Notifier) -> anyhow::Result<()> {
    // First of all, so that a SIGTERM during the start is not lost.
    let mut terminate = signal(SignalKind::terminate()).context("unable to receive signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("unable to receive signals")?;
    if !config.embedded_registry() {
        bail!(
            "etcd_servers is set, but this version of fleetd has only the embedded registry: remove that key"
        );
    }
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
    let notifier = Arc::new(notifier);

    let store = EmbeddedStore::open(&config.state_directory)?;
    let directories = Directories {
        launched: config.units_directory.parent().unwrap_or(Path::new("/run/fleet")).join("launched"),
        units: config.units_directory.clone(),
    };
    let systemd = SystemdHost::connect(directories)
        .await
        .context("unable to reach systemd on this machine; is dbus running? (systemctl status dbus)")?;
    let agent =
        Agent::new(Arc::new(systemd)).await.context("unable to see what fleet has on this machine")?;

    let cancel = CancellationToken::new();
    let mut tasks: JoinSet<anyhow::Result<()>> = JoinSet::new();
    let server_config = ServerConfig { agent_ttl: config.agent_ttl, disable_engine: config.disable_engine };
    let server = Server::new(store.clone(), server_config, cancel.clone());
    server.start(&mut tasks);

    let (sessions, ends) = mpsc::channel(1);
    let pulse = agent.pulse();
    let agent_cancel = cancel.clone();
    tasks.spawn(async move {
        agent.run(ends, agent_cancel.clone()).await;
        if agent_cancel.is_cancelled() { Ok(()) } else { bail!("the agent ended") }
    });
    let machine = Machine {
        public_ip,
        metadata: config.metadata.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    tasks.spawn(own_session(server.clone(), Hello { id, machine }, sessions, cancel.clone()));

    let api = Arc::new(Api {
        server: server.clone(),
        page_size: u16::try_from(config.token_limit).unwrap_or(u16::MAX),
        cancel: cancel.clone(),
        connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    });
    // The file of our own socket goes when this is dropped, after the last connection.
    let (listeners, _socket_file) = sockets.listeners().context("unable to serve the API")?;
    for listener in listeners {
        tasks.spawn(accept(listener, api.clone()));
    }
    tasks.spawn(watch_over(notifier.clone(), pulse, cancel.clone()));

    let ready = server.hub().clone();
    let first = tokio::select! {
        () = ready.reached(1) => None,
        ended = tasks.join_next() => ended,
        _ = terminate.recv() => Some(Ok(Ok(()))),
        _ = interrupt.recv() => Some(Ok(Ok(()))),
    };
    let ended = match first {
        Some(ended) => Some(ended),
        None => {
            notifier.ready("serving");
            info!("Ready");
            tokio::select! {
                ended = tasks.join_next() => ended,
                _ = terminate.recv() => { info!("Received SIGTERM: stopping; units go on"); None }
                _ = interrupt.recv() => { info!("Received SIGINT: stopping; units go on"); None }
            }
        }
    };
    let outcome = match ended {
        None | Some(Ok(Ok(()))) => Ok(()),
        Some(Ok(Err(error))) => Err(error),
        Some(Err(error)) => Err(anyhow::Error::new(error).context("a task of fleetd failed")),
    };
    if let Err(error) = &outcome {
        error!("{error:#}; stopping, units go on");
    }

    notifier.stopping("stopping");
    cancel.cancel();
    let rest = async {
        while tasks.join_next().await.is_some() {}
        // The last permits come back when the last connections end.
        let _ = api.connections.acquire_many(u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX)).await;
    };
    if tokio::time::timeout(STOP_DEADLINE, rest).await.is_err() {
        warn!("some connections did not end in time");
    }
    store.close().await;
    outcome
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

/// Accepts connections of one listener until cancelled; each is served in a task of its own, which holds a permit.
async fn accept<S: Store>(listener: listen::Listener, api: Arc<Api<S>>) -> anyhow::Result<()> {
    loop {
        let permit = tokio::select! {
            () = api.cancel.cancelled() => return Ok(()),
            permit = api.connections.clone().acquire_owned() => permit.context("no more permits")?,
        };
        let stream = tokio::select! {
            () = api.cancel.cancelled() => return Ok(()),
            stream = listener.accept() => stream,
        };
        let api = api.clone();
        tokio::spawn(async move {
            api.serve(stream).await;
            drop(permit);
        });
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

fn tend_registry(command: &RegistryCommand, configured: &Path) -> anyhow::Result<()> {
    let at = |directory: &Option<PathBuf>| directory.clone().unwrap_or_else(|| configured.to_owned());
    match command {
        RegistryCommand::Check { directory } => {
            let report = embedded::check(&at(directory))?;
            println!("{report}");
            if !report.is_sound() {
                bail!("the registry is damaged; `fleetd registry repair` saves what can be saved");
            }
        }
        RegistryCommand::Repair { directory } => println!("{}", embedded::repair(&at(directory))?),
    }
    Ok(())
}
