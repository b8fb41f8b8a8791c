//! Peers that mean no good, against a server that has a cluster to serve: each is refused, that is logged once with its address and
//! without secrets, nothing changes, and nobody else notices.

mod rogue;

use super::SLEEP;
use anyhow::{Context, Result, ensure};
use fleet_cluster::model::{Machine, MachineId, SystemdState, UnitReport};
use fleet_e2e::{Fleet, Running, until};
use fleet_link::ca::{Authority, Identity, MACHINE_VALIDITY, MachineKey, PublicKey};
use fleet_link::dial::{Address, DialError, Dialer, join};
use fleet_link::token::{Terms, Token};
use fleet_link::{AgentEnd, Beat, FromAgent, Hello, KeepAlive, ToAgent};
use fleet_unit::UnitName;
use rogue::Rogue;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Nothing here is waited for longer.
const DEADLINE: Duration = Duration::from_secs(60);
/// An end that never comes is looked for in so many bytes.
const ENDLESS: usize = 64 << 20;
/// By how much fleetd may have grown in the end, KiB: what the allocator keeps of hundreds of connections at a time.
const GROWTH: u64 = 32 << 10;

async fn within<T>(what: &str, future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(DEADLINE, future).await.with_context(|| format!("never: {what}"))
}

/// A cluster under attack, and how it was before.
struct Target {
    fleet: Fleet,
    runtime: Runtime,
    units: Vec<String>,
    running: Running,
    registry: String,
    memory: u64,
    /// What must be in no log.
    secrets: Vec<String>,
}

impl Target {
    fn up() -> Result<Target> {
        let fleet = Fleet::join_all("attack", 3, "agent_ttl=\"10s\"")?;
        let units: Vec<String> = (0..6).map(|number| format!("u{number}.service")).collect();
        let running = fleet.start_all(&units, SLEEP)?;
        let runtime = Runtime::new()?;
        Ok(Target { fleet, runtime, units, running, registry: String::new(), memory: 0, secrets: Vec::new() })
    }

    fn address(&self) -> String {
        format!("{}:4919", self.fleet.host().ip())
    }

    fn token(&mut self, terms: &str) -> Result<Token> {
        let text = self.fleet.token(terms)?;
        self.secrets.push(text.clone());
        Token::parse(&text).context("a token of the server")
    }

    /// Joins as a machine with this key.
    fn try_join(&mut self, token: &Token, machine: &MachineId) -> Result<Result<Identity, DialError>> {
        let key = MachineKey::generate()?;
        self.secrets.extend(key.to_pem().lines().nth(1).map(str::to_owned));
        let addresses: [Address; 1] = [self.address().parse()?];
        let joined = join(&addresses, token, machine, key, KeepAlive::default());
        Ok(self.runtime.block_on(joined))
    }

    fn refused(&mut self, token: &Token) -> Result<String> {
        match self.try_join(token, &machine(0xbad))? {
            Ok(_) => anyhow::bail!("the token let a machine in"),
            Err(error) => Ok(error.to_string()),
        }
    }

    /// All that the registry has, as far as anybody can see it.
    fn everything(&self) -> Result<String> {
        let lists = [
            "list-units --full",
            "list-unit-files --full --fields=unit,hash,dstate,state,tmachine",
            "list-machines --full",
            "machine list --full",
            "join-token list",
        ];
        lists.iter().map(|list| self.fleet.ok(list)).collect()
    }

    /// KiB of fleetd on the server.
    fn memory_now(&self) -> Result<u64> {
        let script =
            "awk '/^VmRSS:/ { print $2 }' /proc/$(systemctl show --value -p MainPID fleetd.service)/status";
        Ok(self.fleet.host().sh(script)?.ok()?.stdout.trim().parse()?)
    }

    /// From here on nothing may change.
    fn mark(&mut self) -> Result<()> {
        self.registry = self.everything()?;
        self.memory = self.memory_now()?;
        Ok(())
    }

    /// Nothing has changed, and the cluster does its work.
    fn unharmed(&self, after: &str) -> Result<()> {
        // A machine that had a session is gone when its presence ends.
        until(&format!("after {after} all is as before"), || Ok(self.everything()? == self.registry))
            .with_context(|| {
                format!("before:\n{}\nnow:\n{}", self.registry, self.everything().unwrap_or_default())
            })?;
        self.fleet.running(&self.units)?.only_changed(&self.running, &BTreeSet::new())?;
        for host in &self.fleet.cluster.hosts()[1..] {
            let unit = format!("{SLEEP}[X-Fleet]\nMachineID={}\n", host.machine_id());
            self.fleet.start("probe.service", &unit)?;
            self.fleet.ok("destroy probe.service")?;
        }
        Ok(())
    }

    fn journal(&self) -> Result<String> {
        self.fleet.host().journal(None)
    }

    fn raw(&self, what: impl AsyncFnOnce(TcpStream) -> Result<()>) -> Result<()> {
        self.runtime.block_on(async { what(TcpStream::connect(self.address()).await?).await })
    }
}

fn machine(number: u32) -> MachineId {
    MachineId::parse(&format!("{number:032x}")).expect("32 digits")
}

/// Until the server closes the connection.
async fn closed(mut stream: impl AsyncReadExt + Unpin) -> Result<()> {
    let mut rest = Vec::new();
    // By an end or a reset.
    let _ = within("the connection's end", stream.read_to_end(&mut rest)).await?;
    Ok(())
}

/// Sends one piece over and over until the server closes the connection, which it has to before long.
async fn endless(mut stream: impl AsyncWriteExt + Unpin, piece: &[u8]) -> Result<()> {
    let mut sent = 0;
    while within("room for more", stream.write_all(piece)).await?.is_ok() {
        sent += piece.len();
        ensure!(sent < ENDLESS, "{sent} bytes were taken");
    }
    Ok(())
}

/// A session by way of an honest dialer, with a dishonest owner.
async fn honest(
    address: &str,
    identity: &Identity,
    hello: &MachineId,
) -> Result<(mpsc::Receiver<AgentEnd>, CancellationToken)> {
    let copy =
        Identity::from_pem(&identity.root().to_pem(), &identity.certificate_pem(), &identity.key().to_pem())?;
    let machine = Machine { public_ip: "10.9.9.9".to_owned(), ..Machine::default() };
    let hello = Hello { id: hello.clone(), machine };
    let dialer = Dialer::new(vec![address.parse()?], copy, hello, KeepAlive::default(), 1)?;
    let (sessions, ends) = mpsc::channel(1);
    let cancel = CancellationToken::new();
    tokio::spawn(dialer.run(sessions, cancel.clone()));
    Ok((ends, cancel))
}

fn running_report() -> UnitReport {
    UnitReport {
        current: fleet_cluster::model::DesiredState::Launched,
        hash: fleet_unit::Hash([7; 20]),
        systemd: SystemdState { load: "loaded".into(), active: "active".into(), sub: "running".into() },
        problem: None,
    }
}

/// Bytes that look like chance and are the same each time (xorshift).
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn attacks_are_refused_and_harm_nobody() -> Result<()> {
    let begun = Instant::now();
    let mut target = Target::up()?;
    let address = target.address();
    let other = Authority::create(SystemTime::now())?;

    // Members with evil in mind; one of them is removed again.
    let two = target.token(r#"{"uses":3}"#)?;
    let member = target.try_join(&two, &machine(0xe1))?.context("the first member")?;
    let removed = target.try_join(&two, &machine(0xe2))?.context("the second member")?;
    let staller = target.try_join(&two, &machine(0xe4))?.context("the third member")?;
    target.fleet.ok(&format!("machine remove {}", machine(0xe2)))?;
    let open = target.token("{}")?;
    let brief = target.token(r#"{"ttl":"1s"}"#)?;
    until("the brief token is over", || {
        Ok(!target.fleet.ok("join-token list")?.contains(&brief.id.to_string()))
    })?;
    let revoked = target.token("{}")?;
    target.fleet.ok(&format!("join-token revoke {}", revoked.id))?;
    target.mark()?;

    // Tokens.
    let (foreign, _) =
        Token::create(other.root().fingerprint(), &Terms { ttl: DEADLINE, uses: None }, SystemTime::now())?;
    let guessed = Token { secret: foreign.secret.clone(), ..open.clone() };
    let elsewhere = Token { root: other.root().fingerprint(), ..open.clone() };
    for _ in 0..3 {
        for (token, said) in [
            (&guessed, "the join token is wrong"),
            (&Token { root: open.root, ..foreign.clone() }, "the join token is wrong"),
            (&brief, "the join token has expired"),
            (&two, "the join token is used up"),
            (&revoked, "the join token is wrong"),
            (&elsewhere, "it does not take our certificate"),
        ] {
            let error = target.refused(token)?;
            // Who is asked for a secret by another cluster's server says nothing at all.
            let said = if token.root == other.root().fingerprint() { "not of this cluster" } else { said };
            ensure!(error.contains(said), "{said:?} is not in {error:?}");
        }
    }
    target.unharmed("tokens that are not good")?;

    // Certificates.
    target.runtime.block_on(async {
        let root = member.root();
        let key = MachineKey::generate()?;
        let public = PublicKey::from_request(&key.request()?)?;
        let signed = other.sign_machine(&public, &machine(0xe3), MACHINE_VALIDITY, SystemTime::now())?;
        let stranger = Identity::new(other.root().clone(), signed, key)?;
        for _ in 0..3 {
            // TLS 1.3: the client is through before the server looks at its certificate.
            let stream = rogue::tls(&address, root, Some(&stranger), "h2").await?;
            closed(stream).await?;
        }
        // No certificate, but a session.
        let mut nobody = Rogue::connect(&address, root, None).await?;
        nobody.misuse("Session", rogue::hello(machine(0xe1).as_str())).await?;
        // That of a machine which was removed, and which comes again and again: a session only tells it to let go of its units.
        for _ in 0..3 {
            let mut rogue = Rogue::connect(&address, root, Some(&removed)).await?;
            rogue.misuse("Renew", rogue::framed(&[])).await?;
            let mut rogue = Rogue::connect(&address, root, Some(&removed)).await?;
            rogue.misuse("Session", rogue::hello(machine(0xe2).as_str())).await?;
        }
        // That of one machine, and the name of another.
        let victim = MachineId::parse(target.fleet.cluster.host(1).machine_id())?;
        let (mut ends, cancel) = honest(&address, &member, &victim).await?;
        tokio::select! {
            end = ends.recv() => ensure!(end.is_none(), "a machine got the session of another"),
            () = tokio::time::sleep(Duration::from_secs(2)) => {}
        }
        cancel.cancel();
        anyhow::Ok(())
    })?;
    target.unharmed("certificates that are not good")?;

    // Reports of what is none of its business, and of what nobody knows.
    target.runtime.block_on(async {
        let id = machine(0xe1);
        let (mut ends, cancel) = honest(&address, &member, &id).await?;
        let mut end = within("its session", ends.recv()).await?.context("no session")?;
        let told = within("its units", end.receive.recv()).await?.context("no units")?;
        ensure!(
            matches!(&told, ToAgent::Snapshot(units) if units.is_empty()),
            "it was told of units: {told:?}"
        );
        let mut lies: BTreeMap<UnitName, UnitReport> = BTreeMap::new();
        for unit in target.units.iter().map(String::as_str).chain(["unheard-of.service"]) {
            lies.insert(UnitName::parse(unit)?, running_report());
        }
        let gone = lies.keys().map(|unit| (unit.clone(), None)).collect();
        end.send.send(FromAgent::Snapshot(lies)).await?;
        let states = || {
            let list = target.fleet.ok("list-units --full --no-legend")?;
            ensure!(!list.contains(id.as_str()) && !list.contains("unheard-of"), "{list}");
            anyhow::Ok(())
        };
        until("the lies were heard", || {
            Ok(target.journal()?.contains("reports units that are not placed on it"))
        })?;
        states()?;
        end.send.send(FromAgent::Changes(gone)).await?;
        // What comes after it has been heard was, too.
        let (beat, held) = tokio::sync::oneshot::channel();
        end.beats.send(Beat { leaving: false, held: beat }).await?;
        within("an answer to a sign of life", held).await??;
        states()?;
        cancel.cancel();
        anyhow::Ok(())
    })?;
    target.unharmed("reports of units of others")?;

    // Messages that no agent sends, before and within a session.
    target.runtime.block_on(async {
        let root = member.root();
        let id = machine(0xe1);
        let large = vec![b'x'; 300 << 10];
        for bad in [
            rogue::framed(&noise(1, 4000)),
            rogue::framed(&large),
            rogue::frame_of(usize::MAX, &large),
            rogue::framed(&[]),
        ] {
            let mut rogue = Rogue::connect(&address, root, Some(&member)).await?;
            rogue.misuse("Session", bad.clone()).await?;
            let mut rogue = Rogue::connect(&address, root, Some(&member)).await?;
            let call = rogue.session(rogue::hello(id.as_str())).await?;
            call.send(bad).await?;
            call.ended().await?;
        }
        // Who may only join, and does not.
        let key = MachineKey::generate()?.request()?;
        let mut nobody = Rogue::connect(&address, root, None).await?;
        for request in [
            rogue::join_request("x", &[1; 24], id.as_str(), &key),
            rogue::join_request("0123456789ab", &[1; 5], id.as_str(), &key),
            rogue::join_request("0123456789ab", &[1; 24], &"\u{1b}[2J".repeat(1000), &key),
            rogue::join_request("0123456789ab", &[1; 24], id.as_str(), &noise(2, 300)),
            rogue::framed(&noise(3, 300)),
            rogue::framed(&large),
        ] {
            nobody.misuse("Join", request).await?;
        }
        // One that says for ever what may be said at any time, and takes nothing: it is served as long as it pays for that.
        let mut rogue = Rogue::connect(&address, root, Some(&member)).await?;
        let call = rogue.session(rogue::hello(id.as_str())).await?;
        let many: Vec<u8> = rogue::probed().repeat(2000);
        for _ in 0..200 {
            ensure!(call.send(many.clone().into()).await?, "an agent may say so");
        }
        drop((call, rogue));
        // Half a message, and then nothing.
        let mut rogue = Rogue::connect(&address, root, Some(&staller)).await?;
        let call = rogue.session(rogue::hello(machine(0xe4).as_str())).await?;
        call.send(rogue::frame_of(1000, &[1; 10])).await?;
        for host in &target.fleet.cluster.hosts()[1..] {
            let unit = format!("{SLEEP}[X-Fleet]\nMachineID={}\n", host.machine_id());
            target.fleet.start("meanwhile.service", &unit)?;
            target.fleet.ok("destroy meanwhile.service")?;
        }
        drop((call, rogue));
        anyhow::Ok(())
    })?;
    target.unharmed("messages that are none")?;

    // What is no TLS, or nothing but TLS; each of it also without end.
    for _ in 0..3 {
        target.raw(async |mut stream| {
            stream.write_all(b"GET /fleet/v1/units HTTP/1.1\r\nHost: fleet\r\n\r\n").await?;
            closed(stream).await
        })?;
    }
    for seed in 1..=40 {
        target.raw(async |mut stream| {
            let _ = stream.write_all(&noise(seed, 3000)).await;
            stream.shutdown().await.ok();
            closed(stream).await
        })?;
    }
    target.raw(async |stream| endless(stream, &noise(99, 16 << 10)).await)?;
    // Records of a handshake message that never ends.
    let mut record = vec![22, 3, 1, 0x40, 0];
    record.extend(vec![1; 0x4000]);
    target.raw(async |stream| endless(stream, &record).await)?;
    target.runtime.block_on(async {
        let root = member.root();
        ensure!(rogue::tls(&address, root, None, "spdy/3").await.is_err(), "SPDY was taken");
        // The API, where nobody gets anything without showing who they are.
        for path in ["/fleet/v1/units", "/fleet/v1/discovery", "/", "/fleet/v1/nonsuch"] {
            let mut stream = rogue::tls(&address, root, None, "http/1.1").await?;
            let request = format!("DELETE {path} HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            ensure!(answer.starts_with("HTTP/1.1 401 "), "{path}: {answer}");
        }
        endless(rogue::tls(&address, root, None, "http/1.1").await?, &noise(8, 4096)).await?;
        // A header, and a body, that never end.
        let mut stream = rogue::tls(&address, root, None, "http/1.1").await?;
        stream.write_all(b"PUT /fleet/v1/units/a.service HTTP/1.1\r\nHost: fleet\r\nX: ").await?;
        endless(stream, &[b'x'; 4096]).await?;
        let mut stream = rogue::tls(&address, root, None, "http/1.1").await?;
        let head =
            "PUT /fleet/v1/units/a.service HTTP/1.1\r\nHost: fleet\r\nContent-Length: 99999999999\r\n\r\n";
        stream.write_all(head.as_bytes()).await?;
        endless(stream, &[b'x'; 4096]).await?;
        endless(rogue::tls(&address, root, None, "h2").await?, &noise(7, 4096)).await?;
        // The beginning of HTTP/2, and then a header that never ends.
        let mut stream = rogue::tls(&address, root, None, "h2").await?;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
        stream.write_all(b"\0\0\x01\x01\0\0\0\0\x01\x82").await?;
        let mut more = b"\0\x40\0\x09\0\0\0\0\x01".to_vec();
        more.extend([0; 0x4000]);
        endless(stream, &more).await
    })?;
    target.unharmed("what is no session")?;

    // A thousand connections that never finish the handshake, and one that has, and does nothing.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)?;
    target.runtime.block_on(async {
        let mut half = Vec::new();
        for number in 0..1000 {
            let mut stream = TcpStream::connect(&address).await?;
            if number % 2 == 0 {
                // The server may have closed it already.
                let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]).await;
            }
            half.push(stream);
        }
        let idle = rogue::tls(&address, member.root(), None, "h2").await?;
        target.unharmed("a thousand handshakes")?;
        for stream in half {
            closed(stream).await?;
        }
        closed(idle).await
    })?;
    target.unharmed("all of it")?;

    let journal = target.journal()?;
    for secret in &target.secrets {
        let middle = &secret[secret.len() / 4..secret.len() / 4 * 3];
        ensure!(!journal.contains(middle), "a secret is in the log");
    }
    ensure!(!journal.contains('\u{1b}'), "what a peer sent steers the terminal of who reads the log");
    let peer = target.fleet.cluster.gateway();
    let refused: Vec<&str> = journal
        .lines()
        .filter_map(|line| line.split_once(&format!("refused {peer}:")).map(|(_, said)| said))
        .collect();
    let said = |reason: &str| refused.iter().filter(|line| line.contains(reason)).count();
    for reason in [
        "the join token is wrong",
        "the join token has expired",
        "the join token is used up",
        "it does not take our certificate; are both of the same cluster?",
        "its certificate is not of this cluster",
        "it has no certificate; it can join with a token",
        &format!("machine {} is not in this cluster (any more)", machine(0xe2)),
        &format!("it says to be machine {}", target.fleet.cluster.host(1).machine_id()),
        "sent a wrong message: ",
        "token: the ID of a token",
        "secret: of a wrong length",
        "machine: ",
        "request: unusable signing request",
        "it does not speak TLS; is it http where https is due?",
        "it does not speak the protocol that is due here",
        "it shows neither a user token nor a certificate to the API",
        "it does not speak HTTP/2 as it should",
        "too many connections that are no session",
        "it did not finish the TLS handshake in time",
        "its connection did not become a session in time",
    ] {
        ensure!(said(reason) >= 1, "{reason:?} is not in the log: {refused:#?}");
    }
    // Each once a minute, however often it came.
    let mut by_reason: BTreeMap<&str, usize> = BTreeMap::new();
    for line in &refused {
        let reason =
            line.split_once(": ").or_else(|| line.split_once(' ')).map_or(*line, |(_, reason)| reason);
        let reason = reason.split(" (").next().unwrap_or(reason);
        *by_reason.entry(reason).or_default() += 1;
    }
    let minutes = usize::try_from(begun.elapsed().as_secs() / 60)?;
    ensure!(by_reason.values().all(|count| *count <= minutes + 1), "{minutes} minutes: {by_reason:#?}");
    let lies = format!("machine {} at {peer}:", machine(0xe1));
    ensure!(journal.matches(&lies).count() == 1, "the lies are to be told of once, with the address");
    for host in target.fleet.cluster.hosts() {
        let ended = format!("session of machine {}", host.machine_id());
        ensure!(!journal.contains(&ended), "an honest session ended");
        ensure!(
            !journal.contains(&format!("presence of machine {} had run out", host.machine_id())),
            "beats were held up"
        );
    }
    let memory = target.memory_now()?;
    println!("fleetd: {} KiB before, {memory} KiB after", target.memory);
    ensure!(memory < target.memory + GROWTH, "fleetd grew from {} to {memory} KiB", target.memory);
    Ok(())
}
