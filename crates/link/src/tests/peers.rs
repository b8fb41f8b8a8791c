//! What servers ask each other, over real TCP on this host.

use super::*;
use crate::peer::{News, Notice, PeerDialer, PeerError, PeerRefusal, PeerService, Standing};
use crate::wire::generated as pb;
use fleet_cluster::engine::Delay;
use futures_util::{FutureExt, future::BoxFuture, stream::BoxStream};
use std::sync::atomic::AtomicUsize;
use tonic::Code;

/// A server that has a session with machine 1, and leads.
#[derive(Debug, Default)]
struct Other {
    /// What was asked, with where the answer goes.
    asked: Mutex<Option<(Ask, mpsc::Sender<Chunk>)>>,
    news: Mutex<Option<mpsc::Receiver<News>>>,
}

impl PeerService for Other {
    fn ask(&self, id: MachineId, ask: Ask) -> BoxFuture<'static, Result<mpsc::Receiver<Chunk>, PeerRefusal>> {
        let (answer, chunks) = mpsc::channel(16);
        *self.asked.lock().unwrap() = Some((ask, answer));
        let here = id == machine(1);
        async move { if here { Ok(chunks) } else { Err(PeerRefusal::NotHere("not here".to_owned())) } }
            .boxed()
    }

    fn follow(&self) -> Result<BoxStream<'static, News>, PeerRefusal> {
        let news = self.news.lock().unwrap().take();
        let mut news = news.ok_or_else(|| PeerRefusal::NotHere("it does not lead".to_owned()))?;
        Ok(Box::pin(futures_util::stream::poll_fn(move |context| news.poll_recv(context))))
    }

    fn stand(&self) -> Standing {
        Standing { revision: 7, reached: Some(Duration::from_millis(1500)) }
    }
}

impl Other {
    fn asked(&self) -> (Ask, mpsc::Sender<Chunk>) {
        self.asked.lock().unwrap().take().unwrap()
    }
}

async fn rig(keep_alive: KeepAlive) -> (Rig, Arc<Other>, PeerDialer) {
    let other = Arc::new(Other::default());
    let options = Options { peers: Some(other.clone()), keep_alive, ..Options::default() };
    let rig = Rig::with(options).await;
    let dialer = PeerDialer::new(rig.authority.clone(), machine(9), keep_alive);
    (rig, other, dialer)
}

fn journal() -> Ask {
    Ask::Journal { unit: unit("a.service"), lines: 3, follow: true, output: "cat".to_owned() }
}

#[tokio::test]
async fn a_machine_is_asked_through_its_server() {
    let (rig, other, dialer) = rig(KeepAlive::default()).await;
    for ask in [Ask::Status(unit("a.service")), journal()] {
        let mut answer =
            within("the answer", dialer.ask(&rig.address, &machine(1), ask.clone())).await.unwrap();
        let (asked, pieces) = other.asked();
        assert_eq!(asked, ask);
        let said =
            [Chunk::Out(Bytes::from_static(b"out")), Chunk::Err(Bytes::from_static(b"err")), Chunk::Exit(3)];
        for piece in said.clone() {
            pieces.send(piece).await.unwrap();
        }
        for piece in said {
            assert_eq!(within("a piece", answer.recv()).await, Some(piece));
        }
        assert_eq!(within("the end", answer.recv()).await, None);
    }
    // One that is cut off there ends without a last piece.
    let mut answer = dialer.ask(&rig.address, &machine(1), journal()).await.unwrap();
    drop(other.asked());
    assert_eq!(within("the end", answer.recv()).await, None);
    // Who reads no more ends the work.
    let answer = dialer.ask(&rig.address, &machine(1), journal()).await.unwrap();
    let (_, pieces) = other.asked();
    drop(answer);
    within("the end of the work", pieces.closed()).await;
    // A server without a session with the machine says so.
    let error = within("an answer", dialer.ask(&rig.address, &machine(2), journal())).await.unwrap_err();
    assert_eq!(error, PeerError::NotHere("not here".to_owned()));
    assert_eq!(
        dialer.stand(&rig.address).await,
        Ok(Standing { revision: 7, reached: Some(Duration::from_millis(1500)) })
    );
}

#[tokio::test]
async fn who_does_not_read_stops_the_machine_and_loses_nothing() {
    const PIECES: usize = 400;
    let (rig, other, dialer) = rig(KeepAlive::default()).await;
    let mut slow = dialer.ask(&rig.address, &machine(1), journal()).await.unwrap();
    let (_, pieces) = other.asked();
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = sent.clone();
    let mut writers = JoinSet::new();
    writers.spawn(async move {
        for number in 0..PIECES {
            pieces.send(Chunk::Out(Bytes::from(vec![number as u8; 16 << 10]))).await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
        }
        pieces.send(Chunk::Exit(0)).await.unwrap();
    });
    // Everything else goes on beside it.
    for round in 0..50 {
        let mut answer = dialer.ask(&rig.address, &machine(1), journal()).await.unwrap();
        let (_, pieces) = other.asked();
        pieces.send(Chunk::Exit(round)).await.unwrap();
        assert_eq!(within("the answer", answer.recv()).await, Some(Chunk::Exit(round)));
    }
    // The queue of the session, the window of the connection and what the two ends hold for it.
    let under_way = sent.load(Ordering::Relaxed);
    assert!(under_way <= 16 + 2 * 8 + 16, "{under_way} pieces are under way");
    for number in 0..PIECES {
        let Some(Chunk::Out(piece)) = within("a piece", slow.recv()).await else { panic!("cut off") };
        assert!(piece.len() == 16 << 10 && piece.iter().all(|byte| *byte == number as u8));
    }
    assert_eq!(within("the end", slow.recv()).await, Some(Chunk::Exit(0)));
}

#[tokio::test]
async fn a_server_that_is_gone_is_named() {
    let (rig, other, dialer) = rig(QUICK).await;
    let proxy = Proxy::new(&rig.address).await;
    let mut answer = dialer.ask(&proxy.address, &machine(1), journal()).await.unwrap();
    let (_, pieces) = other.asked();
    proxy.cut();
    let Some(Chunk::Failed(text)) = within("the end", answer.recv()).await else { panic!("no failure") };
    let expected = format!("the connection with its server at {} was lost: ", proxy.address);
    assert!(text.starts_with(&expected), "{text}");
    assert_eq!(answer.recv().await, None);
    within("the end of the work", pieces.closed()).await;
    // Nobody there any more.
    let mut answer = dialer.ask(&rig.address, &machine(1), journal()).await.unwrap();
    rig.cancel.cancel();
    assert_eq!(within("the end", answer.recv()).await, None);
    within("the server's end", rig.task).await.unwrap();
    let error = dialer.ask(&rig.address, &machine(1), journal()).await.unwrap_err();
    assert_eq!(error, PeerError::Unreachable("no fleetd serves there (connection refused)".to_owned()));
}

#[tokio::test]
async fn what_the_leader_lets_know_is_followed() {
    let (rig, other, dialer) = rig(KeepAlive::default()).await;
    let error = dialer.follow(&rig.address).await.unwrap_err();
    assert_eq!(error, PeerError::NotHere("it does not lead".to_owned()));
    let (send, news) = mpsc::channel(4);
    *other.news.lock().unwrap() = Some(news);
    let mut followed = dialer.follow(&rig.address).await.unwrap();
    let notice = Notice { id: "massLoss".to_owned(), since: 1, text: "many".to_owned() };
    let all = News {
        anew: true,
        notices: vec![notice],
        delays: vec![(unit("a.service"), Some(Delay::MassLoss))],
        ..News::default()
    };
    let change = News { over: vec!["massLoss".to_owned()], ..News::default() };
    for news in [all, change] {
        send.send(news.clone()).await.unwrap();
        assert_eq!(within("news", followed.next()).await, Ok(news));
    }
    drop(send);
    let end = within("the end", followed.next()).await;
    assert_eq!(end, Err(PeerError::NotHere("it does not lead any more".to_owned())));
}

#[tokio::test]
async fn only_servers_have_the_calls_of_servers_and_no_others() {
    let (mut rig, other, dialer) = rig(KeepAlive::default()).await;
    // A machine of the cluster.
    let member = rig.member(1, Duration::ZERO);
    let connection =
        Connection::open(&rig.address, tls::member(&member).unwrap(), KeepAlive::default()).await.unwrap();
    let ask = crate::wire::peer::encode_peer_ask(&machine(1), journal());
    let status = connection.peers().ask(ask).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert_eq!(connection.peers().stand(pb::StandRequest {}).await.unwrap_err().code(), Code::Unimplemented);
    assert!(other.asked.lock().unwrap().is_none());
    // A server of another cluster.
    let stranger = Arc::new(Authority::create(SystemTime::now()).unwrap());
    let stranger = PeerDialer::new(stranger, machine(9), KeepAlive::default());
    assert!(matches!(stranger.stand(&rig.address).await, Err(PeerError::Unreachable(_))));
    // One whose certificate has expired: the handshake is all it gets.
    let old = rig.authority.peer(&machine(9), SystemTime::now() - 2 * DAY).unwrap();
    let config = tls::peer(rig.authority.root(), old).unwrap();
    let connection = Connection::open(&rig.address, config, KeepAlive::default()).await;
    if let Ok(connection) = connection {
        connection.peers().stand(pb::StandRequest {}).await.unwrap_err();
    }
    // A server is no machine.
    let own = rig.authority.peer(&machine(9), SystemTime::now()).unwrap();
    let config = tls::peer(rig.authority.root(), own).unwrap();
    let mut connection = Connection::open(&rig.address, config, KeepAlive::default()).await.unwrap();
    let error = crate::dial::session::Pump::begin(&mut connection, hello(&machine(9))).await.err().unwrap();
    assert!(error.is_refusal(), "{error}");
    assert!(rig.ends.try_recv().is_err());
    // A server that shares its registry with no other has them for nobody.
    let alone = Rig::of(rig.authority.clone(), rig.members.clone(), Options::default()).await;
    assert!(matches!(dialer.stand(&alone.address).await, Err(PeerError::Unreachable(_))));
    dialer.stand(&rig.address).await.unwrap();
}
