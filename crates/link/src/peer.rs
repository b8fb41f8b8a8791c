//! What servers of one cluster ask each other, each on a connection of its own to the other's port.
//!
//! Any server answers for the whole cluster, but a machine has its session with one of them, and only the leader's engine knows what it
//! holds up. So a server asks the one that can tell:
//!
//! - [`PeerDialer::ask`]: a machine, of the server that has its session. That server asks the machine, and nobody else: nothing is passed on
//!   twice.
//! - [`PeerDialer::follow`]: what the leader's engine lets everybody know. It is told when it changes: an idle cluster says nothing.
//! - [`PeerDialer::stand`]: how a server is.
//!
//! Who asks shows a server's certificate, which it signs itself: whoever holds the CA's key is a server. The answer of a machine is paced by
//! its reader all the way: who does not read fills the window of that one connection, and then the machine stops.
//!
//! Other requests to machines need nothing here: whatever an [`Ask`] can be is passed on.

use crate::ca::Authority;
use crate::dial::Address;
use crate::dial::connection::{CALL_DEADLINE, Connection, DialError};
use crate::wire::generated as pb;
use crate::wire::peer::{decode_answer, decode_news, decode_standing, encode_peer_ask};
use crate::{Ask, Chunk, KeepAlive, tls};
use fleet_cluster::engine::Delay;
use fleet_cluster::model::{MachineId, Revision};
use fleet_unit::UnitName;
use futures_util::{future::BoxFuture, stream::BoxStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::{Code, Streaming};

/// How much of an answer may be under way to a reader that does not read, bytes.
const WINDOW: u32 = 128 << 10;

/// What of the leader's engine is news.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Whatever was told before is over.
    pub anew: bool,
    /// New ones, or with other words.
    pub notices: Vec<Notice>,
    /// The IDs of notices that are over.
    pub over: Vec<String>,
    /// Units that fit somewhere and are not placed there yet; `None`: no longer so.
    pub delays: Vec<(UnitName, Option<Delay>)>,
}

/// What operators should know of the cluster as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Its kind.
    pub id: String,
    /// Since when, seconds since 1970.
    pub since: i64,
    /// In words.
    pub text: String,
}

/// How a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The revision of its view.
    pub revision: Revision,
    /// How long ago it last reached the registry; `None`: never.
    pub reached: Option<Duration>,
}

/// Why a server does not do what another asks of it, in words for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefusal {
    /// It has no session with the machine, or does not lead.
    #[error("{0}")]
    NotHere(String),
    /// It can't now.
    #[error("{0}")]
    NotNow(String),
}

/// What a server does for others. None of it may ask another server in turn.
pub trait PeerService: Send + Sync + 'static {
    /// Asks a machine that has its session here.
    fn ask(
        &self,
        machine: MachineId,
        ask: Ask,
    ) -> BoxFuture<'static, Result<mpsc::Receiver<Chunk>, PeerRefusal>>;

    /// What this server's engine lets everybody know, for as long as it leads; what is told first is everything.
    fn follow(&self) -> Result<BoxStream<'static, News>, PeerRefusal>;

    /// How this server is.
    fn stand(&self) -> Standing;
}

/// Why another server did not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It can't be reached, or the connection broke.
    #[error("{0}")]
    Unreachable(String),
    /// It has no session with the machine, or does not lead.
    #[error("{0}")]
    NotHere(String),
    /// It said no for another reason.
    #[error("{0}")]
    Refused(String),
}

impl From<DialError> for PeerError {
    fn from(error: DialError) -> Self {
        PeerError::Unreachable(error.problem().to_owned())
    }
}

/// Asks other servers, as one of them.
#[derive(Clone, Debug)]
pub struct PeerDialer {
    authority: Arc<Authority>,
    server: MachineId,
    keep_alive: KeepAlive,
}

impl PeerDialer {
    /// For the server on this machine.
    pub fn new(authority: Arc<Authority>, server: MachineId, keep_alive: KeepAlive) -> Self {
        PeerDialer { authority, server, keep_alive }
    }

    async fn connect(&self, address: &Address) -> Result<Connection, PeerError> {
        let identity = self.authority.peer(&self.server, SystemTime::now());
        let identity = identity.map_err(|error| PeerError::Refused(error.to_string()))?;
        let config = tls::peer(self.authority.root(), identity);
        let config = config.map_err(|error| PeerError::Refused(error.to_string()))?;
        Ok(Connection::open_with(address, config, self.keep_alive, WINDOW).await?)
    }

    /// Asks a machine that has its session with the server there.
    pub async fn ask(
        &self,
        address: &Address,
        machine: &MachineId,
        ask: Ask,
    ) -> Result<PeerAnswer, PeerError> {
        let connection = self.connect(address).await?;
        let mut client = connection.peers();
        let called = timeout(CALL_DEADLINE, client.ask(encode_peer_ask(machine, ask))).await;
        let pieces = answered(&connection, called)?.into_inner();
        Ok(PeerAnswer { pieces: Some(pieces), connection })
    }

    /// Follows what the engine of the leader, which is there, lets everybody know.
    pub async fn follow(&self, address: &Address) -> Result<PeerNews, PeerError> {
        let connection = self.connect(address).await?;
        let mut client = connection.peers();
        let called = timeout(CALL_DEADLINE, client.follow(pb::FollowRequest {})).await;
        let news = answered(&connection, called)?.into_inner();
        Ok(PeerNews { news, connection })
    }

    /// How the server there is.
    pub async fn stand(&self, address: &Address) -> Result<Standing, PeerError> {
        let connection = self.connect(address).await?;
        let mut client = connection.peers();
        let called = timeout(CALL_DEADLINE, client.stand(pb::StandRequest {})).await;
        Ok(decode_standing(answered(&connection, called)?.into_inner()))
    }
}

fn answered<T>(
    connection: &Connection,
    answer: Result<Result<T, tonic::Status>, tokio::time::error::Elapsed>,
) -> Result<T, PeerError> {
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(failed(connection, &status)),
        Err(_) => Err(PeerError::Unreachable("it does not answer".to_owned())),
    }
}

fn failed(connection: &Connection, status: &tonic::Status) -> PeerError {
    let reason = connection.reason(status);
    match status.code() {
        _ if connection.broke() => PeerError::Unreachable(reason),
        Code::NotFound => PeerError::NotHere(reason),
        Code::Unimplemented => PeerError::Refused("it is of a version that can't be asked".to_owned()),
        Code::Unknown | Code::Cancelled => PeerError::Unreachable(reason),
        _ => PeerError::Refused(reason),
    }
}

/// The answer of a machine through another server. Dropping it ends the work there.
#[derive(Debug)]
pub struct PeerAnswer {
    /// `None` after the last.
    pieces: Option<Streaming<pb::Answer>>,
    /// Carries it.
    connection: Connection,
}

impl PeerAnswer {
    /// The next piece; `None`: the end, or that it was cut off there. When the connection with the other server breaks, the last piece says
    /// so. Safe to cancel.
    pub async fn recv(&mut self) -> Option<Chunk> {
        let pieces = self.pieces.as_mut()?;
        let chunk = match pieces.message().await {
            Ok(Some(message)) => match decode_answer(message) {
                Ok(chunk) => chunk,
                Err(error) => Some(Chunk::Failed(format!("its server sent a wrong message: {error}"))),
            },
            Ok(None) => None,
            Err(status) => {
                let (address, reason) = (self.connection.address(), self.connection.reason(&status));
                Some(Chunk::Failed(format!("the connection with its server at {address} was lost: {reason}")))
            }
        };
        if matches!(chunk, None | Some(Chunk::Exit(_) | Chunk::Failed(_))) {
            self.pieces = None;
        }
        chunk
    }
}

/// What the leader lets everybody know.
#[derive(Debug)]
pub struct PeerNews {
    news: Streaming<pb::News>,
    connection: Connection,
}

impl PeerNews {
    /// The next news; an error when there is no more. Safe to cancel.
    pub async fn next(&mut self) -> Result<News, PeerError> {
        match self.news.message().await {
            Ok(Some(news)) => {
                decode_news(news).map_err(|error| PeerError::Refused(format!("a wrong message: {error}")))
            }
            Ok(None) => Err(PeerError::NotHere("it does not lead any more".to_owned())),
            Err(status) => Err(failed(&self.connection, &status)),
        }
    }
}
