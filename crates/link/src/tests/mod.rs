//! Both sides against each other, over real TCP on this host.

mod attack;
mod join;
mod peers;
mod session;

use crate::ca::{Authority, Identity, KeyId, MACHINE_VALIDITY, MachineKey, PublicKey};
use crate::dial::{Address, Dialer, connection::Connection};
use crate::serve::{Joining, Limits, Member, Membership, Options, Refusal, serve};
use crate::token::{Terms, Token, TokenError, TokenId, TokenRecord};
use crate::*;
use fleet_unit::{Hash, UnitFile};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// No test waits longer for anything; none expects anything to be faster.
const DEADLINE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86_400);

/// Cuts are found out soon; and a busy machine is not taken for one that is cut off.
const QUICK: KeepAlive = KeepAlive { after: Duration::from_millis(200), deadline: Duration::from_secs(2) };
/// A limit that has to run out, and before which a busy machine does a handshake.
const SHORT: Duration = Duration::from_secs(2);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// The members of a cluster, in memory.
#[derive(Debug, Default)]
struct Members {
    tokens: Mutex<HashMap<TokenId, TokenRecord>>,
    machines: Mutex<HashMap<MachineId, KeyId>>,
    /// The certificates of the sessions that were let in, in order: their serial numbers.
    admitted: Mutex<Vec<String>>,
    /// The registry does not answer.
    hangs: AtomicBool,
}

impl Members {
    fn known(&self, member: &Member) -> Result<(), Refusal> {
        match self.machines.lock().unwrap().get(&member.machine) {
            Some(key) if *key == member.key => Ok(()),
            _ => Err(Refusal::Unknown(member.machine.clone())),
        }
    }
}

impl Membership for Members {
    async fn join(&self, joining: Joining) -> Result<(), Refusal> {
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let mut tokens = self.tokens.lock().unwrap();
        let record = tokens.get_mut(&joining.token).ok_or(TokenError::Wrong)?;
        record.check(&joining.secret, SystemTime::now())?;
        let mut machines = self.machines.lock().unwrap();
        match machines.get(&joining.machine) {
            Some(key) if *key == joining.key => return Ok(()),
            Some(_) => return Err(Refusal::OtherKey(joining.machine)),
            None => machines.insert(joining.machine, joining.key),
        };
        *record = record.used();
        Ok(())
    }

    async fn renew(&self, member: &Member) -> Result<(), Refusal> {
        self.known(member)
    }

    async fn admit(&self, member: &Member) -> Result<(), Refusal> {
        self.admitted.lock().unwrap().push(member.serial.clone());
        self.known(member)
    }
}

/// A server, and the registry behind it.
struct Rig {
    authority: Arc<Authority>,
    members: Arc<Members>,
    address: Address,
    ends: mpsc::Receiver<ServerEnd>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Rig {
    async fn new() -> Rig {
        Rig::with(Options::default()).await
    }

    async fn with(options: Options) -> Rig {
        let authority = Arc::new(Authority::create(SystemTime::now() - 100 * DAY).unwrap());
        Rig::of(authority, Arc::default(), options).await
    }

    /// One more server of the same cluster.
    async fn of(authority: Arc<Authority>, members: Arc<Members>, options: Options) -> Rig {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string().parse().unwrap();
        let (sessions, ends) = mpsc::channel(4);
        let cancel = CancellationToken::new();
        let served = serve(listener, authority.clone(), members.clone(), options, sessions, cancel.clone());
        let task = tokio::spawn(async move { served.await.unwrap() });
        Rig { authority, members, address, ends, cancel, task }
    }

    fn token(&self, uses: Option<u32>) -> Token {
        let terms = Terms { ttl: DAY, uses };
        let (token, record) =
            Token::create(self.authority.root().fingerprint(), &terms, SystemTime::now()).unwrap();
        self.members.tokens.lock().unwrap().insert(token.id, record);
        token
    }

    async fn join(&self, token: &Token, machine: &MachineId) -> Result<Identity, crate::dial::DialError> {
        let key = MachineKey::generate().unwrap();
        let addresses = [self.address.clone()];
        within("join", crate::dial::join(&addresses, token, machine, key, KeepAlive::default())).await
    }

    /// A machine that has joined so long ago.
    fn member(&self, number: u32, ago: Duration) -> Identity {
        self.known(identity(&self.authority, &machine(number), SystemTime::now() - ago))
    }

    /// Makes it one of a member.
    fn known(&self, identity: Identity) -> Identity {
        let says = identity.certificate();
        self.members.machines.lock().unwrap().insert(says.machine.clone(), says.key.id());
        identity
    }

    async fn next_end(&mut self) -> ServerEnd {
        within("a session at the server", self.ends.recv()).await.unwrap()
    }

    /// A session of a fresh machine.
    async fn session(&mut self, number: u32) -> (ServerEnd, Agent) {
        let identity = self.member(number, Duration::ZERO);
        let mut agent = Agent::new(vec![self.address.clone()], identity, KeepAlive::default());
        let end = self.next_end().await;
        agent.connect().await;
        (end, agent)
    }
}

/// A dialer at work.
struct Agent {
    end: Option<AgentEnd>,
    ends: mpsc::Receiver<AgentEnd>,
    identity: tokio::sync::watch::Receiver<Arc<Identity>>,
    /// The servers it was told of.
    servers: tokio::sync::watch::Receiver<Vec<Address>>,
    _task: JoinSet<()>,
}

impl Agent {
    fn new(addresses: Vec<Address>, identity: Identity, keep_alive: KeepAlive) -> Agent {
        let hello = hello(&identity.certificate().machine);
        Agent::of(Dialer::new(addresses, identity, hello, keep_alive, 1).unwrap())
    }

    fn of(dialer: Dialer) -> Agent {
        let (identity, servers) = (dialer.identity(), dialer.servers());
        let (sessions, ends) = mpsc::channel(1);
        let mut task = JoinSet::new();
        task.spawn(dialer.run(sessions, CancellationToken::new()));
        Agent { end: None, ends, identity, servers, _task: task }
    }

    async fn connect(&mut self) {
        self.end = within("a session at the agent", self.ends.recv()).await;
    }

    fn end(&mut self) -> &mut AgentEnd {
        self.end.as_mut().unwrap()
    }

    async fn receive(&mut self) -> Option<ToAgent> {
        within("a message from the server", self.end().receive.recv()).await
    }

    async fn send(&mut self, message: FromAgent) {
        within("room for a report", self.end().send.send(message)).await.unwrap();
    }
}

impl ServerEnd {
    async fn next(&mut self) -> Option<FromAgent> {
        within("a message from the agent", self.receive.recv()).await
    }

    async fn tell(&mut self, message: ToAgent) {
        within("room for a message", self.send.send(message)).await.unwrap();
    }

    async fn ask(&mut self, ask: Ask) -> mpsc::Receiver<Chunk> {
        let (answer, chunks) = mpsc::channel(16);
        self.tell(ToAgent::Request(Box::new(Request { ask, answer }))).await;
        chunks
    }
}

fn identity(authority: &Authority, machine: &MachineId, signed: SystemTime) -> Identity {
    identity_for(authority, machine, MACHINE_VALIDITY, signed)
}

fn identity_for(
    authority: &Authority,
    machine: &MachineId,
    validity: Duration,
    signed: SystemTime,
) -> Identity {
    let key = MachineKey::generate().unwrap();
    let public = PublicKey::from_request(&key.request().unwrap()).unwrap();
    let certificate = authority.sign_machine(&public, machine, validity, signed).unwrap();
    Identity::new(authority.root().clone(), certificate, key).unwrap()
}

fn copy(identity: &Identity) -> Identity {
    Identity::from_pem(&identity.root().to_pem(), &identity.certificate_pem(), &identity.key().to_pem())
        .unwrap()
}

fn machine(number: u32) -> MachineId {
    MachineId::parse(&format!("{number:032x}")).unwrap()
}

fn hello(id: &MachineId) -> Hello {
    let machine = Machine {
        public_ip: "10.0.0.1".to_owned(),
        metadata: [("region".to_owned(), "eu".to_owned())].into(),
        version: "2.0.0".to_owned(),
        ..Machine::default()
    };
    Hello { id: id.clone(), machine }
}

fn unit(name: &str) -> UnitName {
    UnitName::parse(name).unwrap()
}

fn wanted(command: &str) -> Instruction {
    let file = UnitFile::parse(&format!("[Service]\nExecStart={command}\n")).unwrap();
    Wanted { file, state: DesiredState::Launched }.into()
}

fn report(sub: &str) -> UnitReport {
    UnitReport {
        current: DesiredState::Launched,
        hash: Hash([3; 20]),
        systemd: SystemdState { load: "loaded".to_owned(), active: "active".to_owned(), sub: sub.to_owned() },
        problem: None,
    }
}

fn address(socket: SocketAddr) -> Address {
    socket.to_string().parse().unwrap()
}

/// Between agent and server; when cut it goes on taking bytes and passes none on, as a network does that has lost its other end.
struct Proxy {
    address: Address,
    cut: tokio::sync::watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Proxy {
    async fn new(to: &Address) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = address(listener.local_addr().unwrap());
        let (cut, watch) = tokio::sync::watch::channel(false);
        let to = to.to_string();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(&to).await.unwrap();
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                streams.spawn(swallow(near_in, far_out, watch.clone()));
                streams.spawn(swallow(far_in, near_out, watch.clone()));
            }
        });
        Proxy { address: own, cut, _task: task }
    }

    fn cut(&self) {
        self.cut.send_replace(true);
    }
}

async fn swallow(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    cut: tokio::sync::watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match from.read(&mut buffer).await {
            Ok(count) if *cut.borrow() => {
                if count == 0 {
                    // The end of the connection gets lost, too.
                    std::future::pending::<()>().await;
                }
            }
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
