//! The machine's presence: signs of life as long as there is a session, and the farewell.
//!
//! A task of its own, so that a long batch does not look like death. It also keeps what the guard has to know, and
//! replaces it at each renewal: a renewal counts, here and for a restarted fleetd, when the guard knows it.
//!
//! A renewal whose answer comes late may have been too late for a unit with OnIsolation=stop: then the agent looks at its units
//! before the renewal counts ([`Renewal::CountsAfter`]).

use super::*;
use fleet_cluster::fencing::{self, Renewal};
use fleet_link::{Beat, Held};
use fleet_systemd::Guarded;
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

/// How long an answer to a sign of life is waited for; and the pause before the next one when there was none.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(500);
/// How long giving up the machine's presence may take.
const LEAVE_DEADLINE: Duration = Duration::from_secs(2);

/// What is known of the machine's presence. Times are those of [`Systemd::clock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// When the newest renewal that counts was sent.
    pub(super) renewed: Option<Time>,
    /// For how long it holds.
    pub(super) ttl: Time,
    /// When a renewal was sent that counts as soon as the agent has looked at its units.
    pub(super) waiting: Option<Time>,
}

/// The agent's way to the task.
#[derive(Debug)]
pub(super) struct Presence {
    commands: mpsc::Sender<Command>,
    known: watch::Receiver<Known>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
enum Command {
    Session(Option<mpsc::Sender<Beat>>),
    Guard(BTreeMap<UnitName, Time>, oneshot::Sender<Result<(), Error>>),
    LookedAt { sent: Time, looked: Time },
}

impl Presence {
    /// `guarded`: what an earlier fleetd knew.
    pub(super) fn new<S: Systemd>(systemd: Arc<S>, guarded: Option<Guarded>) -> Self {
        let (commands, receive) = mpsc::channel(8);
        let mut known = Known::default();
        let mut units = BTreeMap::new();
        if let Some(guarded) = guarded {
            (known.renewed, known.ttl, units) = (Some(guarded.renewed), guarded.ttl, guarded.units);
        }
        let (publish, known) = watch::channel(known);
        let task = Task {
            systemd,
            known: publish,
            units,
            session: None,
            next: Instant::now(),
            answers: FuturesUnordered::new(),
            waiting_ttl: Time::ZERO,
        };
        let _task = AbortOnDropHandle::new(tokio::spawn(task.run(receive)));
        Presence { commands, known, _task }
    }

    pub(super) fn known(&self) -> Known {
        *self.known.borrow()
    }

    /// Waits until something else is known. Cancel-safe.
    pub(super) async fn changed(&mut self) {
        if self.known.changed().await.is_err() {
            // The task lives as long as this does.
            std::future::pending().await
        }
    }

    /// A session began, or it ended.
    pub(super) async fn session(&self, beats: Option<mpsc::Sender<Beat>>) {
        let _ = self.commands.send(Command::Session(beats)).await;
    }

    /// Tells the guard which units it has to stop, with the time each may take for that.
    pub(super) async fn guard(&self, units: BTreeMap<UnitName, Time>) -> Result<(), Error> {
        let (done, told) = oneshot::channel();
        let _ = self.commands.send(Command::Guard(units, done)).await;
        told.await.unwrap_or_else(|_| Err(Error::Refused("fleetd is stopping".to_owned())))
    }

    /// The agent has looked at its units, not before `looked`, with regard to the renewal that waited for that.
    pub(super) async fn looked_at(&self, sent: Time, looked: Time) {
        let _ = self.commands.send(Command::LookedAt { sent, looked }).await;
    }
}

/// The answer to a beat that was sent at that time.
type Answer = (Time, Option<Held>);

struct Task<S> {
    systemd: Arc<S>,
    known: watch::Sender<Known>,
    units: BTreeMap<UnitName, Time>,
    session: Option<mpsc::Sender<Beat>>,
    /// When the next sign of life is due.
    next: Instant,
    answers: FuturesUnordered<BoxFuture<'static, Answer>>,
    /// The TTL of the renewal that waits.
    waiting_ttl: Time,
}

impl<S: Systemd> Task<S> {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(Command::Session(session)) => {
                        self.session = session;
                        self.next = Instant::now();
                        self.answers.clear();
                        self.known.send_if_modified(|known| known.waiting.take().is_some());
                    }
                    Some(Command::Guard(units, done)) => {
                        // From here on at a faster pace.
                        if self.units.is_empty() {
                            self.next = Instant::now();
                        }
                        self.units = units;
                        let known = *self.known.borrow();
                        let _ = done.send(self.tell_guard(known).await);
                    }
                    Some(Command::LookedAt { sent, looked }) => {
                        let waiting = self.known.borrow().waiting;
                        if waiting == Some(sent) {
                            self.count(sent, self.waiting_ttl, looked).await;
                        }
                    }
                    None => return,
                },
                () = tokio::time::sleep_until(self.next), if self.session.is_some() => self.beat(),
                Some((sent, held)) = self.answers.next() => match held {
                    Some(held) => self.answered(sent, held).await,
                    None => self.next = self.next.min(Instant::now() + RETRY),
                },
            }
        }
    }

    fn beat(&mut self) {
        let ttl = self.known.borrow().ttl;
        let period = match (ttl.is_zero(), self.units.is_empty()) {
            (true, _) => RETRY,
            (false, true) => ttl / 3,
            (false, false) => fencing::renewal_period(ttl),
        };
        self.next = Instant::now() + period;
        let Some(beats) = &self.session else { return };
        let (held, answer) = oneshot::channel();
        let sent = self.systemd.clock();
        // A queue that is full has beats enough; that the session has ended is told soon.
        if beats.try_send(Beat { leaving: false, held }).is_ok() {
            self.answers.push(Box::pin(async move {
                let answer = tokio::time::timeout(ANSWER_DEADLINE, answer).await;
                (sent, answer.ok().and_then(Result::ok))
            }));
        }
    }

    async fn answered(&mut self, sent: Time, held: Held) {
        let known = *self.known.borrow();
        if known.renewed.is_some_and(|renewed| renewed >= sent) || known.waiting.is_some() {
            return;
        }
        let now = self.systemd.clock();
        match fencing::renewal(known.renewed, known.ttl, now, held.told) {
            Renewal::Counts => self.count(sent, held.ttl, now).await,
            Renewal::CountsAfter => self.have_looked(sent, held.ttl),
            Renewal::Void => debug!("a renewal does not count: there is more to be heard first"),
        }
    }

    /// Has the agent look at its units before a renewal counts.
    fn have_looked(&mut self, sent: Time, ttl: Time) {
        self.waiting_ttl = ttl;
        self.known.send_modify(|known| known.waiting = Some(sent));
    }

    /// `looked`: when it was looked last which units are due.
    async fn count(&mut self, renewed: Time, ttl: Time, looked: Time) {
        let known = Known { renewed: Some(renewed), ttl, waiting: None };
        match self.tell_guard(known).await {
            // Those that fell due before the guard knew may have been stopped by it.
            Ok(()) if self.fell_due(looked) => self.have_looked(renewed, ttl),
            Ok(()) => drop(self.known.send_replace(known)),
            Err(error) => {
                warn!("the guard can't be told that presence was renewed: {error}; so it does not count");
                self.known.send_modify(|known| known.waiting = None);
            }
        }
    }

    /// Whether a unit has become due since then, by the renewal that counts.
    fn fell_due(&self, then: Time) -> bool {
        let known = *self.known.borrow();
        let units = self.units.iter().map(|(name, timeout)| (name, *timeout));
        let next = fencing::isolation(units, known.renewed, known.ttl, then).wake_at;
        next.is_some_and(|at| at <= self.systemd.clock())
    }

    async fn tell_guard(&mut self, known: Known) -> Result<(), Error> {
        match known.renewed {
            Some(renewed) if !self.units.is_empty() => {
                let guarded = Guarded { ttl: known.ttl, renewed, units: self.units.clone() };
                self.systemd.tell_guard(Some(&guarded)).await
            }
            _ => Ok(()),
        }
    }
}

/// Gives up the machine's presence, so that its units are placed elsewhere at once. `why`: what this machine does.
pub(super) async fn leave(beats: &mpsc::Sender<Beat>, why: &str) {
    let (held, answer) = oneshot::channel();
    let said = async { beats.send(Beat { leaving: true, held }).await.is_ok() && answer.await.is_ok() };
    match tokio::time::timeout(LEAVE_DEADLINE, said).await {
        Ok(true) => info!("{why}: gave up the machine's presence"),
        _ => warn!("{why}, and no server answers: the machine's presence runs out by itself"),
    }
}
