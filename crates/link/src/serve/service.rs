//! The three calls, of one connection.

use super::session::{Pump, State};
use super::{Joining, Member, Membership, Peer, Phase, Refusal, Shared, lock};
use crate::ca::PublicKey;
use crate::token::{TokenId, TokenSecret};
use crate::wire::generated::{self as pb, link_server::Link};
use crate::wire::{Up, agree};
use crate::{BEATS, Hello, ServerEnd};
use fleet_cluster::model::MachineId;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::codegen::tokio_stream::{StreamExt, adapters::Map, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};
use zeroize::Zeroize;

/// The calls as one connection has them.
pub(super) struct Service<M> {
    pub(super) shared: Arc<Shared<M>>,
    pub(super) peer: Peer,
    pub(super) phase: watch::Sender<Phase>,
    /// Until when the session may last: as long as the certificate it began with, or one that was renewed meanwhile.
    pub(super) expires: watch::Sender<Instant>,
}

/// What a session sends. Boxed on its way, since a queue has room for 32 of its items however few it takes.
pub(super) type Sent = Box<Result<pb::ToAgent, Status>>;

/// What a session sends, as tonic takes it.
pub(super) type Outbound = Map<ReceiverStream<Sent>, fn(Sent) -> Result<pb::ToAgent, Status>>;

/// The session a machine has now.
#[derive(Debug)]
pub(super) struct Live {
    /// Tells it from others of the same machine.
    number: u64,
    peer: SocketAddr,
    /// Asks its agent for a sign of life.
    probe: mpsc::Sender<oneshot::Sender<()>>,
    /// To end it.
    end: CancellationToken,
    /// Cancelled when it has ended.
    ended: CancellationToken,
}

/// The place of a session among the live ones; given back when dropped.
pub(super) struct LivePlace<M> {
    pub(super) shared: Arc<Shared<M>>,
    machine: MachineId,
    number: u64,
    pub(super) probes: mpsc::Receiver<oneshot::Sender<()>>,
    pub(super) end: CancellationToken,
    ended: CancellationToken,
}

impl<M> Drop for LivePlace<M> {
    fn drop(&mut self) {
        let mut live = lock(&self.shared.live);
        if live.get(&self.machine).is_some_and(|live| live.number == self.number) {
            live.remove(&self.machine);
        }
        self.ended.cancel();
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        let code = match refusal {
            Refusal::Token(_) => Code::Unauthenticated,
            Refusal::OtherKey(_) => Code::AlreadyExists,
            Refusal::Unknown(_) => Code::PermissionDenied,
            Refusal::NotNow(_) => Code::Unavailable,
        };
        Status::new(code, refusal.to_string())
    }
}

#[tonic::async_trait]
impl<M: Membership> Link for Service<M> {
    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::Certified>, Status> {
        self.logged(self.try_join(request.into_inner()).await)
    }

    async fn renew(&self, _: Request<pb::RenewRequest>) -> Result<Response<pb::Certified>, Status> {
        self.logged(self.try_renew().await)
    }

    type SessionStream = Outbound;

    async fn session(
        &self,
        request: Request<Streaming<pb::FromAgent>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.logged(self.try_session(request.into_inner()).await)
    }
}

impl<M: Membership> Service<M> {
    fn logged<T>(&self, result: Result<T, Status>) -> Result<Response<T>, Status> {
        if let Err(status) = &result {
            self.shared.refused(self.peer.address, status.message());
        }
        result.map(Response::new)
    }

    /// The answer of the membership, if it comes in time.
    async fn asked(&self, answer: impl Future<Output = Result<(), Refusal>>) -> Result<(), Status> {
        let answer = timeout(self.shared.options.limits.membership, answer).await;
        let late = |_| Refusal::NotNow("the registry does not answer".to_owned());
        Ok(answer.map_err(late).flatten()?)
    }

    fn sign(&self, key: &PublicKey, machine: &MachineId) -> Result<pb::Certified, Status> {
        let validity = self.shared.options.machine_validity;
        let certificate = self.shared.authority.sign_machine(key, machine, validity, SystemTime::now());
        let certificate = certificate.map_err(|error| Status::internal(error.to_string()))?;
        Ok(pb::Certified { certificate: certificate.to_vec() })
    }

    async fn try_join(&self, mut request: pb::JoinRequest) -> Result<pb::Certified, Status> {
        let secret = TokenSecret::from_bytes(&request.secret);
        request.secret.zeroize();
        let secret = secret.ok_or_else(|| Status::invalid_argument("secret: of a wrong length"))?;
        let token: TokenId =
            request.token.parse().map_err(|error| Status::invalid_argument(format!("token: {error}")))?;
        let machine = MachineId::parse(&request.machine)
            .map_err(|error| Status::invalid_argument(format!("machine: {error}")))?;
        let key = PublicKey::from_request(&request.request)
            .map_err(|error| Status::invalid_argument(format!("request: {error}")))?;
        let joining =
            Joining { token, secret, machine: machine.clone(), key: key.id(), peer: self.peer.address };
        self.asked(self.shared.membership.join(joining)).await?;
        self.sign(&key, &machine)
    }

    fn member(&self) -> Result<(Member, &PublicKey), Status> {
        let Some(certificate) = &self.peer.certificate else {
            return Err(Status::unauthenticated("it has no certificate; it can join with a token"));
        };
        let member = Member {
            machine: certificate.machine.clone(),
            key: certificate.key.id(),
            serial: certificate.serial.clone(),
            not_after: certificate.not_after,
            peer: self.peer.address,
        };
        Ok((member, &certificate.key))
    }

    async fn try_renew(&self) -> Result<pb::Certified, Status> {
        let (member, key) = self.member()?;
        self.asked(self.shared.membership.renew(&member)).await?;
        let renewed = self.sign(key, &member.machine)?;
        // It is the same key that this connection has proved to have, and the machine was just found to be of the cluster.
        self.expires.send_replace(Instant::now() + self.shared.options.machine_validity);
        Ok(renewed)
    }

    async fn try_session(&self, mut inbound: Streaming<pb::FromAgent>) -> Result<Outbound, Status> {
        let (member, _) = self.member()?;
        let Ok(validity) = member.not_after.duration_since(SystemTime::now()) else {
            return Err(Status::unauthenticated("its certificate has expired and has to be renewed first"));
        };
        if *self.phase.borrow() != Phase::Waiting {
            return Err(Status::failed_precondition("there was a session on this connection already"));
        }
        let hello = self.hello(&member, &mut inbound).await?;
        self.asked(self.shared.membership.admit(&member)).await?;
        let protocol = agree(hello.1, hello.2).map_err(Status::failed_precondition)?;
        let hello = hello.0;
        let place = self.take_place(&member.machine).await?;
        let (send, from_daemon) = mpsc::channel(16);
        let (to_daemon, receive) = mpsc::channel(16);
        let (beat, beats) = mpsc::channel(BEATS);
        let end = ServerEnd { hello, peer: Some(self.peer.address), send, receive, beats };
        let busy = |_| Status::unavailable("the server takes no more sessions now");
        self.shared.sessions.send_timeout(end, self.shared.options.limits.membership).await.map_err(busy)?;
        // Two at once on one connection: the later one finds the phase changed.
        let first =
            self.phase.send_if_modified(|phase| std::mem::replace(phase, Phase::Session) == Phase::Waiting);
        if !first {
            return Err(Status::failed_precondition("there was a session on this connection already"));
        }
        let (out, outbound) = mpsc::channel(1);
        self.expires.send_replace(Instant::now() + validity);
        let pump = Box::new(Pump {
            inbound,
            out,
            from_daemon,
            to_daemon,
            cancel: self.shared.cancel.clone(),
            place,
            expires: self.expires.subscribe(),
            stalled: self.shared.options.limits.stalled,
            state: State::new(protocol, beat),
        });
        let (phase, peer, machine) = (self.phase.clone(), self.peer.address, member.machine);
        self.shared.tasks.spawn(async move {
            pump.run(peer, machine).await;
            phase.send_replace(Phase::Over);
        });
        Ok(ReceiverStream::new(outbound).map(|message| *message))
    }

    /// The agent's first message, with the protocol numbers it speaks.
    async fn hello(
        &self,
        member: &Member,
        inbound: &mut Streaming<pb::FromAgent>,
    ) -> Result<(Hello, u32, u32), Status> {
        let first = timeout(self.shared.options.limits.handshake, inbound.message()).await;
        let late = |_| Status::deadline_exceeded("it began no session in time");
        let first = first.map_err(late)??;
        let first = first.ok_or_else(|| Status::invalid_argument("it ended the session before its hello"))?;
        let decoded = Up::decode(first).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let Up::Hello { hello, oldest, newest } = decoded else {
            return Err(Status::invalid_argument("its first message is no hello"));
        };
        if hello.id != member.machine {
            return Err(Status::permission_denied(format!(
                "it says to be machine {}, but its certificate is that of {}",
                hello.id, member.machine
            )));
        }
        Ok((hello, oldest, newest))
    }

    /// Makes this the machine's session. One that is there already is asked whether it lives: then there are two machines
    /// of the same ID and key, and the second is refused. Otherwise its connection was cut, and it is over now.
    async fn take_place(&self, machine: &MachineId) -> Result<LivePlace<M>, Status> {
        let limits = self.shared.options.limits;
        // More rounds are needed only when several new ones compete.
        for _ in 0..3 {
            let (old, ended) = {
                let mut live = lock(&self.shared.live);
                match live.get(machine) {
                    None => {
                        if live.len() >= limits.sessions {
                            return Err(Status::resource_exhausted("the server has too many sessions"));
                        }
                        let (place, entry) = self.new_place(machine);
                        live.insert(machine.clone(), entry);
                        return Ok(place);
                    }
                    Some(old) => ((old.probe.clone(), old.peer, old.end.clone()), old.ended.clone()),
                }
            };
            let (probe, peer, end) = old;
            let (answer, answered) = oneshot::channel();
            let lives = async { probe.send(answer).await.is_ok() && answered.await.is_ok() };
            if timeout(limits.probe, lives).await == Ok(true) {
                return Err(Status::already_exists(format!(
                    "machine {machine} has a session from {peer} already: two machines have the same \
                     /etc/machine-id and the same key of fleet; give one of them its own ID and let it join anew"
                )));
            }
            end.cancel();
            // It ends at once; if not, the next round finds it again.
            let _ = timeout(limits.probe, ended.cancelled()).await;
        }
        Err(Status::unavailable("the machine's former session does not end"))
    }

    fn new_place(&self, machine: &MachineId) -> (LivePlace<M>, Live) {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (probe, probes) = mpsc::channel(1);
        let (end, ended) = (CancellationToken::new(), CancellationToken::new());
        let place = LivePlace {
            shared: self.shared.clone(),
            machine: machine.clone(),
            number,
            probes,
            end: end.clone(),
            ended: ended.clone(),
        };
        (place, Live { number, peer: self.peer.address, probe, end, ended })
    }
}
