//! Sessions between agents and servers on different machines: what each side has put in, underway to the other.
//!
//! A session is a connection: nothing in it is lost, doubled or put in another order, but it may take long, stand still in one
//! direction, and break, each side finding that out at another time. Loss and repetition show as a session
//! that breaks and another that begins with a snapshot, maybe at another server while the older one is still believed in.

use crate::Mutation;
use crate::process::Time;
use crate::rng::Rng;
use fleet_cluster::model::{Revision, UnitReport};
use fleet_link::{AgentEnd, Beat, FromAgent, Held, Hello, Instruction, ServerEnd, ToAgent};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Messages under way in one direction; more wait at the sender.
const ROOM: usize = 64;
/// As many beats as in [`fleet_link::local`].
const BEATS: usize = 4;
/// After this time without the other side a connection is given up: silence, and a ping that is not answered.
const SILENCE: Duration = Duration::from_secs(10);

enum Up {
    Report(FromAgent),
    /// Whether it is the last one; the answer; when it was sent.
    Beat(bool, oneshot::Sender<Held>, Time),
}

enum Down {
    Told(ToAgent),
    Held(Held, oneshot::Sender<Held>, Time),
}

struct AgentSide {
    out: mpsc::Receiver<FromAgent>,
    beats: mpsc::Receiver<Beat>,
    inbox: mpsc::Sender<ToAgent>,
}

struct ServerSide {
    out: mpsc::Receiver<ToAgent>,
    beats: mpsc::Sender<Beat>,
    inbox: mpsc::Sender<FromAgent>,
}

/// How a way between two hosts is now, from agent to server and back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) up: bool,
    pub(crate) down: bool,
    /// Both processes are there and not paused.
    pub(crate) answered: bool,
    /// How long a message takes, milliseconds.
    pub(crate) delay: (u64, u64),
}

/// What passed, for those who check and trace.
#[derive(Debug)]
pub(crate) enum Passed {
    /// An answer to a beat that was sent then reached the agent.
    Renewed { sent: Time, ttl: Duration },
    /// The agent was told something.
    Told(String),
    /// The agent reported something.
    Reported(String),
}

/// Where an agent connects from.
fn peer(agent: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, u8::try_from(agent).unwrap_or(u8::MAX)], 1024))
}

/// One session.
pub(crate) struct Session {
    pub(crate) agent: usize,
    pub(crate) server: usize,
    agent_side: Option<AgentSide>,
    server_side: Option<ServerSide>,
    up: VecDeque<(Time, Up)>,
    down: VecDeque<(Time, Down)>,
    /// Beats that the server has not answered, with the agent's side of the answer and when they were sent.
    asked: Vec<(oneshot::Receiver<Held>, oneshot::Sender<Held>, Time)>,
    heard: Time,
    /// One side lost its power: nobody speaks for it any more, even when it is back.
    dead: bool,
    /// When either side gives up what is silent.
    agent_patience: Duration,
    server_patience: Duration,
    /// The agent is of the version before that in which agents say when units have stopped: it is not asked, and does not say it.
    pub(crate) older: bool,
    /// Deliberate mistakes, and the TTL of the machine's presence for one of them.
    pub(crate) mutation: Option<(Mutation, Duration)>,
}

impl Session {
    /// A new session, and its two ends.
    pub(crate) fn new(
        agent: usize,
        server: usize,
        hello: Hello,
        now: Time,
        rng: &mut Rng,
    ) -> (Session, AgentEnd, ServerEnd) {
        let (agent_send, agent_out) = mpsc::channel(ROOM);
        let (agent_in, agent_receive) = mpsc::channel(ROOM);
        let (agent_beat, agent_beats) = mpsc::channel(BEATS);
        let (server_send, server_out) = mpsc::channel(ROOM);
        let (server_in, server_receive) = mpsc::channel(ROOM);
        let (server_beat, server_beats) = mpsc::channel(BEATS);
        let session = Session {
            agent,
            server,
            agent_side: Some(AgentSide { out: agent_out, beats: agent_beats, inbox: agent_in }),
            server_side: Some(ServerSide { out: server_out, beats: server_beat, inbox: server_in }),
            up: VecDeque::new(),
            down: VecDeque::new(),
            asked: Vec::new(),
            heard: now,
            dead: false,
            agent_patience: SILENCE + rng.millis(0, 1_000),
            server_patience: SILENCE + rng.millis(0, 5_000),
            older: false,
            mutation: None,
        };
        let agent_end = AgentEnd { send: agent_send, receive: agent_receive, beats: agent_beat };
        let server_end = ServerEnd {
            peer: Some(peer(agent)),
            hello,
            send: server_send,
            receive: server_receive,
            beats: server_beats,
        };
        (session, agent_end, server_end)
    }

    /// Whether the agent still has it.
    pub(crate) fn has_agent(&self) -> bool {
        self.agent_side.is_some()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.agent_side.is_none() && self.server_side.is_none()
    }

    /// One side lost its power.
    pub(crate) fn kill(&mut self) {
        self.dead = true;
    }

    /// The connection broke: what is under way is lost, and the sides that are named know it.
    pub(crate) fn reset(&mut self, agent: bool, server: bool) {
        self.kill();
        self.up.clear();
        self.down.clear();
        if agent {
            self.break_agent();
        }
        if server {
            self.break_server();
        }
    }

    /// The agent's side finds it broken.
    pub(crate) fn break_agent(&mut self) {
        self.agent_side = None;
        self.down.clear();
        self.asked.clear();
    }

    /// The server's side finds it broken.
    pub(crate) fn break_server(&mut self) {
        self.server_side = None;
        self.up.clear();
        self.asked.clear();
    }

    /// When the next message arrives.
    pub(crate) fn next(&self) -> Option<Time> {
        let up = self.up.front().map(|(at, _)| *at);
        let down = self.down.front().map(|(at, _)| *at);
        [up, down].into_iter().flatten().min()
    }

    /// Takes up what both sides have said, and brings what is due.
    pub(crate) fn pass(&mut self, now: Time, mut way: Way, rng: &mut Rng) -> Vec<Passed> {
        let mut passed = Vec::new();
        way.answered &= !self.dead;
        if way.up && way.down && way.answered {
            self.heard = now;
        }
        let silent = now.saturating_sub(self.heard);
        if silent > self.agent_patience && self.agent_side.is_some() {
            self.break_agent();
        }
        if silent > self.server_patience && self.server_side.is_some() {
            self.break_server();
        }
        self.collect(now, way, rng);
        if way.up && way.answered {
            self.deliver_up(now, &mut passed);
        }
        if way.down && way.answered {
            self.deliver_down(now, &mut passed);
        }
        // Who has given a connection up says so, if that can be heard.
        if way.down && way.answered && self.server_side.is_none() && self.down.is_empty() {
            self.break_agent();
        }
        if way.up && way.answered && self.agent_side.is_none() && self.up.is_empty() {
            self.break_server();
        }
        passed
    }

    fn collect(&mut self, now: Time, way: Way, rng: &mut Rng) {
        let mut after = |last: Option<Time>| {
            let delay = if rng.chance(0.02) { way.delay.1 * 5 } else { way.delay.1 };
            (now + rng.spread(way.delay.0, delay)).max(last.unwrap_or_default())
        };
        if let Some(side) = &mut self.agent_side {
            while self.up.len() < ROOM {
                match side.out.try_recv() {
                    Ok(report) => {
                        self.up.push_back((after(self.up.back().map(|(at, _)| *at)), Up::Report(report)))
                    }
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => {
                        // What it said before, its farewell above all, still arrives.
                        if self.up.is_empty() {
                            self.break_server();
                            return self.break_agent();
                        }
                        break;
                    }
                }
            }
            while let Ok(beat) = side.beats.try_recv() {
                let at = after(self.up.back().map(|(at, _)| *at));
                self.up.push_back((at, Up::Beat(beat.leaving, beat.held, now)));
            }
        }
        let Some(side) = &mut self.server_side else { return };
        let mut over = false;
        while self.down.len() < ROOM {
            match side.out.try_recv() {
                Ok(told) => {
                    self.down.push_back((after(self.down.back().map(|(at, _)| *at)), Down::Told(told)))
                }
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    over = self.down.is_empty();
                    break;
                }
            }
        }
        let mut waiting = Vec::new();
        for (mut answer, held, sent) in std::mem::take(&mut self.asked) {
            match answer.try_recv() {
                Ok(answer) => {
                    let at = after(self.down.back().map(|(at, _)| *at));
                    self.down.push_back((at, Down::Held(answer, held, sent)));
                }
                Err(oneshot::error::TryRecvError::Empty) => waiting.push((answer, held, sent)),
                // Dropped unanswered: it says nothing, and neither does the connection.
                Err(oneshot::error::TryRecvError::Closed) => {}
            }
        }
        self.asked = waiting;
        if over {
            self.break_server();
            self.break_agent();
        }
    }

    fn deliver_up(&mut self, now: Time, passed: &mut Vec<Passed>) {
        let Some(side) = &self.server_side else { return };
        while let Some((at, message)) = self.up.pop_front() {
            if at > now {
                return self.up.push_front((at, message));
            }
            match message {
                Up::Report(FromAgent::Released(_)) if self.older => {}
                Up::Report(report) => {
                    let text = reported(&report);
                    match side.inbox.try_send(report) {
                        Ok(()) => passed.push(Passed::Reported(text)),
                        Err(mpsc::error::TrySendError::Full(report)) => {
                            return self.up.push_front((at, Up::Report(report)));
                        }
                        Err(mpsc::error::TrySendError::Closed(_)) => {}
                    }
                }
                Up::Beat(leaving, held, sent) => {
                    let (answer, answered) = oneshot::channel();
                    let early = |(mutation, _): &(_, _)| *mutation == Mutation::EarlyAnswer && !leaving;
                    if let Some((_, ttl)) = self.mutation.filter(early) {
                        self.down.push_back((now, Down::Held(Held::during(ttl), held, sent)));
                        // Nobody waits for it any more.
                        let _ = side.beats.try_send(Beat { leaving, held: answer });
                        continue;
                    }
                    if side.beats.try_send(Beat { leaving, held: answer }).is_ok() {
                        self.asked.push((answered, held, sent));
                    }
                }
            }
        }
    }

    fn deliver_down(&mut self, now: Time, passed: &mut Vec<Passed>) {
        let Some(side) = &self.agent_side else { return };
        while let Some((at, message)) = self.down.pop_front() {
            if at > now {
                return self.down.push_front((at, message));
            }
            match message {
                Down::Told(mut told) => {
                    if let (ToAgent::Snapshot(all), Some((Mutation::EmptySnapshot, _))) =
                        (&mut told, self.mutation)
                    {
                        *all = BTreeMap::new();
                    }
                    if self.older {
                        ask_no_release(&mut told);
                    }
                    if self.mutation.is_some_and(|(mutation, _)| mutation == Mutation::EarlyRelease) {
                        let early = released(&told);
                        if !early.is_empty() {
                            self.up.push_back((now, Up::Report(FromAgent::Released(early))));
                        }
                    }
                    let text = told_text(&told);
                    match side.inbox.try_send(told) {
                        Ok(()) => passed.push(Passed::Told(text)),
                        Err(mpsc::error::TrySendError::Full(told)) => {
                            return self.down.push_front((at, Down::Told(told)));
                        }
                        Err(mpsc::error::TrySendError::Closed(_)) => {}
                    }
                }
                Down::Held(held, answer, sent) => {
                    if answer.send(held).is_ok() {
                        passed.push(Passed::Renewed { sent, ttl: held.ttl });
                    }
                }
            }
        }
    }
}

fn reported(report: &FromAgent) -> String {
    let one = |report: &UnitReport| {
        let problem = report.problem.as_deref().unwrap_or_default();
        format!("{:?} {} {} {problem}", report.current, report.hash.short(), report.systemd.active)
    };
    let units: Vec<_> = match report {
        FromAgent::Released(units) => units.iter().map(|(name, number)| format!("{name} {number}")).collect(),
        FromAgent::Snapshot(all) => {
            all.iter().map(|(name, report)| format!("{name} {}", one(report))).collect()
        }
        FromAgent::Changes(changes) => {
            let change = |(name, report): (&UnitName, &Option<UnitReport>)| match report {
                Some(report) => format!("{name} {}", one(report)),
                None => format!("{name} gone"),
            };
            changes.iter().map(change).collect()
        }
    };
    let kind = match report {
        FromAgent::Snapshot(_) => "all",
        FromAgent::Changes(_) => "changes",
        FromAgent::Released(_) => "released",
    };
    format!("{kind}: {}", units.join(", "))
}

/// Leaves out what an agent of an older version does not understand, as the server's end of a real session does.
fn ask_no_release(told: &mut ToAgent) {
    let asks = |instruction: &Instruction| matches!(instruction, Instruction::Release(_));
    match told {
        ToAgent::Snapshot(all) => all.retain(|_, instruction| !asks(instruction)),
        ToAgent::Changes(changes) => {
            for change in changes.values_mut() {
                change.take_if(|instruction| asks(instruction));
            }
        }
        ToAgent::Request(_) | ToAgent::Servers(_) => {}
    }
}

/// What an agent is asked to release.
fn released(told: &ToAgent) -> BTreeMap<UnitName, Revision> {
    let number = |(name, instruction): (&UnitName, &Instruction)| match instruction {
        Instruction::Release(number) => Some((name.clone(), *number)),
        _ => None,
    };
    match told {
        ToAgent::Snapshot(all) => all.iter().filter_map(number).collect(),
        ToAgent::Changes(changes) => {
            changes.iter().filter_map(|(name, change)| number((name, change.as_ref()?))).collect()
        }
        ToAgent::Request(_) | ToAgent::Servers(_) => BTreeMap::new(),
    }
}

fn told_text(told: &ToAgent) -> String {
    let one = |instruction: &Instruction| match instruction {
        Instruction::Hold(wanted) => format!("{:?} {}", wanted.state, wanted.file.hash().short()),
        other => format!("{other:?}"),
    };
    match told {
        ToAgent::Snapshot(all) => {
            let units: Vec<_> = all.iter().map(|(name, wanted)| format!("{name} {}", one(wanted))).collect();
            format!("all: {}", units.join(", "))
        }
        ToAgent::Changes(changes) => {
            let change = |(name, wanted): (&UnitName, &Option<Instruction>)| match wanted {
                Some(wanted) => format!("{name} {}", one(wanted)),
                None => format!("{name} no more"),
            };
            format!("changes: {}", changes.iter().map(change).collect::<Vec<_>>().join(", "))
        }
        ToAgent::Request(_) => "a question".to_owned(),
        ToAgent::Servers(_) => "servers".to_owned(),
    }
}
