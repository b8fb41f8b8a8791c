//! The connections to systemd: two, kept up for as long as the host lives.
//!
//! One is for calls, the other only for signals: a signal stream that is not read holds up the answers on its own
//! connection. Its reader does nothing but sort signals into bounded structures. When the bus or systemd goes away
//! (a restart, a re-execution) both are built anew, and whoever waits is told to look again.
use super::{changes::Changes, jobs::Jobs, path, proxy::ManagerProxy};
use crate::Error;
use futures_util::StreamExt;
use std::{collections::HashMap, future::Future, path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use zbus::{
    Connection, MatchRule, Message, MessageStream, connection::Builder, fdo, message, proxy::CacheProperties,
};

/// Calls under way at a time; the system bus allows a connection 128 unanswered ones.
const CALLS: usize = 48;
/// How long an answer may take. A reload of thousands of units takes some seconds.
const ANSWER: Duration = Duration::from_secs(90);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Pauses between attempts to connect again: doubled from the first to the last.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(5));

const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// The connection for calls, and what is asked once about the systemd at its end.
pub(super) struct Bus {
    pub(super) connection: Connection,
    pub(super) manager: ManagerProxy<'static>,
    /// The directories systemd reads unit files from.
    pub(super) search: Vec<PathBuf>,
    /// Names this life of the machine: marks made in another one are void.
    pub(super) boot: String,
    calls: Semaphore,
    /// Who waits until all signals are sorted that were sent before.
    waiting: mpsc::Sender<oneshot::Sender<()>>,
}

impl Bus {
    /// Makes a call, when not too many are under way.
    pub(super) async fn call<T>(&self, call: impl Future<Output = zbus::Result<T>>) -> Result<T, Error> {
        self.ask(call).await.map_err(Error::from)
    }

    /// As [`call`](Self::call), for who wants to know the error's name.
    pub(super) async fn ask<T>(&self, call: impl Future<Output = zbus::Result<T>>) -> zbus::Result<T> {
        let _permit = self.calls.acquire().await;
        call.await
    }

    /// Waits until the signals that systemd has sent so far have ended where they belong; or until the connection is gone.
    pub(super) async fn all_sorted(&self) {
        let (sorted, wait) = oneshot::channel();
        if self.waiting.send(sorted).await.is_ok() {
            // Dropped when the connection is gone.
            let _ = wait.await;
        }
    }
}

/// The bus as it is now, `None` while it is being connected to again.
pub(super) type Current = watch::Receiver<Option<Arc<Bus>>>;

/// The present bus, or the next one if it comes within the given time.
pub(super) async fn present(current: &Current, patience: Duration) -> Result<Arc<Bus>, Error> {
    let mut current = current.clone();
    let present = match tokio::time::timeout(patience, current.wait_for(Option::is_some)).await {
        Ok(Ok(bus)) => bus.clone(),
        _ => None,
    };
    present.ok_or_else(lost)
}

pub(super) fn lost() -> Error {
    Error::Unreachable("the connection to the system bus was lost and is not back yet".into())
}

/// Both connections, ready.
struct Session {
    bus: Arc<Bus>,
    signals: MessageStream,
    /// The connection they come from.
    connection: Connection,
    waiting: mpsc::Receiver<oneshot::Sender<()>>,
}

/// Keeps the connections up and sorts signals.
pub(super) struct Keeper {
    session: Option<Session>,
    current: watch::Sender<Option<Arc<Bus>>>,
    jobs: Jobs,
    changes: Arc<Changes>,
}

impl Keeper {
    /// Connects for the first time.
    pub(super) async fn connect(jobs: Jobs, changes: Arc<Changes>) -> Result<Self, Error> {
        let session = connect().await?;
        let current = watch::Sender::new(Some(session.bus.clone()));
        Ok(Keeper { session: Some(session), current, jobs, changes })
    }

    pub(super) fn current(&self) -> Current {
        self.current.subscribe()
    }

    /// Runs until cancelled.
    pub(super) async fn run(mut self, end: CancellationToken) {
        while let Some(()) = end.run_until_cancelled(self.step()).await {}
    }

    async fn step(&mut self) {
        match self.session.take() {
            Some(session) => {
                self.sort_signals(session).await;
                self.current.send_replace(None);
                tracing::warn!("the connection to systemd was lost; connecting again");
            }
            None => {
                let session = reconnect().await;
                tracing::info!("connected to systemd again");
                self.current.send_replace(Some(session.bus.clone()));
                self.session = Some(session);
                // Signals were missed.
                self.changes.all_changed();
            }
        }
    }

    /// Returns when one of the connections, or systemd, is gone.
    async fn sort_signals(&self, mut session: Session) {
        // Who waits, by the number of the message whose answer comes after all signals sent before.
        let mut waiting: HashMap<u32, oneshot::Sender<()>> = HashMap::new();
        loop {
            let message = tokio::select! {
                message = session.signals.next() => message,
                () = session.bus.connection.closed() => return,
                Some(waiter) = session.waiting.recv() => {
                    match ping(&session.connection).await {
                        Ok(number) => waiting.insert(number, waiter),
                        Err(_) => return,
                    };
                    continue;
                }
            };
            match message {
                Some(Ok(message)) if message.message_type() == message::Type::Signal => {
                    if let Sorted::SystemdGone = self.sort(&message) {
                        return;
                    }
                }
                Some(Ok(message)) => {
                    let number = message.header().reply_serial().map(u32::from);
                    if let Some(waiter) = number.and_then(|number| waiting.remove(&number)) {
                        // Who waits no more needs no answer.
                        let _ = waiter.send(());
                    }
                }
                Some(Err(_)) | None => return,
            }
        }
    }

    fn sort(&self, message: &Message) -> Sorted {
        let header = message.header();
        let (Some(interface), Some(member)) = (header.interface(), header.member()) else {
            return Sorted::Done;
        };
        match (interface.as_str(), member.as_str()) {
            ("org.freedesktop.DBus.Properties", "PropertiesChanged") => {
                if let Some(name) = header.path().and_then(|path| path::unit_name(path.as_str())) {
                    self.changes.changed(&name, || is_failed(message));
                }
            }
            (MANAGER, "JobRemoved") => {
                let body = message.body();
                if let Ok((id, _, unit, result)) =
                    body.deserialize::<(u32, zbus::ObjectPath<'_>, &str, &str)>()
                {
                    self.jobs.ended(id, unit, result);
                    self.changes.changed(unit, || (result == "failed").then_some(true));
                }
            }
            // The end of a reload; its beginning says nothing yet.
            (MANAGER, "Reloading") => {
                if let Ok(false) = message.body().deserialize::<bool>() {
                    self.changes.all_changed();
                }
            }
            // Only systemd's own name is asked for; also sent when systemd executes itself anew.
            ("org.freedesktop.DBus", "NameOwnerChanged") => return Sorted::SystemdGone,
            _ => {}
        }
        Sorted::Done
    }
}

/// Whether the unit is failed, if this PropertiesChanged says so or otherwise.
fn is_failed(message: &Message) -> Option<bool> {
    let body = message.body();
    let (_, properties, _) =
        body.deserialize::<(&str, HashMap<&str, zbus::Variant<'_>>, Vec<&str>)>().ok()?;
    Some(<&str>::try_from(properties.get("ActiveState")?).ok()? == "failed")
}

enum Sorted {
    Done,
    SystemdGone,
}

async fn reconnect() -> Session {
    let (mut pause, longest) = PAUSES;
    loop {
        match connect().await {
            Ok(session) => return session,
            Err(error) => tracing::debug!(%error, "systemd is not there yet"),
        }
        tokio::time::sleep(pause).await;
        pause = longest.min(pause * 2);
    }
}

async fn connect() -> Result<Session, Error> {
    match tokio::time::timeout(CONNECT, session()).await {
        Ok(Ok(session)) => Ok(session),
        Ok(Err(error)) => match Error::from(error) {
            Error::Refused(reason) => Err(Error::Unreachable(reason)),
            error => Err(error),
        },
        Err(_) => Err(Error::Unreachable(format!("no answer within {} s", CONNECT.as_secs()))),
    }
}

async fn session() -> zbus::Result<Session> {
    let signals = Builder::system().method_timeout(ANSWER).build().await?;
    let bus = fdo::DBusProxy::builder(&signals).cache_properties(CacheProperties::No).build().await?;
    for rule in rules()? {
        bus.add_match_rule(rule).await?;
    }
    manager(&signals).await?.subscribe().await?;

    let connection = Builder::system().method_timeout(ANSWER).build().await?;
    let manager = manager(&connection).await?;
    let search = manager.unit_path().await?.into_iter().map(PathBuf::from).collect();
    // Older versions know no soft reboot.
    let reboots = manager.soft_reboots_count().await.unwrap_or_default();
    let boot = format!("{}.{reboots}", manager.userspace_timestamp().await?);
    let (sender, waiting) = mpsc::channel(1);
    let calls = Semaphore::new(CALLS);
    let bus = Arc::new(Bus { connection, manager, search, boot, calls, waiting: sender });
    // All signals in one stream, in order; from here on it has to be read. What came earlier is covered by
    // looking again, as after every connect.
    Ok(Session { bus, connection: signals.clone(), signals: MessageStream::from(signals), waiting })
}

/// Asks systemd for a sign of life, and says by which number the answer is known.
async fn ping(connection: &Connection) -> zbus::Result<u32> {
    let message = Message::method_call("/org/freedesktop/systemd1", "Ping")
        .destination(SYSTEMD)
        .interface("org.freedesktop.DBus.Peer")
        .build(&())?;
    connection.send(&message).await?;
    Ok(message.primary_header().serial_num().into())
}

async fn manager(connection: &Connection) -> zbus::Result<ManagerProxy<'static>> {
    ManagerProxy::builder(connection).cache_properties(CacheProperties::No).build().await
}

/// What signals to get. Not UnitNew and UnitRemoved: asking for the state of a unit that is not in memory loads and
/// drops it, which sends both, and they would be asked about in turn; a change of state also sends
/// PropertiesChanged.
fn rules() -> zbus::Result<Vec<MatchRule<'static>>> {
    let from_systemd = || MatchRule::builder().msg_type(message::Type::Signal).sender(SYSTEMD);
    Ok(vec![
        from_systemd()
            .interface("org.freedesktop.DBus.Properties")
            .member("PropertiesChanged")
            .path_namespace("/org/freedesktop/systemd1/unit")
            .arg(0, "org.freedesktop.systemd1.Unit")
            .build()?,
        from_systemd().interface(MANAGER).member("JobRemoved").build()?,
        from_systemd().interface(MANAGER).member("Reloading").build()?,
        MatchRule::builder()
            .msg_type(message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, SYSTEMD)
            .build()?,
    ])
}

/// Says what the caller can do about it.
impl From<zbus::Error> for Error {
    fn from(error: zbus::Error) -> Self {
        use zbus::Error as E;
        match error {
            E::MethodError(name, text, _) => Error::Refused(text.unwrap_or_else(|| name.to_string())),
            E::FDO(error) => match *error {
                fdo::Error::AccessDenied(text) | fdo::Error::InteractiveAuthorizationRequired(text) => {
                    Error::Refused(format!(
                        "{text} (fleetd may not manage units here: run it as root, or as user fleet with the \
                         polkit rule 50-fleet.rules of the package)"
                    ))
                }
                fdo::Error::ServiceUnknown(text)
                | fdo::Error::NameHasNoOwner(text)
                | fdo::Error::NoReply(text)
                | fdo::Error::NoServer(text)
                | fdo::Error::Timeout(text)
                | fdo::Error::TimedOut(text)
                | fdo::Error::Disconnected(text) => Error::Unreachable(text),
                error => Error::Refused(text_of(&error)),
            },
            E::Connection(error, address) => {
                Error::Unreachable(format!("no system bus at {address}: {error}; is dbus running?"))
            }
            error => Error::Unreachable(error.to_string()),
        }
    }
}

fn text_of(error: &fdo::Error) -> String {
    use zbus::DBusError;
    error.description().map_or_else(|| error.to_string(), str::to_owned)
}
