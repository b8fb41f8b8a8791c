//! A session as the server drives it: one task that passes messages both ways and never waits for one side while the other
//! has something to say.

use super::Membership;
use super::service::{LivePlace, Sent};
use crate::pending::{Assembler, Parts, Pending, Update};
use crate::wire::generated as pb;
use crate::wire::{Down, MAX_UNITS, PART_DOWN, Up, WireError, instruction_size};
use crate::{Beat, Chunk, FromAgent, Held, Instruction, Request, ToAgent};
use fleet_cluster::model::{MachineId, Revision, UnitReport};
use fleet_unit::UnitName;
use futures_util::{StreamExt, stream::FuturesUnordered};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, info};

/// Requests under way in one session.
const MOST_REQUESTS: usize = 64;
/// Short messages waiting to be sent.
const MOST_CONTROL: usize = 8 * MOST_REQUESTS;
/// Pieces of one answer that may be under way; what a reader that does not read costs at most.
const CREDIT: u32 = 16;
/// Beats that the daemon has not answered; with more, the oldest stay unanswered.
const MOST_BEATS: usize = 16;

/// The first protocol number in which agents are told where all servers are.
const SERVERS_SINCE: u32 = 2;
/// The first in which they are asked to say when nothing of a unit runs any more.
const RELEASE_SINCE: u32 = 3;

/// The answer to a beat, with its number; `None`: there will be none.
type HeldFuture = Pin<Box<dyn Future<Output = Option<(u64, Held)>> + Send>>;

/// Why a session ended.
#[derive(Debug)]
enum End {
    /// The daemon dropped its end.
    Dropped,
    /// The server stops.
    Stopping,
    /// The machine has another session now.
    Replaced,
    /// The certificate's time is over.
    Expired,
    /// The agent ended it.
    Left,
    /// The connection broke.
    Broken(Status),
    /// The agent sent what no agent sends.
    Wrong(String),
    /// The agent does not read.
    Stalled,
}

pub(super) struct Pump<M> {
    pub(super) inbound: Streaming<pb::FromAgent>,
    pub(super) out: mpsc::Sender<Sent>,
    pub(super) from_daemon: mpsc::Receiver<ToAgent>,
    pub(super) to_daemon: mpsc::Sender<FromAgent>,
    pub(super) cancel: CancellationToken,
    pub(super) place: LivePlace<M>,
    pub(super) expires: watch::Receiver<Instant>,
    pub(super) stalled: Duration,
    pub(super) state: State,
}

/// What a session is about to pass on.
pub(super) struct State {
    protocol: u32,
    /// Short messages, sent before anything else.
    control: VecDeque<Down>,
    units: Pending<Instruction>,
    parts: Option<Parts<Instruction>>,
    reports: Pending<UnitReport>,
    released: BTreeMap<UnitName, Revision>,
    assembler: Assembler<UnitReport>,
    requests: HashMap<u64, mpsc::Sender<Chunk>>,
    requested: u64,
    /// Bring the pieces of answers to their readers.
    forwarders: JoinSet<()>,
    beat: mpsc::Sender<Beat>,
    held: FuturesUnordered<HeldFuture>,
    /// Answers to beats that go behind updates of units, with how many of these have to be sent before.
    behind: VecDeque<(usize, Down)>,
    probes: Vec<(u64, oneshot::Sender<()>)>,
    probed: u64,
    events: mpsc::Sender<Event>,
    events_out: Option<mpsc::Receiver<Event>>,
}

/// What a forwarder has to say.
#[derive(Debug)]
enum Event {
    /// So many pieces were taken.
    Taken(u64, u32),
    /// Nobody reads any more.
    Unread(u64),
}

impl<M: Membership> Pump<M> {
    /// Until it ends. Boxed, or a session's task would hold each of its parts twice.
    pub(super) async fn run(mut self: Box<Self>, peer: SocketAddr, machine: MachineId) {
        let out = self.out.clone();
        let shared = self.place.shared.clone();
        let end = self.pass().await;
        drop(self);
        let (status, text) = match end {
            End::Dropped => {
                (Status::aborted("the server has ended the session"), "the server ended it".to_owned())
            }
            End::Stopping => {
                (Status::unavailable("the server is stopping"), "the server is stopping".to_owned())
            }
            End::Replaced => (
                Status::aborted("a newer session has replaced this one"),
                "a newer one has replaced it".to_owned(),
            ),
            End::Expired => (
                Status::unauthenticated("its certificate has expired"),
                "its certificate has expired".to_owned(),
            ),
            End::Left => (Status::ok(""), "the agent ended it".to_owned()),
            End::Broken(status) => (Status::ok(""), format!("the connection broke: {}", status.message())),
            End::Wrong(problem) => {
                shared.refused(peer, &format!("machine {machine} sent a wrong message: {problem}"));
                (Status::invalid_argument(problem), "a message was refused".to_owned())
            }
            End::Stalled => {
                (Status::resource_exhausted("it does not read"), "the agent does not read".to_owned())
            }
        };
        info!(machine = %machine, peer = %peer, "session of machine {machine} from {peer} ended: {text}");
        // If there is no room, the connection is in no state to carry last words.
        if out.try_send(Box::new(Err(status))).is_err() {
            debug!("no last words to {peer}");
        }
    }

    async fn pass(&mut self) -> End {
        let Pump { inbound, out, from_daemon, to_daemon, cancel, place, expires, stalled, state } = self;
        let Some(mut events) = state.events_out.take() else { return End::Dropped };
        let mut stuck: Option<Instant> = None;
        loop {
            let sending = state.has_output();
            let limit = match sending {
                true => *stuck.get_or_insert_with(|| Instant::now() + *stalled),
                false => {
                    stuck = None;
                    Instant::now()
                }
            };
            let expires_at = *expires.borrow_and_update();
            tokio::select! {
                () = cancel.cancelled() => return End::Stopping,
                () = place.end.cancelled() => return End::Replaced,
                () = sleep_until(expires_at) => return End::Expired,
                Ok(()) = expires.changed() => {}
                () = to_daemon.closed() => return End::Dropped,
                message = inbound.message() => match message {
                    Ok(Some(message)) => if let Err(problem) = state.take(message) { return End::Wrong(problem) },
                    Ok(None) => return End::Left,
                    // Without a cause it was made of what came, not of how it came.
                    Err(status) if std::error::Error::source(&status).is_none() => {
                        return End::Wrong(status.message().to_owned());
                    }
                    Err(status) => return End::Broken(status),
                },
                command = from_daemon.recv() => match command {
                    Some(command) => state.command(command),
                    None => return End::Dropped,
                },
                permit = to_daemon.reserve(), if !state.reports.is_empty() || !state.released.is_empty() => {
                    let Ok(permit) = permit else { return End::Dropped };
                    match state.reports.take() {
                        Some(Update::Snapshot(all)) => permit.send(FromAgent::Snapshot(all)),
                        Some(Update::Changes(changes)) => permit.send(FromAgent::Changes(changes)),
                        None => permit.send(FromAgent::Released(std::mem::take(&mut state.released))),
                    }
                },
                permit = out.reserve(), if sending => {
                    let Ok(permit) = permit else { return End::Left };
                    if let Some(message) = state.next_output() {
                        permit.send(Box::new(Ok(message.encode())));
                    }
                    stuck = None;
                },
                Some(event) = events.recv() => state.event(event),
                Some(held) = state.held.next(), if !state.held.is_empty() => {
                    // What the daemon said before it answered is in its queue, if not here already.
                    while let Ok(command) = from_daemon.try_recv() {
                        state.command(command);
                    }
                    state.held(held);
                },
                Some(probe) = place.probes.recv() => state.probe(probe),
                () = sleep_until(limit), if sending => return End::Stalled,
            }
        }
    }
}

impl State {
    /// A session that speaks this protocol number.
    pub(super) fn new(protocol: u32, beat: mpsc::Sender<Beat>) -> Self {
        let (events, events_out) = mpsc::channel(MOST_REQUESTS);
        State {
            protocol,
            control: [Down::Welcome { protocol }].into(),
            units: Pending::default(),
            parts: None,
            reports: Pending::default(),
            released: BTreeMap::new(),
            assembler: Assembler::new(MAX_UNITS),
            requests: HashMap::new(),
            requested: 0,
            forwarders: JoinSet::new(),
            beat,
            held: FuturesUnordered::new(),
            behind: VecDeque::new(),
            probes: Vec::new(),
            probed: 0,
            events,
            events_out: Some(events_out),
        }
    }

    fn has_output(&self) -> bool {
        !self.control.is_empty() || self.parts.is_some() || !self.units.is_empty()
    }

    fn next_output(&mut self) -> Option<Down> {
        if let Some(control) = self.control.pop_front() {
            return Some(control);
        }
        if self.parts.is_none() {
            self.parts = self.units.take().map(Parts::of);
        }
        let (part, last) = self.parts.as_mut()?.next(PART_DOWN, instruction_size);
        if last {
            self.parts = None;
            for (updates, _) in &mut self.behind {
                *updates -= 1;
            }
            while self.behind.front().is_some_and(|(updates, _)| *updates == 0) {
                self.control.extend(self.behind.pop_front().map(|(_, answer)| answer));
            }
        }
        Some(Down::Units(part))
    }

    /// What the daemon wants sent.
    fn command(&mut self, command: ToAgent) {
        match command {
            ToAgent::Snapshot(mut units) => {
                units.retain(|_, unit| self.knows(unit));
                // The rest of an older one would be told for nothing.
                self.parts = None;
                for (updates, _) in &mut self.behind {
                    *updates = 1;
                }
                self.units.push(Update::Snapshot(units));
            }
            ToAgent::Changes(mut changes) => {
                for change in changes.values_mut() {
                    *change = change.take().filter(|unit| self.knows(unit));
                }
                self.units.push(Update::Changes(changes));
            }
            ToAgent::Request(request) => self.request(*request),
            ToAgent::Servers(servers) if self.protocol >= SERVERS_SINCE => {
                // Of several that wait only the last is worth telling.
                self.control.retain(|down| !matches!(down, Down::Servers(_)));
                self.control.push_back(Down::Servers(servers));
            }
            ToAgent::Servers(_) => {}
        }
    }

    /// Whether the agent understands an instruction; what it does not is as none to it.
    fn knows(&self, instruction: &Instruction) -> bool {
        !matches!(instruction, Instruction::Release(_)) || self.protocol >= RELEASE_SINCE
    }

    fn request(&mut self, Request { ask, answer }: Request) {
        while self.forwarders.try_join_next().is_some() {}
        // The second of these: what was asked and given up again, while the agent does not read.
        if self.requests.len() >= MOST_REQUESTS || self.control.len() >= MOST_CONTROL {
            let refusal = "too many requests for this machine at the same time; try again";
            // If there is no room for a first piece, nobody reads.
            let _ = answer.try_send(Chunk::Failed(refusal.to_owned()));
            return;
        }
        self.requested += 1;
        let number = self.requested;
        let (pieces, to_forward) = mpsc::channel(CREDIT as usize);
        self.requests.insert(number, pieces);
        self.forwarders.spawn(forward(number, to_forward, answer, self.events.clone()));
        self.control.push_back(Down::Request { number, credit: CREDIT, ask });
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Taken(number, pieces) if self.requests.contains_key(&number) => {
                self.control.push_back(Down::Credit { number, pieces });
            }
            Event::Unread(number) if self.requests.remove(&number).is_some() => {
                self.control.push_back(Down::Cancel(number));
            }
            // The answer has ended meanwhile.
            Event::Taken(..) | Event::Unread(_) => {}
        }
    }

    fn probe(&mut self, probe: oneshot::Sender<()>) {
        self.probes.retain(|(_, waiting)| !waiting.is_closed());
        self.probed += 1;
        self.probes.push((self.probed, probe));
        self.control.push_back(Down::Probe(self.probed));
    }

    /// What the agent has sent.
    fn take(&mut self, message: pb::FromAgent) -> Result<(), String> {
        match Up::decode(message).map_err(|error: WireError| error.to_string())? {
            Up::Hello { .. } => return Err("a second hello".to_owned()),
            Up::Released(units) => {
                self.released.extend(units);
                if self.released.len() > MAX_UNITS {
                    return Err(format!("released: more than {MAX_UNITS} units"));
                }
            }
            Up::Reports(part) => {
                if let Some(update) =
                    self.assembler.push(part).map_err(|error| format!("reports: {error}"))?
                {
                    self.reports.push(update);
                }
                // Nothing takes them fast enough, or there is no end of names.
                if self.reports.len() > 2 * MAX_UNITS {
                    return Err(format!("reports: more than {MAX_UNITS} units"));
                }
            }
            Up::Beat { number, leaving } => self.beat(number, leaving),
            Up::Answer { number, piece } => self.piece(number, piece)?,
            Up::Probed(number) => {
                if let Some(at) = self.probes.iter().position(|(probe, _)| *probe == number) {
                    let _ = self.probes.swap_remove(at).1.send(());
                }
            }
        }
        Ok(())
    }

    fn beat(&mut self, number: u64, leaving: bool) {
        let (held, answer) = oneshot::channel();
        if self.held.len() >= MOST_BEATS || self.beat.try_send(Beat { leaving, held }).is_err() {
            debug!("a beat is not answered: those before it were not yet");
            return;
        }
        self.held.push(Box::pin(async move { answer.await.ok().map(|held| (number, held)) }));
    }

    /// Answers a beat: behind what the agent was to be told before.
    fn held(&mut self, held: Option<(u64, Held)>) {
        let Some((number, Held { ttl, .. })) = held else { return };
        let answer = Down::Held { number, ttl };
        match usize::from(self.parts.is_some()) + usize::from(!self.units.is_empty()) {
            0 => self.control.push_back(answer),
            updates => self.behind.push_back((updates, answer)),
        }
    }

    fn piece(&mut self, number: u64, piece: Option<Chunk>) -> Result<(), String> {
        let Some(reader) = self.requests.get(&number) else {
            // Sent before the cancel arrived.
            return Ok(());
        };
        let last = matches!(piece, None | Some(Chunk::Exit(_) | Chunk::Failed(_)));
        if let Some(piece) = piece {
            match reader.try_send(piece) {
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
                Err(mpsc::error::TrySendError::Full(_)) => {
                    return Err("answer: more pieces than it had credit for".to_owned());
                }
            }
        }
        if last {
            self.requests.remove(&number);
        }
        Ok(())
    }
}

/// Brings the pieces of one answer to its reader, at the reader's pace.
async fn forward(
    number: u64,
    mut pieces: mpsc::Receiver<Chunk>,
    answer: mpsc::Sender<Chunk>,
    events: mpsc::Sender<Event>,
) {
    let mut taken = 0;
    loop {
        let piece = tokio::select! {
            () = answer.closed() => None,
            piece = pieces.recv() => match piece {
                Some(piece) => Some(piece),
                // That was the last one.
                None => return,
            },
        };
        let Some(piece) = piece else { break };
        if answer.send(piece).await.is_err() {
            break;
        }
        taken += 1;
        // Told in batches, so that credit costs little.
        if taken == CREDIT / 2 {
            if events.send(Event::Taken(number, taken)).await.is_err() {
                return;
            }
            taken = 0;
        }
    }
    let _ = events.send(Event::Unread(number)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_agent_is_not_asked_what_it_does_not_know() {
        let name = UnitName::parse("a.service").unwrap();
        for (protocol, knows) in [(RELEASE_SINCE - 1, false), (RELEASE_SINCE, true)] {
            let mut state = State::new(protocol, mpsc::channel(1).0);
            assert_eq!(state.next_output(), Some(Down::Welcome { protocol }));
            let mut told = |command| {
                state.command(command);
                let Some(Down::Units(part)) = state.next_output() else { panic!("nothing is told") };
                part.entries
            };
            let release = Some(Instruction::Release(7)).filter(|_| knows);
            let all = told(ToAgent::Snapshot([(name.clone(), Instruction::Release(7))].into()));
            assert_eq!(all, Vec::from_iter(release.clone().map(|release| (name.clone(), Some(release)))));
            // It is not to be held any more, whoever knows of it.
            let changes = told(ToAgent::Changes([(name.clone(), Some(Instruction::Release(7)))].into()));
            assert_eq!(changes, [(name.clone(), release)]);
        }
    }
}
