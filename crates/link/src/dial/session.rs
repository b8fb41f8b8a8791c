//! A session as the agent drives it: one task that passes messages both ways and never waits for one side while the other
//! has something to say.

use super::address::Address;
use super::backoff::Trouble;
use super::connection::{CALL_DEADLINE, Connection, DialError};
use crate::pending::{Assembler, Parts, Pending, Update};
use crate::wire::generated as pb;
use crate::wire::{
    Down, MAX_UNITS, MOST_RELEASED, NEWEST_PROTOCOL, OLDEST_PROTOCOL, PART_UP, Up, WireError, pieces,
    report_size,
};
use crate::{Beat, Chunk, FromAgent, Held, Hello, Instruction, Request, ToAgent};
use fleet_cluster::model::{Revision, UnitReport};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Requests under way in one session; a server does not ask more at a time.
const MOST_REQUESTS: usize = 64;
/// The most credit a server can give for one answer, pieces.
const MOST_CREDIT: usize = 4096;
/// Beats that are not answered yet; of more, the oldest are given up.
const MOST_BEATS: usize = 16;

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The agent dropped its end.
    Dropped,
    /// The server ended it, or the connection broke.
    Ended(Status),
    /// The server sent what no server sends.
    Wrong(String),
}

/// The two streams of a session.
pub(crate) struct Wire {
    out: mpsc::Sender<pb::FromAgent>,
    inbound: Streaming<pb::ToAgent>,
}

/// What a session is about to pass on.
pub(crate) struct Pump {
    /// Short messages, sent before anything else.
    control: VecDeque<Up>,
    reports: Pending<UnitReport>,
    released: BTreeMap<UnitName, Revision>,
    parts: Option<Parts<UnitReport>>,
    /// The next piece of an answer.
    piece: Option<Up>,
    units: Pending<Instruction>,
    assembler: Assembler<Instruction>,
    /// Not yet taken by the agent.
    requests: VecDeque<Request>,
    /// Answers under way.
    answers: HashMap<u64, Answer>,
    answerers: JoinSet<()>,
    beats: BTreeMap<u64, oneshot::Sender<Held>>,
    beaten: u64,
    /// Where it is told where all servers are.
    servers: watch::Sender<Vec<Address>>,
    pieces: mpsc::Sender<(u64, Option<Chunk>)>,
    pieces_out: Option<mpsc::Receiver<(u64, Option<Chunk>)>>,
}

#[derive(Debug)]
struct Answer {
    credit: Arc<Semaphore>,
    task: AbortHandle,
}

impl Pump {
    /// Begins a session: done when the server has welcomed us.
    pub(crate) async fn begin(connection: &mut Connection, hello: Hello) -> Result<(Pump, Wire), DialError> {
        let (out, outbound) = mpsc::channel(1);
        let hello = Up::Hello { hello, oldest: OLDEST_PROTOCOL, newest: NEWEST_PROTOCOL };
        if out.try_send(hello.encode()).is_err() {
            return Err(DialError::wrong(connection.address(), &"no room for the first message"));
        }
        let called = timeout(CALL_DEADLINE, connection.client.session(ReceiverStream::new(outbound))).await;
        let mut inbound = connection.answered(called)?.into_inner();
        let first = timeout(CALL_DEADLINE, inbound.message()).await;
        let Some(first) = connection.answered(first)? else {
            return Err(DialError::new(
                connection.address(),
                Trouble::Soon,
                "the server has ended the session",
            ));
        };
        match Down::decode(first) {
            Ok(Down::Welcome { .. }) => {}
            Ok(_) => return Err(DialError::wrong(connection.address(), &"its first message is no welcome")),
            Err(error) => return Err(DialError::wrong(connection.address(), &error)),
        }
        let (pieces, pieces_out) = mpsc::channel(1);
        let pump = Pump {
            control: VecDeque::new(),
            reports: Pending::default(),
            released: BTreeMap::new(),
            parts: None,
            piece: None,
            units: Pending::default(),
            assembler: Assembler::new(MAX_UNITS),
            requests: VecDeque::new(),
            answers: HashMap::new(),
            answerers: JoinSet::new(),
            beats: BTreeMap::new(),
            beaten: 0,
            servers: watch::Sender::default(),
            pieces,
            pieces_out: Some(pieces_out),
        };
        Ok((pump, Wire { out, inbound }))
    }

    /// What it is told of servers goes there.
    pub(crate) fn telling(self, servers: watch::Sender<Vec<Address>>) -> Self {
        Pump { servers, ..self }
    }

    pub(crate) async fn pass(
        &mut self,
        wire: Wire,
        mut from_agent: mpsc::Receiver<FromAgent>,
        to_agent: mpsc::Sender<ToAgent>,
        mut beats: mpsc::Receiver<Beat>,
    ) -> End {
        let Wire { out, mut inbound } = wire;
        let Some(mut pieces) = self.pieces_out.take() else { return End::Dropped };
        let mut beating = true;
        loop {
            tokio::select! {
                () = to_agent.closed() => return End::Dropped,
                message = inbound.message() => match message {
                    Ok(Some(message)) => if let Err(problem) = self.take(message) { return End::Wrong(problem) },
                    Ok(None) => return End::Ended(Status::ok("")),
                    Err(status) => return End::Ended(status),
                },
                message = from_agent.recv() => match message {
                    Some(FromAgent::Snapshot(all)) => {
                        // The rest of an older one would be told for nothing.
                        self.parts = None;
                        self.reports.push(Update::Snapshot(all));
                    }
                    Some(FromAgent::Changes(changes)) => self.reports.push(Update::Changes(changes)),
                    Some(FromAgent::Released(units)) => self.released.extend(units),
                    None => return End::Dropped,
                },
                beat = beats.recv(), if beating => match beat {
                    Some(beat) => self.beat(beat),
                    None => beating = false,
                },
                permit = to_agent.reserve(), if !self.requests.is_empty() || !self.units.is_empty() => {
                    let Ok(permit) = permit else { return End::Dropped };
                    if let Some(message) = self.next_for_agent() {
                        permit.send(message);
                    }
                },
                Some((number, piece)) = pieces.recv(), if self.piece.is_none() => {
                    if matches!(piece, None | Some(Chunk::Exit(_) | Chunk::Failed(_))) {
                        self.answers.remove(&number);
                    }
                    self.piece = Some(Up::Answer { number, piece });
                },
                permit = out.reserve(), if self.has_output() => {
                    let Ok(permit) = permit else {
                        // The server has closed the stream; its last words say why.
                        return match inbound.message().await {
                            Err(status) => End::Ended(status),
                            Ok(_) => End::Ended(Status::ok("")),
                        };
                    };
                    if let Some(message) = self.next_output() {
                        permit.send(message.encode());
                    }
                },
            }
        }
    }

    fn has_output(&self) -> bool {
        !self.control.is_empty()
            || self.parts.is_some()
            || !self.reports.is_empty()
            || !self.released.is_empty()
            || self.piece.is_some()
    }

    /// Reports go before answers: they are short, and the cluster waits for them.
    fn next_output(&mut self) -> Option<Up> {
        if let Some(control) = self.control.pop_front() {
            return Some(control);
        }
        if self.parts.is_none() {
            self.parts = self.reports.take().map(Parts::of);
        }
        if self.parts.is_none() && !self.released.is_empty() {
            let more = self.released.keys().nth(MOST_RELEASED).cloned();
            let rest = more.map(|from| self.released.split_off(&from)).unwrap_or_default();
            return Some(Up::Released(std::mem::replace(&mut self.released, rest).into_iter().collect()));
        }
        let Some(parts) = &mut self.parts else { return self.piece.take() };
        let (part, last) = parts.next(PART_UP, report_size);
        if last {
            self.parts = None;
        }
        Some(Up::Reports(part))
    }

    fn next_for_agent(&mut self) -> Option<ToAgent> {
        match self.units.take() {
            Some(Update::Snapshot(all)) => Some(ToAgent::Snapshot(all)),
            Some(Update::Changes(changes)) => Some(ToAgent::Changes(changes)),
            None => self.requests.pop_front().map(|request| ToAgent::Request(Box::new(request))),
        }
    }

    fn beat(&mut self, Beat { leaving, held }: Beat) {
        self.beaten += 1;
        self.beats.insert(self.beaten, held);
        if self.beats.len() > MOST_BEATS {
            self.beats.pop_first();
        }
        self.control.push_back(Up::Beat { number: self.beaten, leaving });
    }

    /// What the server has sent.
    fn take(&mut self, message: pb::ToAgent) -> Result<(), String> {
        match Down::decode(message).map_err(|error: WireError| error.to_string())? {
            Down::Welcome { .. } => return Err("a second welcome".to_owned()),
            Down::Units(part) => {
                if let Some(update) = self.assembler.push(part).map_err(|error| format!("units: {error}"))? {
                    self.units.push(update);
                }
            }
            Down::Held { number, ttl } => {
                if let Some(held) = self.beats.remove(&number) {
                    let _ = held.send(Held { ttl, told: self.units.is_empty() });
                }
                // Answers come in order: older beats get none any more.
                self.beats = self.beats.split_off(&number);
            }
            Down::Request { number, credit, ask } => {
                while self.answerers.try_join_next().is_some() {}
                if self.answers.len() >= MOST_REQUESTS || self.answers.contains_key(&number) {
                    return Err("request: too many, or one number twice".to_owned());
                }
                let credit = Arc::new(Semaphore::new((credit as usize).min(MOST_CREDIT)));
                let (answer, chunks) = mpsc::channel(4);
                let task = self.answerers.spawn(reply(number, chunks, credit.clone(), self.pieces.clone()));
                self.answers.insert(number, Answer { credit, task });
                self.requests.push_back(Request { ask, answer });
            }
            Down::Credit { number, pieces } => {
                if let Some(answer) = self.answers.get(&number) {
                    let room = MOST_CREDIT.saturating_sub(answer.credit.available_permits());
                    answer.credit.add_permits((pieces as usize).min(room));
                }
            }
            Down::Cancel(number) => {
                if let Some(answer) = self.answers.remove(&number) {
                    // Who makes the answer sees that nobody takes it.
                    answer.task.abort();
                }
                self.requests.retain(|request| !request.answer.is_closed());
            }
            Down::Probe(number) => self.control.push_back(Up::Probed(number)),
            Down::Servers(servers) => {
                self.servers.send_if_modified(|known| {
                    let changed = *known != servers;
                    *known = servers;
                    changed
                });
            }
        }
        Ok(())
    }
}

/// Brings an answer to the session as fast as there is credit for it.
async fn reply(
    number: u64,
    mut chunks: mpsc::Receiver<Chunk>,
    credit: Arc<Semaphore>,
    out: mpsc::Sender<(u64, Option<Chunk>)>,
) {
    while let Some(chunk) = chunks.recv().await {
        let last = matches!(chunk, Chunk::Exit(_) | Chunk::Failed(_));
        for piece in pieces(chunk) {
            let Ok(permit) = credit.acquire().await else { return };
            permit.forget();
            if out.send((number, Some(piece))).await.is_err() {
                return;
            }
        }
        if last {
            return;
        }
    }
    let _ = out.send((number, None)).await;
}
