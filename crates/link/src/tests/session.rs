//! What a session carries, and how it ends.

use super::*;
use crate::dial::session::Pump;
use crate::tls;
use bytes::Bytes;
use std::sync::atomic::AtomicUsize;

#[tokio::test]
async fn every_kind_of_message_arrives() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    assert_eq!(server.hello, hello(&machine(1)));

    let units: BTreeMap<_, _> =
        [(unit("a.service"), wanted("/bin/a")), (unit("b@1.service"), wanted("/bin/b"))].into();
    server.tell(ToAgent::Snapshot(units.clone())).await;
    assert!(matches!(agent.receive().await, Some(ToAgent::Snapshot(got)) if got == units));
    let changes: BTreeMap<_, _> =
        [(unit("a.service"), None), (unit("c.service"), Some(wanted("/bin/c")))].into();
    server.tell(ToAgent::Changes(changes.clone())).await;
    assert!(matches!(agent.receive().await, Some(ToAgent::Changes(got)) if got == changes));

    let mut failed = report("failed");
    failed.problem = Some("its start job ended with result 'timeout'\n\u{1b}[31m".to_owned());
    let reports: BTreeMap<_, _> =
        [(unit("a.service"), report("running")), (unit("b@1.service"), failed)].into();
    agent.send(FromAgent::Snapshot(reports.clone())).await;
    let Some(FromAgent::Snapshot(got)) = server.next().await else { panic!("no snapshot") };
    assert_eq!(got[&unit("a.service")], reports[&unit("a.service")]);
    // What could harm a terminal does not get through.
    let problem = got[&unit("b@1.service")].problem.clone().unwrap();
    assert_eq!(problem, "its start job ended with result 'timeout'\n\u{fffd}[31m");
    let changes: BTreeMap<_, _> = [(unit("a.service"), None)].into();
    agent.send(FromAgent::Changes(changes.clone())).await;
    assert_eq!(server.next().await, Some(FromAgent::Changes(changes)));

    for ask in [
        Ask::Status(unit("a.service")),
        Ask::Journal { unit: unit("a.service"), lines: 10, follow: true, output: "short".to_owned() },
    ] {
        for last in [Chunk::Exit(-3), Chunk::Failed("no journalctl here".to_owned())] {
            let mut chunks = server.ask(ask.clone()).await;
            let Some(ToAgent::Request(request)) = agent.receive().await else { panic!("no request") };
            assert_eq!(request.ask, ask);
            let sent = [
                Chunk::Out(Bytes::from_static(b"out\xff")),
                Chunk::Err(Bytes::from_static(b"err")),
                last.clone(),
            ];
            for chunk in sent.clone() {
                request.answer.send(chunk).await.unwrap();
            }
            for chunk in sent {
                assert_eq!(within("a chunk", chunks.recv()).await, Some(chunk));
            }
            assert_eq!(within("the end", chunks.recv()).await, None);
        }
    }

    // An answer cut off ends without a last chunk.
    let mut chunks = server.ask(Ask::Status(unit("a.service"))).await;
    let Some(ToAgent::Request(request)) = agent.receive().await else { panic!("no request") };
    request.answer.send(Chunk::Out(Bytes::from_static(b"half"))).await.unwrap();
    drop(request);
    assert_eq!(within("a chunk", chunks.recv()).await, Some(Chunk::Out(Bytes::from_static(b"half"))));
    assert_eq!(within("the end", chunks.recv()).await, None);
}

#[tokio::test]
async fn beats_are_answered_by_the_server() {
    let mut rig = Rig::new().await;
    let (mut remote, mut agent) = rig.session(1).await;
    let (mut own, own_agent) = local(hello(&machine(2)));
    for (server, agent) in [(&mut remote, &agent.end().beats), (&mut own, &own_agent.beats)] {
        for leaving in [false, true] {
            let (held, answer) = oneshot::channel();
            agent.send(Beat { leaving, held }).await.unwrap();
            let beat = within("a beat", server.beats.recv()).await.unwrap();
            assert_eq!(beat.leaving, leaving);
            let held = Held::during(Duration::from_millis(30_001));
            let _ = beat.held.send(held);
            assert_eq!(within("the answer", answer).await, Ok(held));
        }
    }
    // A beat the server could not commit is not answered by it, nor is the one after it held up.
    let (held, mut unanswered) = oneshot::channel();
    agent.end().beats.send(Beat { leaving: false, held }).await.unwrap();
    drop(within("a beat", remote.beats.recv()).await);
    let (held, answer) = oneshot::channel();
    agent.end().beats.send(Beat { leaving: false, held }).await.unwrap();
    let beat = within("a beat", remote.beats.recv()).await.unwrap();
    let _ = beat.held.send(Held::during(Duration::ZERO));
    assert_eq!(within("the answer", answer).await, Ok(Held::during(Duration::ZERO)));
    assert_eq!(unanswered.try_recv(), Err(oneshot::error::TryRecvError::Closed));
}

/// An agent that knows its presence renewed has to know what was decided before.
#[tokio::test]
async fn a_beat_is_answered_behind_what_was_told_before() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    for round in 0..200 {
        let (held, mut answer) = oneshot::channel();
        agent.end().beats.send(Beat { leaving: false, held }).await.unwrap();
        let beat = within("a beat", server.beats.recv()).await.unwrap();
        // Of several messages each, so that an answer has time to overtake them.
        let text = format!("[Service]\n{}", "# text\n".repeat(100_000));
        let file = UnitFile::parse(&text).unwrap();
        let of = |number: usize| {
            (
                unit(&format!("u{number}.service")),
                Wanted { file: file.clone(), state: DesiredState::Loaded }.into(),
            )
        };
        match round % 50 {
            0 => {
                let units: BTreeMap<_, _> = (0..4).map(of).collect();
                server.tell(ToAgent::Snapshot(units)).await;
            }
            _ => {
                let last = (unit("last.service"), Some(wanted(&format!("/bin/{round}"))));
                server.tell(ToAgent::Changes([last].into())).await;
            }
        }
        let _ = beat.held.send(Held::during(Duration::from_secs(1)));
        let told = within("the answer", &mut answer).await.unwrap().told;
        let receive = &mut agent.end().receive;
        if told {
            // It is in the queue already.
            receive.try_recv().unwrap();
        } else {
            within("a message", receive.recv()).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_large_snapshot_comes_in_parts_and_arrives_whole() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    // 24 MB in unit files of all sizes up to the largest.
    let mut units = BTreeMap::new();
    for number in 0..40usize {
        let size: usize = [10, 100_000, 700_000, (1 << 20) - 20][number % 4];
        let text = format!("[Service]\n{}", "# text\n".repeat(size.saturating_sub(10) / 7));
        let file = UnitFile::parse(&text).unwrap();
        units
            .insert(unit(&format!("u{number}.service")), Wanted { file, state: DesiredState::Loaded }.into());
    }
    let reports: BTreeMap<_, _> =
        (0..5000).map(|number| (unit(&format!("u{number}.service")), report("running"))).collect();
    server.tell(ToAgent::Snapshot(units.clone())).await;
    agent.send(FromAgent::Snapshot(reports.clone())).await;
    assert!(matches!(agent.receive().await, Some(ToAgent::Snapshot(got)) if got == units));
    assert_eq!(server.next().await, Some(FromAgent::Snapshot(reports)));
}

#[tokio::test]
async fn a_side_that_takes_nothing_gets_the_newest_and_holds_up_nobody() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    // Neither side reads; far more than all queues hold together.
    for number in 0..2000 {
        let name = unit(&format!("u{}.service", number % 10));
        server.tell(ToAgent::Changes([(name.clone(), Some(wanted(&format!("/bin/{number}"))))].into())).await;
        agent.send(FromAgent::Changes([(name, Some(report(&format!("s{number}"))))].into())).await;
    }
    let last = |number: usize| format!("/bin/{}", 1990 + number);
    let mut units = BTreeMap::new();
    while (0..10).any(|n| units.get(&unit(&format!("u{n}.service"))) != Some(&Some(wanted(&last(n))))) {
        let Some(ToAgent::Changes(changes)) = agent.receive().await else { panic!("the session ended") };
        units.extend(changes);
    }
    let mut reports = BTreeMap::new();
    while (0..10).any(|n| {
        reports.get(&unit(&format!("u{n}.service"))) != Some(&Some(report(&format!("s{}", 1990 + n))))
    }) {
        let Some(FromAgent::Changes(changes)) = server.next().await else { panic!("the session ended") };
        reports.extend(changes);
    }
}

#[tokio::test]
async fn a_slow_reader_holds_up_nobody_and_loses_nothing() {
    const PIECES: usize = 400;
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    let mut slow = Vec::new();
    let sent = Arc::new(AtomicUsize::new(0));
    let mut writers = JoinSet::new();
    for _ in 0..8 {
        let journal =
            Ask::Journal { unit: unit("a.service"), lines: 0, follow: true, output: "cat".to_owned() };
        slow.push(server.ask(journal).await);
        let Some(ToAgent::Request(request)) = agent.receive().await else { panic!("no request") };
        let sent = sent.clone();
        writers.spawn(async move {
            for number in 0..PIECES {
                let piece = Bytes::from(vec![number as u8; 16 << 10]);
                request.answer.send(Chunk::Out(piece)).await.unwrap();
                sent.fetch_add(1, Ordering::Relaxed);
            }
            request.answer.send(Chunk::Exit(0)).await.unwrap();
        });
    }
    // Nobody reads those eight; everything else goes on.
    for round in 0..50 {
        let name = unit("a.service");
        server.tell(ToAgent::Changes([(name.clone(), Some(wanted(&format!("/bin/{round}"))))].into())).await;
        assert!(matches!(agent.receive().await, Some(ToAgent::Changes(_))));
        agent.send(FromAgent::Changes([(name.clone(), Some(report(&format!("r{round}"))))].into())).await;
        assert!(matches!(server.next().await, Some(FromAgent::Changes(_))));
        let mut status = server.ask(Ask::Status(name)).await;
        let Some(ToAgent::Request(request)) = agent.receive().await else { panic!("no request") };
        request.answer.send(Chunk::Exit(round)).await.unwrap();
        assert_eq!(within("the status", status.recv()).await, Some(Chunk::Exit(round)));
    }
    // What is under way is bounded: credit, and the queues at both ends.
    let under_way = sent.load(Ordering::Relaxed);
    assert!(under_way <= 8 * (16 + 16 + 4 + 3), "{under_way} pieces are under way");
    // Who reads after all gets all of it.
    for mut chunks in slow {
        for number in 0..PIECES {
            let Some(Chunk::Out(piece)) = within("a piece", chunks.recv()).await else { panic!("cut off") };
            assert!(piece.len() == 16 << 10 && piece.iter().all(|byte| *byte == number as u8));
        }
        assert_eq!(within("the end", chunks.recv()).await, Some(Chunk::Exit(0)));
    }
    while let Some(writer) = writers.join_next().await {
        writer.unwrap();
    }
}

#[tokio::test]
async fn who_stops_reading_ends_the_work() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    for blocked in [false, true] {
        let chunks = server.ask(Ask::Status(unit("a.service"))).await;
        let Some(ToAgent::Request(request)) = agent.receive().await else { panic!("no request") };
        let writer = request.answer.clone();
        let task = tokio::spawn(async move {
            while blocked && writer.send(Chunk::Out(Bytes::from_static(b"more"))).await.is_ok() {}
        });
        drop(chunks);
        within("the end of the work", request.answer.closed()).await;
        within("the writer's end", task).await.unwrap();
    }
}

#[tokio::test]
async fn too_many_requests_are_refused_and_the_others_go_on() {
    let mut rig = Rig::new().await;
    let (mut server, mut agent) = rig.session(1).await;
    let mut open = Vec::new();
    for _ in 0..64 {
        let chunks = server.ask(Ask::Status(unit("a.service"))).await;
        let Some(ToAgent::Request(request)) = agent.receive().await else { panic!("no request") };
        open.push((chunks, request));
    }
    let mut refused = server.ask(Ask::Status(unit("a.service"))).await;
    assert!(matches!(within("a refusal", refused.recv()).await, Some(Chunk::Failed(_))));
    for (chunks, request) in &mut open {
        request.answer.send(Chunk::Exit(0)).await.unwrap();
        assert_eq!(within("an answer", chunks.recv()).await, Some(Chunk::Exit(0)));
    }
    let _next = server.ask(Ask::Status(unit("a.service"))).await;
    assert!(matches!(agent.receive().await, Some(ToAgent::Request(_))));
}

#[tokio::test]
async fn a_session_ends_when_either_side_drops_its_end() {
    let mut rig = Rig::new().await;
    let (server, mut agent) = rig.session(1).await;
    drop(server);
    assert!(agent.receive().await.is_none());
    // And begins again by itself.
    let mut server = rig.next_end().await;
    agent.connect().await;
    agent.end = None;
    assert_eq!(server.next().await, None);
    let _server = rig.next_end().await;
    agent.connect().await;
}

#[tokio::test]
async fn a_server_that_stops_ends_its_sessions_and_the_next_takes_over() {
    let mut one = Rig::new().await;
    let mut two = Rig::of(one.authority.clone(), one.members.clone(), Options::default()).await;
    let addresses = vec![one.address.clone(), two.address.clone()];
    let mut agent = Agent::new(addresses, one.member(1, Duration::ZERO), KeepAlive::default());
    let mut first = one.next_end().await;
    agent.connect().await;
    one.cancel.cancel();
    assert_eq!(first.next().await, None);
    within("the server's end", one.task).await.unwrap();
    assert!(agent.receive().await.is_none());
    let mut second = two.next_end().await;
    agent.connect().await;
    agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
    assert_eq!(second.next().await, Some(FromAgent::Snapshot(BTreeMap::new())));
}

#[tokio::test]
async fn an_agent_finds_servers_that_it_was_only_told_of() {
    let mut one = Rig::new().await;
    let mut two = Rig::of(one.authority.clone(), one.members.clone(), Options::default()).await;
    // It takes connections, and says nothing: as one that is stopped, or whose packets are lost.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = address(silent.local_addr().unwrap());
    let mut agent =
        Agent::new(vec![one.address.clone()], one.member(1, Duration::ZERO), KeepAlive::default());
    let mut first = one.next_end().await;
    agent.connect().await;
    for servers in [vec![one.address.clone()], vec![one.address.clone(), silent, two.address.clone()]] {
        first.tell(ToAgent::Servers(servers.clone())).await;
        within("servers", agent.servers.wait_for(|told| *told == servers)).await.unwrap();
    }
    let begun = std::time::Instant::now();
    one.cancel.cancel();
    assert_eq!(first.next().await, None);
    let _second = two.next_end().await;
    agent.connect().await;
    // Not after the time that one may take to answer; much less, but this is no measurement.
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn an_agent_of_the_version_before_is_not_told_of_servers() {
    use crate::wire::{Down, Up};
    use tonic::codegen::tokio_stream::wrappers::ReceiverStream;
    let mut rig = Rig::new().await;
    let identity = rig.member(1, Duration::ZERO);
    let mut connection =
        Connection::open(&rig.address, tls::member(&identity).unwrap(), KeepAlive::default()).await.unwrap();
    let (out, outbound) = mpsc::channel(1);
    let hello = Up::Hello { hello: hello(&machine(1)), oldest: 1, newest: 1 };
    out.send(hello.encode()).await.unwrap();
    let mut inbound = connection.client.session(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    let mut server = rig.next_end().await;
    let mut received = async || Down::decode(within("a message", inbound.message()).await.unwrap().unwrap());
    assert_eq!(received().await, Ok(Down::Welcome { protocol: 1 }));
    server.tell(ToAgent::Servers(vec![rig.address.clone()])).await;
    server.tell(ToAgent::Snapshot(BTreeMap::new())).await;
    assert!(matches!(received().await, Ok(Down::Units(_))));
}

#[tokio::test]
async fn a_cut_is_found_out_on_both_sides_and_the_next_server_is_tried() {
    let options = Options { keep_alive: QUICK, ..Options::default() };
    let mut one = Rig::with(options.clone()).await;
    let mut two = Rig::of(one.authority.clone(), one.members.clone(), options).await;
    let proxy = Proxy::new(&one.address).await;
    let addresses = vec![proxy.address.clone(), two.address.clone()];
    let mut agent = Agent::new(addresses, one.member(1, Duration::ZERO), QUICK);
    let mut first = one.next_end().await;
    agent.connect().await;
    // It has carried something, and is then cut without a word, with data under way.
    first.tell(ToAgent::Snapshot(BTreeMap::new())).await;
    assert!(agent.receive().await.is_some());
    proxy.cut();
    first.tell(ToAgent::Snapshot([(unit("a.service"), wanted("/bin/a"))].into())).await;
    assert!(agent.receive().await.is_none(), "the agent finds out");
    assert_eq!(first.next().await, None, "the server finds out");
    let _second = two.next_end().await;
    agent.connect().await;
}

#[tokio::test]
async fn a_quiet_session_stays() {
    let mut rig = Rig::with(Options { keep_alive: QUICK, ..Options::default() }).await;
    let mut agent = Agent::new(vec![rig.address.clone()], rig.member(1, Duration::ZERO), QUICK);
    let mut server = rig.next_end().await;
    agent.connect().await;
    // Longer than the keep-alive's deadline without a message.
    let quiet = tokio::time::timeout(2 * (QUICK.after + QUICK.deadline), agent.end().receive.recv()).await;
    assert!(quiet.is_err(), "the session ended: {quiet:?}");
    agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
    assert!(server.next().await.is_some());
}

#[tokio::test]
async fn a_second_session_of_a_live_machine_is_refused() {
    let mut rig = Rig::new().await;
    let identity = rig.member(1, Duration::ZERO);
    let mut agent = Agent::new(vec![rig.address.clone()], copy(&identity), KeepAlive::default());
    let mut server = rig.next_end().await;
    agent.connect().await;
    let mut connection =
        Connection::open(&rig.address, tls::member(&identity).unwrap(), KeepAlive::default()).await.unwrap();
    let error = within("an answer", Pump::begin(&mut connection, hello(&machine(1)))).await.err().unwrap();
    assert!(error.is_refusal() && error.to_string().contains("has a session from 127.0.0.1"), "{error}");
    agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
    assert!(server.next().await.is_some(), "the first one is undisturbed");
}

#[tokio::test]
async fn a_machine_whose_session_was_cut_gets_a_new_one_before_the_cut_is_noticed() {
    let slow = KeepAlive { after: Duration::from_secs(3600), deadline: Duration::from_secs(3600) };
    let limits = Limits { probe: Duration::from_millis(200), ..Limits::default() };
    let mut rig = Rig::with(Options { keep_alive: slow, limits, ..Options::default() }).await;
    let proxy = Proxy::new(&rig.address).await;
    let identity = rig.member(1, Duration::ZERO);
    let mut lost = Agent::new(vec![proxy.address.clone()], copy(&identity), slow);
    let mut old = rig.next_end().await;
    lost.connect().await;
    proxy.cut();
    let mut back = Agent::new(vec![rig.address.clone()], identity, slow);
    let _new = rig.next_end().await;
    back.connect().await;
    assert_eq!(old.next().await, None);
}

#[tokio::test]
async fn an_agent_waits_for_its_server() {
    // Bound and not listening: nobody else can serve there.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let there = address(socket.local_addr().unwrap());
    let rig = Rig::new().await;
    let mut agent = Agent::new(vec![there], rig.member(1, Duration::ZERO), KeepAlive::default());
    assert!(tokio::time::timeout(Duration::from_millis(300), agent.ends.recv()).await.is_err());
    let listener = socket.listen(8).unwrap();
    let (sessions, mut ends) = mpsc::channel(1);
    tokio::spawn(serve(
        listener,
        rig.authority.clone(),
        rig.members.clone(),
        Options::default(),
        sessions,
        CancellationToken::new(),
    ));
    agent.connect().await;
    assert_eq!(within("a session", ends.recv()).await.unwrap().hello.id, machine(1));
}
