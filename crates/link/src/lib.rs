//! What agents and servers say to each other, whatever carries it.
//!
//! A session is one agent's live connection to a server. After the agent's [`Hello`] the server sends
//! one [`ToAgent::Snapshot`] and then only changes; the agent sends what changed on its machine. Requests for
//! status and journal go to the agent and are answered in streams with back-pressure of their own, so that
//! a slow reader holds up nothing else. Here the carrier is a pair of channels in one process ([`local`]).
use bytes::Bytes;
use fleet_cluster::model::*;
use fleet_unit::UnitName;
use std::collections::BTreeMap;
use tokio::sync::mpsc;

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
    Snapshot(BTreeMap<UnitName, Wanted>),
    /// What changed of it; `None`: no longer to be held.
    Changes(BTreeMap<UnitName, Option<Wanted>>),
    /// A question to be answered from the machine itself.
    Request(Request),
}

/// What an agent sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// All reports of the machine; replaces all before.
    Snapshot(BTreeMap<UnitName, UnitReport>),
    /// What changed; `None`: nothing of the unit is left on the machine.
    Changes(BTreeMap<UnitName, Option<UnitReport>>),
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

/// The server's end of a session.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct ServerEnd {
    pub hello: Hello,
    pub send: mpsc::Sender<ToAgent>,
    pub receive: mpsc::Receiver<FromAgent>,
}

/// The agent's end of a session.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct AgentEnd {
    pub send: mpsc::Sender<FromAgent>,
    pub receive: mpsc::Receiver<ToAgent>,
}

/// A session within one process.
pub fn local(hello: Hello) -> (ServerEnd, AgentEnd) {
    let (down, from_server) = mpsc::channel(64);
    let (up, from_agent) = mpsc::channel(64);
    (ServerEnd { hello, send: down, receive: from_agent }, AgentEnd { send: up, receive: from_server })
}
