//! What agents and servers say to each other, whatever carries it.
//!
//! A session is one agent's live connection to a server. After the agent's [`Hello`] the server sends
//! one [`ToAgent::Snapshot`] and then only changes; the agent sends what changed on its machine. Requests for
//! status and journal go to the agent and are answered in streams with back-pressure of their own, so that
//! a slow reader holds up nothing else. The carrier is a pair of channels in one process ([`local`]), or a
//! connection of the agent to the server: HTTP/2 over mutual TLS.
//!
//! | module | holds |
//! |---|---|
//! | [`ca`] | the cluster's certificate authority, keys and certificates |
//! | [`token`] | join tokens |
//! | [`user`] | names of users, for their certificates |
//! | [`serve`] | the server's side: lets machines join, hands out [`ServerEnd`]s, and leads users to the API |
//! | [`dial`] | the agent's side: joins, keeps connected, and hands out [`AgentEnd`]s |
//! | [`peer`] | what servers ask each other |
//!
//! What the security rests on is written down in docs/SECURITY.md; in short: on the CA's key, which only servers
//! hold; on the CA's fingerprint in the token, by which the first contact knows the cluster; and on the server
//! asking the registry at every session whether the machine, with this very key, is still of the cluster.
use bytes::Bytes;
use fleet_cluster::model::*;
use fleet_unit::UnitName;
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};
use tokio::sync::{mpsc, oneshot};

pub mod ca;
pub mod dial;
#[doc(hidden)]
pub mod fuzz;
mod keep_alive;
pub mod peer;
mod pending;
pub mod serve;
#[cfg(test)]
mod tests;
mod tls;
pub mod token;
pub mod user;
mod wire;

pub use keep_alive::KeepAlive;
pub use wire::{NEWEST_PROTOCOL, OLDEST_PROTOCOL};

/// The port of the session protocol.
pub const DEFAULT_PORT: u16 = 4919;

/// The first message of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Its machine.
    pub id: MachineId,
    /// What it says of it.
    pub machine: Machine,
}

/// What a server sends.
#[derive(Debug)]
pub enum ToAgent {
    /// All that the machine has to hold. Sent only by a server whose view is complete.
    Snapshot(BTreeMap<UnitName, Instruction>),
    /// What changed of it; `None`: no longer to be held.
    Changes(BTreeMap<UnitName, Option<Instruction>>),
    /// A question to be answered from the machine itself.
    Request(Box<Request>),
    /// Where all servers of the cluster are: for the carrier, which finds the next one when its own is gone. It does not reach the agent,
    /// nor an agent of an older version.
    Servers(Vec<dial::Address>),
}

/// What a server says of one unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Instruction {
    /// To be held so.
    Hold(Wanted),
    /// The server can't tell, since it can't read the unit's records: to be left as it is.
    Leave,
    /// Not to be held any more, and the server has to know when nothing of it runs: see [`FromAgent::Released`]. The number says which
    /// time this is.
    Release(Revision),
}

impl From<Wanted> for Instruction {
    fn from(wanted: Wanted) -> Self {
        Instruction::Hold(wanted)
    }
}

/// What an agent sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// All reports of the machine; replaces all before.
    Snapshot(BTreeMap<UnitName, UnitReport>),
    /// What changed; `None`: nothing of the unit is left on the machine.
    Changes(BTreeMap<UnitName, Option<UnitReport>>),
    /// Nothing of these units runs, nor will, since it was asked with this number ([`Instruction::Release`]) until something else is
    /// said of them. A report does not say that: it may have been under way when the unit was to be started.
    Released(BTreeMap<UnitName, Revision>),
}

/// A question to a machine. The answer is a stream; dropping its receiving end ends the work.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub ask: Ask,
    /// Where the answer goes.
    pub answer: mpsc::Sender<Chunk>,
}

/// What can be asked of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// `systemctl status`
    Status(UnitName),
    /// `journalctl`
    #[allow(missing_docs)]
    Journal { unit: UnitName, lines: u32, follow: bool, output: String },
}

/// A piece of an answer. The last one is `Exit` or `Failed`; a stream that ends without is cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Standard output of the command.
    Out(Bytes),
    /// Standard error of the command.
    Err(Bytes),
    /// The command ended with this code.
    Exit(i32),
    /// The command could not be run, in words for the user.
    Failed(String),
}

/// A sign of life of an agent, and the answer to it.
///
/// A machine's presence is to run from the last of them: the server renews it when it gets one, and answers when
/// that is committed. Whoever sent it at a time `t` and is answered `ttl` knows that its units are not placed
/// elsewhere before `t + ttl`. Dropping it unanswered says nothing.
#[derive(Debug)]
pub struct Beat {
    /// The machine gives up its presence: its units may be placed elsewhere at once.
    pub leaving: bool,
    /// The answer.
    pub held: oneshot::Sender<Held>,
}

/// The answer to a sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// For how long presence is held now; zero once it is given up.
    pub ttl: Duration,
    /// Whether all that the server has said before is in the agent's queue by now. A server answers only after it
    /// has told what was decided before; on the agent's side an answer may overtake that while the agent does not take it.
    pub told: bool,
}

impl Held {
    /// As a server answers.
    pub fn during(ttl: Duration) -> Self {
        Held { ttl, told: true }
    }
}

/// The server's end of a session. It ends when `receive` or all of `send` are dropped.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct ServerEnd {
    pub hello: Hello,
    /// Where the agent connects from; `None` within one process.
    pub peer: Option<SocketAddr>,
    pub send: mpsc::Sender<ToAgent>,
    pub receive: mpsc::Receiver<FromAgent>,
    pub beats: mpsc::Receiver<Beat>,
}

/// The agent's end of a session. It ends when `receive` or all of `send` are dropped.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct AgentEnd {
    pub send: mpsc::Sender<FromAgent>,
    pub receive: mpsc::Receiver<ToAgent>,
    pub beats: mpsc::Sender<Beat>,
}

/// A session within one process.
pub fn local(hello: Hello) -> (ServerEnd, AgentEnd) {
    let (down, from_server) = mpsc::channel(64);
    let (up, from_agent) = mpsc::channel(64);
    let (beat, beats) = mpsc::channel(BEATS);
    (
        ServerEnd { hello, peer: None, send: down, receive: from_agent, beats },
        AgentEnd { send: up, receive: from_server, beats: beat },
    )
}

/// Beats under way; with a server that takes longer than that for one, more of them tell nothing.
const BEATS: usize = 4;
