//! What peers do that mean no good, or are broken: it is refused, and nobody else notices.

use super::*;
use crate::tls;
use crate::wire::generated as pb;
use crate::wire::{MAX_UP, Up};
use tokio::sync::mpsc;
use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// A member's connection, to be misused.
async fn raw(rig: &Rig, identity: &Identity) -> Connection {
    Connection::open(&rig.address, tls::member(identity).unwrap(), KeepAlive::default()).await.unwrap()
}

/// A session that sends what the test says.
async fn raw_session(
    connection: &Connection,
    first: Up,
) -> Result<(mpsc::Sender<pb::FromAgent>, Streaming<pb::ToAgent>), Status> {
    let (out, outbound) = mpsc::channel(8);
    out.send(first.encode()).await.unwrap();
    let mut client = connection.client.clone().max_encoding_message_size(usize::MAX);
    let answer = within("an answer", client.session(ReceiverStream::new(outbound))).await?;
    Ok((out, answer.into_inner()))
}

fn first(id: &MachineId) -> Up {
    Up::Hello { hello: hello(id), oldest: 1, newest: 1 }
}

/// How a session ends.
async fn end(mut inbound: Streaming<pb::ToAgent>) -> Option<Status> {
    loop {
        match within("the end", inbound.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => return None,
            Err(status) => return Some(status),
        }
    }
}

#[tokio::test]
async fn a_hello_of_another_machine_is_refused() {
    let rig = Rig::new().await;
    let identity = rig.member(1, Duration::ZERO);
    rig.member(2, Duration::ZERO);
    let connection = raw(&rig, &identity).await;
    let status = raw_session(&connection, first(&machine(2))).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("but its certificate is that of"), "{}", status.message());
}

#[tokio::test]
async fn a_peer_of_another_time_is_told_the_versions() {
    let rig = Rig::new().await;
    let identity = rig.member(1, Duration::ZERO);
    let connection = raw(&rig, &identity).await;
    let hello = Up::Hello { hello: hello(&machine(1)), oldest: 7, newest: 9 };
    let status = raw_session(&connection, hello).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("the session protocol 7 to 9, we speak 1 to 3"),
        "{}",
        status.message()
    );
}

#[tokio::test]
async fn a_session_begins_with_a_hello() {
    let limits = Limits { handshake: SHORT, ..Limits::default() };
    let rig = Rig::with(Options { limits, ..Options::default() }).await;
    let identity = rig.member(1, Duration::ZERO);
    let connection = raw(&rig, &identity).await;
    let status = raw_session(&connection, Up::Probed(1)).await.unwrap_err();
    assert_eq!(status.message(), "its first message is no hello");
    // Or it does not begin.
    let (_out, outbound) = mpsc::channel(1);
    let mut client = connection.client.clone();
    let status = within("a refusal", client.session(ReceiverStream::new(outbound))).await.unwrap_err();
    assert_eq!(status.message(), "it began no session in time");
}

#[tokio::test]
async fn wrong_messages_end_the_session_and_no_other() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    let identity = rig.member(2, Duration::ZERO);
    let entry = |name: &str| pb::ReportEntry { name: name.to_owned(), report: None };
    let reports = |kind: pb::Kind, entries: Vec<pb::ReportEntry>| pb::FromAgent {
        body: Some(pb::from_agent::Body::Reports(pb::Reports {
            kind: kind.into(),
            entries,
            ..Default::default()
        })),
    };
    let large = "x".repeat(MAX_UP + 1);
    let piece = |number| Up::Answer { number, piece: Some(Chunk::Out(vec![0; 10].into())) }.encode();
    for (what, messages, says) in [
        ("no kind", vec![pb::FromAgent { body: None }], "body: of no known kind"),
        ("a hello again", vec![first(&machine(2)).encode()], "a second hello"),
        (
            "a bad name",
            vec![reports(pb::Kind::Changes, vec![entry("../../etc.service")])],
            "reports.entries[0].name: invalid character '/' in unit name",
        ),
        ("an unknown kind", vec![reports(pb::Kind::Unknown, vec![])], "reports.kind: unknown value 0"),
        (
            "a snapshot's middle",
            vec![reports(pb::Kind::Snapshot, vec![])],
            "reports: a snapshot without its first part",
        ),
        ("too large", vec![reports(pb::Kind::Changes, vec![entry(&large)])], "message"),
        // One more than there is credit for, while nobody reads.
        ("no credit", (0..40).map(|_| piece(1)).collect(), "answer: more pieces than it had credit for"),
    ] {
        let connection = raw(&rig, &identity).await;
        let (out, inbound) = raw_session(&connection, first(&machine(2))).await.unwrap();
        let mut misled = rig.next_end().await;
        let (answer, _unread) = mpsc::channel(1);
        misled
            .tell(ToAgent::Request(Box::new(Request { ask: Ask::Status(unit("a.service")), answer })))
            .await;
        let mut inbound = inbound;
        // Until the request has arrived: the welcome comes before it.
        for _ in 0..2 {
            within("a message", inbound.message()).await.unwrap().unwrap();
        }
        for message in messages {
            if out.send(message).await.is_err() {
                break;
            }
        }
        let status = end(inbound).await.unwrap_or_else(|| panic!("{what}: ended well"));
        assert!(status.message().contains(says), "{what}: {}", status.message());
        assert_eq!(misled.next().await, None, "{what}");
        // The other session goes on.
        agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
        assert!(server.next().await.is_some(), "{what}");
    }
}

#[tokio::test]
async fn an_agent_that_does_not_read_is_cut_off() {
    let limits = Limits { stalled: Duration::from_millis(300), ..Limits::default() };
    let mut rig = Rig::with(Options { limits, ..Options::default() }).await;
    let identity = rig.member(1, Duration::ZERO);
    let connection = raw(&rig, &identity).await;
    let (_out, _inbound) = raw_session(&connection, first(&machine(1))).await.unwrap();
    let mut server = rig.next_end().await;
    let file = UnitFile::parse(&format!("[Service]\n{}", "# text\n".repeat(100_000))).unwrap();
    let units = (0..20).map(|n| {
        let wanted = Wanted { file: file.clone(), state: DesiredState::Loaded };
        (unit(&format!("{n}.service")), wanted.into())
    });
    server.tell(ToAgent::Snapshot(units.collect())).await;
    assert_eq!(server.next().await, None);
}

/// Not how long there was nothing to read counts.
#[tokio::test]
async fn an_agent_that_has_nothing_to_read_is_not_cut_off() {
    let stalled = Duration::from_secs(1);
    let mut rig =
        Rig::with(Options { limits: Limits { stalled, ..Limits::default() }, ..Options::default() }).await;
    let (mut server, mut agent) = rig.session(1).await;
    for _ in 0..5 {
        tokio::time::sleep(stalled + Duration::from_millis(100)).await;
        server.tell(ToAgent::Snapshot(BTreeMap::new())).await;
        assert!(agent.receive().await.is_some());
    }
}

#[tokio::test]
async fn one_connection_carries_one_session() {
    let mut rig = Rig::new().await;
    let identity = rig.member(1, Duration::ZERO);
    let connection = raw(&rig, &identity).await;
    let (_out, _inbound) = raw_session(&connection, first(&machine(1))).await.unwrap();
    let _server = rig.next_end().await;
    let status = raw_session(&connection, first(&machine(1))).await.unwrap_err();
    assert_eq!(status.message(), "there was a session on this connection already");
}

#[tokio::test]
async fn malformed_join_requests_are_refused_by_field() {
    let rig = Rig::new().await;
    let token = rig.token(None);
    let (config, _) = tls::joining(token.root).unwrap();
    let mut connection = Connection::open(&rig.address, config, KeepAlive::default()).await.unwrap();
    let good = || pb::JoinRequest {
        token: token.id.to_string(),
        secret: token.secret.to_bytes(),
        machine: machine(1).to_string(),
        request: MachineKey::generate().unwrap().request().unwrap(),
    };
    for (request, says) in [
        (pb::JoinRequest { secret: vec![1; 23], ..good() }, "secret: of a wrong length"),
        (pb::JoinRequest { token: "x".to_owned(), ..good() }, "token: the ID of a token"),
        (pb::JoinRequest { machine: "me".to_owned(), ..good() }, "machine: \"me\" is not a machine ID"),
        (pb::JoinRequest { request: vec![0; 100], ..good() }, "request: unusable signing request"),
    ] {
        let status = within("an answer", connection.client.join(request)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(says), "{}", status.message());
    }
    within("an answer", connection.client.join(good())).await.unwrap();
}

/// Until the other side has closed the connection.
async fn closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let _ = within("the connection's end", stream.read_to_end(&mut rest)).await;
}

async fn tcp(rig: &Rig) -> TcpStream {
    TcpStream::connect(rig.address.to_string()).await.unwrap()
}

#[tokio::test]
async fn a_thousand_half_handshakes_disturb_nobody() {
    // Both ends of all connections are in this process.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();

    // Nothing but being pushed out ends one of them.
    let limits = Limits { handshake: DAY, idle: DAY, ..Limits::default() };
    let mut rig = Rig::with(Options { limits, ..Options::default() }).await;
    let (mut server, mut agent) = rig.session(1).await;
    let mut half = Vec::new();
    for number in 0..1000 {
        let mut stream = tcp(&rig).await;
        if number % 2 == 0 {
            // The beginning of a TLS record that never comes.
            stream.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        }
        half.push(stream);
        if number % 100 == 0 {
            agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
            assert!(server.next().await.is_some());
        }
    }
    // With all of them open: a machine joins and gets its session, and the first one goes on.
    let token = rig.token(None);
    let identity = rig.join(&token, &machine(2)).await.unwrap();
    let mut late = Agent::new(vec![rig.address.clone()], identity, KeepAlive::default());
    let mut late_server = rig.next_end().await;
    late.connect().await;
    late.send(FromAgent::Snapshot(BTreeMap::new())).await;
    assert!(late_server.next().await.is_some());
    server.tell(ToAgent::Snapshot(BTreeMap::new())).await;
    assert!(agent.receive().await.is_some());
    // The oldest were pushed out, to make room.
    closed(half.swap_remove(0)).await;
    drop(half);
}

#[tokio::test]
async fn connections_that_lead_nowhere_are_closed() {
    let limits = Limits { handshake: SHORT, idle: SHORT, ..Limits::default() };
    let rig = Rig::with(Options { limits, ..Options::default() }).await;
    // No handshake.
    closed(tcp(&rig).await).await;
    // A handshake, and nothing after it.
    let (config, _) = tls::joining(rig.token(None).root).unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(tls::server_name(), tcp(&rig).await).await.unwrap();
    let mut rest = Vec::new();
    let _ = within("the connection's end", stream.read_to_end(&mut rest)).await;
}
