//! Who is let in, and who is not.

use super::*;
use crate::ca::CaError;
use crate::dial::session::Pump;
use crate::tls;

#[tokio::test]
async fn a_token_lets_a_machine_in() {
    let mut rig = Rig::new().await;
    let token = Token::parse(&rig.token(Some(1)).to_text()).unwrap();
    let identity = rig.join(&token, &machine(1)).await.unwrap();
    assert_eq!(identity.certificate().machine, machine(1));
    assert_eq!(identity.root(), rig.authority.root());
    // Stored and read again, it makes a session.
    let mut agent = Agent::new(vec![rig.address.clone()], copy(&identity), KeepAlive::default());
    assert_eq!(rig.next_end().await.hello, hello(&machine(1)));
    agent.connect().await;
    // The token is used up, but whoever has joined with it does not need it again.
    let late = rig.join(&token, &machine(2)).await.unwrap_err();
    assert!(late.is_refusal() && late.to_string().contains("is used up"), "{late}");
}

#[tokio::test]
async fn joining_again_with_the_same_key_is_no_second_machine() {
    let rig = Rig::new().await;
    let token = rig.token(None);
    let first = rig.join(&token, &machine(1)).await.unwrap();
    let key = MachineKey::from_pem(&first.key().to_pem()).unwrap();
    let again =
        crate::dial::join(std::slice::from_ref(&rig.address), &token, &machine(1), key, KeepAlive::default())
            .await
            .unwrap();
    assert_eq!(again.key().id(), first.key().id());
}

#[tokio::test]
async fn wrong_expired_and_revoked_tokens_are_refused() {
    let rig = Rig::new().await;
    let says = async |token: &Token| {
        let error = rig.join(token, &machine(1)).await.unwrap_err();
        assert!(error.is_refusal(), "{error}");
        error.to_string()
    };
    let good = rig.token(None);
    let other = rig.token(None);
    assert!(says(&Token { id: other.id, ..good.clone() }).await.contains("the join token is wrong"));
    let (foreign, _) =
        Token::create(rig.authority.root().fingerprint(), &Terms { ttl: DAY, uses: None }, SystemTime::now())
            .unwrap();
    assert!(says(&foreign).await.contains("the join token is wrong"));
    let change = |token: &Token, change: &dyn Fn(&mut TokenRecord)| {
        change(rig.members.tokens.lock().unwrap().get_mut(&token.id).unwrap());
    };
    change(&other, &|record| record.revoked = true);
    assert!(says(&other).await.contains("the join token was revoked"));
    change(&good, &|record| record.expires = record.created);
    assert!(says(&good).await.contains("the join token has expired"));
    assert!(rig.members.machines.lock().unwrap().is_empty(), "nothing changed");
}

#[tokio::test]
async fn a_second_machine_of_the_same_id_is_refused() {
    let rig = Rig::new().await;
    let token = rig.token(None);
    rig.join(&token, &machine(1)).await.unwrap();
    let error = rig.join(&token, &machine(1)).await.unwrap_err();
    assert!(error.is_refusal());
    assert!(error.to_string().contains("is already in the cluster with another key"), "{error}");
}

#[tokio::test]
async fn the_secret_goes_to_no_other_cluster() {
    let (ours, theirs) = (Rig::new().await, Rig::new().await);
    let token = ours.token(None);
    theirs.members.tokens.lock().unwrap().extend(ours.members.tokens.lock().unwrap().clone());
    // Their server would even know the token; it is not asked.
    let error = theirs.join(&token, &machine(1)).await.unwrap_err();
    assert!(!error.is_refusal());
    assert!(error.to_string().ends_with("its certificate is not of this cluster"), "{error}");
    assert!(theirs.members.machines.lock().unwrap().is_empty());
    // With a server of ours among the addresses it goes on to that one.
    let addresses = [theirs.address.clone(), ours.address.clone()];
    let key = MachineKey::generate().unwrap();
    crate::dial::join(&addresses, &token, &machine(1), key, KeepAlive::default()).await.unwrap();
}

#[tokio::test]
async fn a_machine_can_not_pose_as_a_server() {
    let rig = Rig::new().await;
    let member = rig.member(1, Duration::ZERO);
    let (mut chain, key) = member.tls();
    // As a server would send it, so that also who joins sees the right CA.
    chain.push(rig.authority.root().certificate().clone());
    let mut config = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let evil = address(listener.local_addr().unwrap());
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        while let Ok((stream, _)) = listener.accept().await {
            assert!(acceptor.accept(stream).await.is_err(), "somebody trusts a machine as a server");
        }
    });
    let key = MachineKey::generate().unwrap();
    let joined =
        crate::dial::join(std::slice::from_ref(&evil), &rig.token(None), &machine(2), key, QUICK).await;
    assert!(joined.unwrap_err().to_string().contains("its certificate"));
    let opened = Connection::open(&evil, tls::member(&member).unwrap(), QUICK).await;
    assert!(opened.unwrap_err().to_string().contains("its certificate"));
}

/// What a server says to a client that trusts it and shows this certificate.
async fn shown(
    rig: &Rig,
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    key: rustls::pki_types::PrivateKeyDer<'static>,
) -> String {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rig.authority.root().certificate().clone()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    match Connection::open(&rig.address, config, KeepAlive::default()).await {
        Err(error) => error.to_string(),
        Ok(mut connection) => within("an answer", Pump::begin(&mut connection, hello(&machine(1))))
            .await
            .err()
            .unwrap()
            .to_string(),
    }
}

#[tokio::test]
async fn certificates_of_another_cluster_are_refused() {
    let (ours, theirs) = (Rig::new().await, Rig::new().await);
    let foreign = theirs.member(1, Duration::ZERO);
    ours.members.machines.lock().unwrap().extend(theirs.members.machines.lock().unwrap().clone());
    let (chain, key) = foreign.tls();
    let error = shown(&ours, chain, key).await;
    assert!(
        error.contains("it does not take our certificate") || error.contains("the server is gone"),
        "{error}"
    );
    // And the other way round.
    let error = Connection::open(&ours.address, tls::member(&foreign).unwrap(), QUICK).await.unwrap_err();
    assert!(error.to_string().ends_with("its certificate is not of this cluster"), "{error}");
}

#[tokio::test]
async fn without_a_certificate_there_is_no_session_and_no_renewal() {
    let rig = Rig::new().await;
    let token = rig.token(None);
    let (config, _) = tls::joining(token.root).unwrap();
    let mut connection = Connection::open(&rig.address, config, QUICK).await.unwrap();
    let error = Pump::begin(&mut connection, hello(&machine(1))).await.err().unwrap();
    assert!(error.is_refusal() && error.to_string().contains("it has no certificate"), "{error}");
    let status = connection.client.renew(crate::wire::generated::RenewRequest {}).await.unwrap_err();
    assert!(status.message().contains("it has no certificate"));
}

#[tokio::test]
async fn a_removed_machine_gets_no_session_and_no_certificate() {
    let rig = Rig::new().await;
    let identity = rig.member(1, Duration::ZERO);
    rig.members.machines.lock().unwrap().clear();
    let mut connection =
        Connection::open(&rig.address, tls::member(&identity).unwrap(), KeepAlive::default()).await.unwrap();
    let error = Pump::begin(&mut connection, hello(&machine(1))).await.err().unwrap();
    assert!(error.is_refusal() && error.to_string().contains("is not in this cluster (any more)"), "{error}");
    let status = connection.client.renew(crate::wire::generated::RenewRequest {}).await.unwrap_err();
    assert!(status.message().contains("is not in this cluster (any more)"));
}

#[tokio::test]
async fn certificates_are_renewed_in_time_and_after_it() {
    let mut rig = Rig::new().await;
    for (number, ago) in [(1, 25 * DAY), (2, 40 * DAY)] {
        let old = rig.member(number, ago);
        let mut agent = Agent::new(vec![rig.address.clone()], copy(&old), KeepAlive::default());
        assert_eq!(rig.next_end().await.hello.id, machine(number));
        agent.connect().await;
        let fresh = agent.identity.borrow().clone();
        assert_eq!(fresh.key().id(), old.key().id());
        let left = fresh.certificate().not_after.duration_since(SystemTime::now()).unwrap();
        assert!(left > MACHINE_VALIDITY - DAY, "{left:?}");
    }
}

/// What has expired by the server's clock is renewed, whatever the machine's own clock says; and what is due by its own clock for ever
/// is renewed once.
#[tokio::test]
async fn clocks_that_differ_keep_nobody_out() {
    let mut rig = Rig::new().await;
    let clocks: [(fn() -> SystemTime, Duration); 2] =
        [(|| SystemTime::now() - 40 * DAY, 40 * DAY), (|| SystemTime::now() + 40 * DAY, Duration::ZERO)];
    for (number, (clock, ago)) in (1..).zip(clocks) {
        let old = rig.member(number, ago);
        let hello = hello(&machine(number));
        let dialer =
            Dialer::new(vec![rig.address.clone()], copy(&old), hello, KeepAlive::default(), 1).unwrap();
        let mut agent = Agent::of(dialer.with_clock(clock));
        let mut server = rig.next_end().await;
        agent.connect().await;
        let fresh = agent.identity.borrow_and_update().clone();
        assert_ne!(fresh.certificate().serial, old.certificate().serial);
        // It would be renewed before the next message otherwise.
        for _ in 0..100 {
            agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
            assert!(server.next().await.is_some());
        }
        assert!(!agent.identity.has_changed().unwrap());
    }
}

/// The server's clock was ahead when it signed.
#[tokio::test]
async fn a_certificate_that_is_not_valid_yet_will_do() {
    let mut rig = Rig::new().await;
    let signed = SystemTime::now() + 10 * DAY;
    let early = rig.known(identity(&rig.authority, &machine(1), signed));
    let mut agent = Agent::new(vec![rig.address.clone()], early, KeepAlive::default());
    assert_eq!(rig.next_end().await.hello.id, machine(1));
    agent.connect().await;
}

#[tokio::test]
async fn a_session_goes_on_while_its_certificate_is_renewed() {
    let validity = Duration::from_secs(8);
    let mut rig = Rig::with(Options { machine_validity: validity, ..Options::default() }).await;
    let now = SystemTime::now();
    let old = rig.known(identity_for(&rig.authority, &machine(1), validity, now));
    let mut agent = Agent::new(vec![rig.address.clone()], copy(&old), KeepAlive::default());
    let mut server = rig.next_end().await;
    agent.connect().await;
    // Until one is in use that was signed after the first had expired.
    let fresh = loop {
        within("a renewed certificate", agent.identity.changed()).await.unwrap();
        let fresh = agent.identity.borrow_and_update().clone();
        assert_eq!(fresh.key().id(), old.key().id());
        if fresh.certificate().not_after > old.certificate().not_after + validity {
            break fresh;
        }
    };
    assert!(SystemTime::now() > old.certificate().not_after);
    // It is the same session still.
    agent.send(FromAgent::Snapshot(BTreeMap::new())).await;
    assert!(server.next().await.is_some());
    assert_eq!(*rig.members.admitted.lock().unwrap(), [old.certificate().serial.clone()]);
    // The next one begins with a renewed certificate.
    drop(server);
    agent.connect().await;
    let admitted = rig.members.admitted.lock().unwrap().clone();
    assert_eq!(admitted.len(), 2);
    assert_ne!(admitted[1], old.certificate().serial);
    let newest = agent.identity.borrow().clone();
    assert!([fresh.certificate(), newest.certificate()].iter().any(|says| says.serial == admitted[1]));
}

#[tokio::test]
async fn a_session_ends_with_its_certificate_when_that_is_not_renewed() {
    let validity = Duration::from_secs(3);
    let mut rig = Rig::with(Options { machine_validity: validity, ..Options::default() }).await;
    let identity = rig.known(identity_for(&rig.authority, &machine(1), validity, SystemTime::now()));
    let mut agent = Agent::new(vec![rig.address.clone()], identity, KeepAlive::default());
    let mut server = rig.next_end().await;
    agent.connect().await;
    // The machine is taken out of the cluster behind the session's back.
    rig.members.machines.lock().unwrap().clear();
    assert_eq!(server.next().await, None);
}

#[tokio::test]
async fn an_expired_certificate_is_good_for_nothing_but_its_renewal() {
    let rig = Rig::new().await;
    let old = rig.member(1, 40 * DAY);
    let open = || Connection::open(&rig.address, tls::member(&old).unwrap(), KeepAlive::default());
    let mut connection = open().await.unwrap();
    let error = Pump::begin(&mut connection, hello(&machine(1))).await.err().unwrap();
    assert!(error.to_string().contains("has expired"), "{error}");
    // Nor for that once the machine is removed.
    rig.members.machines.lock().unwrap().clear();
    let renewed = open().await.unwrap().client.renew(crate::wire::generated::RenewRequest {}).await;
    assert!(renewed.unwrap_err().message().contains("is not in this cluster"));
    // An expired certificate of another cluster is no better than a fresh one.
    let theirs = Rig::new().await;
    let (chain, key) = theirs.member(1, 40 * DAY).tls();
    let error = shown(&rig, chain, key).await;
    assert!(
        error.contains("it does not take our certificate") || error.contains("the server is gone"),
        "{error}"
    );
}

#[tokio::test]
async fn a_registry_that_does_not_answer_is_no_refusal() {
    let limits = Limits { membership: Duration::from_millis(100), ..Limits::default() };
    let rig = Rig::with(Options { limits, ..Options::default() }).await;
    rig.members.hangs.store(true, Ordering::Relaxed);
    let error = rig.join(&rig.token(None), &machine(1)).await.unwrap_err();
    assert!(!error.is_refusal() && error.to_string().contains("the registry does not answer"), "{error}");
}

#[tokio::test]
async fn nobody_there_is_said_so() {
    // Bound and not listening: nobody else can serve there.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let there = address(socket.local_addr().unwrap());
    let authority = Authority::create(SystemTime::now()).unwrap();
    let token =
        Token::create(authority.root().fingerprint(), &Terms { ttl: DAY, uses: None }, SystemTime::now());
    let key = MachineKey::generate().unwrap();
    let error = crate::dial::join(&[there], &token.unwrap().0, &machine(1), key, QUICK).await.unwrap_err();
    assert!(error.to_string().ends_with("no fleetd serves there (connection refused)"), "{error}");
}

#[test]
fn a_certificate_for_another_key_is_not_taken() {
    let authority = Authority::create(SystemTime::now()).unwrap();
    let identity = identity(&authority, &machine(1), SystemTime::now());
    let mixed = Identity::from_pem(
        &identity.root().to_pem(),
        &identity.certificate_pem(),
        &MachineKey::generate().unwrap().to_pem(),
    );
    assert_eq!(mixed.unwrap_err(), CaError::OtherKey);
}
