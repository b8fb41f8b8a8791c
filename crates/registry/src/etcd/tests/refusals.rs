//! What etcd refuses, and what is no etcd for us: each with a message that says what to do.
use super::*;
use fleet_testbed::EtcdTls;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn refused(config: EtcdConfig) -> StoreError {
    let answer = EtcdStore::connect(config, None).await;
    answer.err().expect("it connects")
}

#[tokio::test]
async fn an_etcd_that_is_not_there_is_named() {
    // Bound and not listening: nobody else can serve there.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = format!("http://{}", socket.local_addr().unwrap());
    let config = EtcdConfig {
        endpoints: vec![endpoint.clone(), "http://no-such-host.invalid:1".to_owned()],
        request_timeout: Duration::from_millis(300),
        ..EtcdConfig::default()
    };
    let store = EtcdStore::new(config, None).unwrap();
    let mut contact = store.contact();
    let lost = contact.wait_for(|contact| matches!(contact, Contact::Lost { .. })).await.unwrap().clone();
    let Contact::Lost { error: StoreError::Unavailable(message), .. } = lost else { panic!("{lost:?}") };
    assert!(message.contains(&format!("{endpoint}: connection refused")), "{message}");
    assert!(message.contains("http://no-such-host.invalid:1: "), "{message}");
    // Nothing was sent: nothing is unknown.
    let answer = store.commit(Txn::of(Op::put("k", ""))).await;
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
}

/// An etcd of the time of fleet 1.0 has no API v3, and speaks HTTP/1 only.
#[tokio::test]
async fn an_etcd_without_api_v3_is_named() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let serving = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_u8().await.unwrap();
            let answer = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n400 Bad Request";
            stream.write_all(answer).await.unwrap();
            stream.shutdown().await.unwrap();
            // Not closed before it was read
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest).await;
        }
    });
    let error = refused(EtcdConfig { endpoints: vec![endpoint.clone()], ..EtcdConfig::default() }).await;
    serving.abort();
    let StoreError::Unusable(message) = error else { panic!("{error:?}") };
    assert!(message.contains(&endpoint) && message.contains("no etcd API v3"), "{message}");
}

/// Sets up users as an administrator does.
struct Admin<'a>(&'a Etcd);

impl Admin<'_> {
    /// A call to etcd's part for users.
    fn call(&self, path: &str, body: serde_json::Value, token: Option<&str>) -> serde_json::Value {
        self.0.api(0, &format!("auth/{path}"), &body, token).unwrap()
    }

    fn add_user(&self, name: &str, role: Option<&str>, token: Option<&str>) {
        self.call("user/add", json!({"name": name, "password": format!("{name}'s")}), token);
        if let Some(role) = role {
            self.call("user/grant", json!({"user": name, "role": role}), token);
        }
    }

    fn enable(&self) {
        self.call("role/add", json!({"name": "root"}), None);
        self.add_user("root", Some("root"), None);
        self.call("enable", json!({}), None);
    }

    /// For calls once users are needed.
    fn token(&self) -> String {
        let answer = self.call("authenticate", json!({"name": "root", "password": "root's"}), None);
        answer["token"].as_str().unwrap().to_owned()
    }
}

fn login(etcd: &Etcd, name: &str, password: &str) -> EtcdConfig {
    EtcdConfig { username: Some(name.to_owned()), password: Some(password.to_owned()), ..config(etcd) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_passwords_and_permissions() {
    let etcd = Etcd::start(1).unwrap();
    let admin = Admin(&etcd);
    // A user is configured before etcd asks for one.
    let early = EtcdStore::connect(login(&etcd, "fleet", "fleet's"), None).await.unwrap();
    put(&early, "k", "1").await.unwrap();
    admin.call("role/add", json!({"name": "fleet"}), None);
    let range = (base64("/_coreos.com/fleet/"), base64("/_coreos.com/fleet0"));
    let permission = json!({"permType": "READWRITE", "key": range.0, "range_end": range.1});
    admin.call("role/grant", json!({"name": "fleet", "perm": permission}), None);
    admin.add_user("fleet", Some("fleet"), None);
    admin.add_user("guest", None, None);
    let start = early.range("").await.unwrap().revision;
    let mut watch = early.watch("", start).await.unwrap();
    admin.enable();

    put(&early, "k", "2").await.unwrap();
    let batch = watch.next().await.unwrap();
    assert_eq!(batch.events[0].entry.as_ref().unwrap().value[..], b"2"[..]);
    let store = EtcdStore::connect(login(&etcd, "fleet", "fleet's"), None).await.unwrap();
    assert_eq!(text(&store, "k").await.as_deref(), Some("2"));
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    store.keep_alive(lease).await.unwrap();
    store.commit(Txn::of(Op::put_leased("l", "", lease))).await.unwrap();
    store.revoke(lease).await.unwrap();

    // Any change of users makes all tokens worthless that are older.
    admin.add_user("other", None, Some(&admin.token()));
    let start = put(&store, "k", "3").await.unwrap();
    let mut watch = store.watch("", start).await.unwrap();
    put(&store, "k", "4").await.unwrap();
    assert_eq!(&*watch.next().await.unwrap().events[0].key, "k");

    let elsewhere = EtcdConfig { prefix: "/elsewhere/".into(), ..login(&etcd, "fleet", "fleet's") };
    for (config, word) in [
        (login(&etcd, "fleet", "wrong's"), "does not take the user name and password"),
        (login(&etcd, "nobody", "nobody's"), "does not take the user name and password"),
        (config(&etcd), "wants a user: set etcd_username and etcd_password"),
        (login(&etcd, "guest", "guest's"), "no permission"),
        (elsewhere, "no permission"),
    ] {
        let error = refused(config).await;
        let StoreError::Denied(message) = &error else { panic!("{error:?}") };
        assert!(message.contains(word) && message.contains(&etcd.endpoint(0)), "{message}");
        assert!(!message.contains("'s"), "{message}");
    }
    // What is taken away is told, by calls and by watches.
    let taken = json!({"role": "fleet", "key": range.0, "range_end": range.1});
    admin.call("role/revoke", taken, Some(&admin.token()));
    let answer = put(&store, "k", "5").await;
    assert!(matches!(answer, Err(StoreError::Denied(_))), "{answer:?}");
    let mut watch = store.watch("", start).await.unwrap();
    let answer = watch.next().await;
    assert!(matches!(answer, Err(StoreError::Denied(_))), "{answer:?}");
}

/// Tokens run out; nobody notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_has_run_out_is_renewed() {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let private = write(directory.path(), "token.key", key.serialize_pem().as_bytes());
    let public = write(directory.path(), "token.pub", key.public_key_pem().as_bytes());
    let (public, private) = (public.display(), private.display());
    let token = format!("--auth-token=jwt,pub-key={public},priv-key={private},sign-method=ES256,ttl=1s");
    let options = EtcdOptions { members: 1, tls: None, arguments: vec![token] };
    let etcd = Etcd::start_with(options, &Etcd::addresses(1).unwrap()).unwrap();
    Admin(&etcd).enable();
    let store = EtcdStore::connect(login(&etcd, "root", "root's"), None).await.unwrap();
    let first = store.contact().borrow().clone();
    let start = put(&store, "k", "0").await.unwrap();
    let mut watch = store.watch("", start).await.unwrap();
    for n in 1..=3 {
        // Longer than a token lasts
        tokio::time::sleep(Duration::from_millis(2100)).await;
        put(&store, "k", &n.to_string()).await.unwrap();
        let batch = watch.next().await.unwrap();
        assert_eq!(batch.events[0].entry.as_ref().unwrap().value[..], *n.to_string().as_bytes());
    }
    assert_eq!(*store.contact().borrow(), first);
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Authority(issuer)
    }

    fn pem(&self) -> Vec<u8> {
        self.0.pem().into_bytes()
    }

    /// A certificate for a name or an address, and its key.
    fn issue(&self, name: &str) -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    }
}

fn write(directory: &Path, name: &str, contents: &[u8]) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, contents).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_both_ways() {
    let (servers, clients) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().unwrap();
    let addresses = Etcd::addresses(1).unwrap();
    let (certificate, key) = servers.issue(&addresses[0].to_string());
    let tls = EtcdTls {
        certificate: write(directory.path(), "server.crt", &certificate),
        key: write(directory.path(), "server.key", &key),
        client_ca: Some(write(directory.path(), "ca.crt", &clients.pem())),
    };
    let options = EtcdOptions { members: 1, tls: Some(tls), arguments: Vec::new() };
    let etcd = Etcd::start_with(options, &addresses).unwrap();
    let (certificate, key) = clients.issue("fleet");
    let good = EtcdConfig {
        ca: Some(servers.pem()),
        certificate: Some(certificate),
        key: Some(key),
        ..config(&etcd)
    };
    let store = EtcdStore::connect(good.clone(), None).await.unwrap();
    let start = put(&store, "k", "1").await.unwrap();
    let mut watch = store.watch("", start - 1).await.unwrap();
    assert_eq!(watch.next().await.unwrap().revision, start);

    let (certificate, key) = Authority::new().issue("fleet");
    let http = good.endpoints[0].replace("https", "http");
    let by_name = good.endpoints[0].replace(&addresses[0].to_string(), "localhost");
    for (config, word) in [
        (EtcdConfig { ca: Some(clients.pem()), ..good.clone() }, "not signed by an authority in etcd_cafile"),
        (
            EtcdConfig { certificate: None, key: None, ..good.clone() },
            "does not take the certificate of etcd_certfile, or wants one",
        ),
        (
            EtcdConfig { certificate: Some(certificate), key: Some(key), ..good.clone() },
            "does not take the certificate of etcd_certfile, or wants one",
        ),
    ] {
        let error = refused(config).await;
        let StoreError::Denied(message) = &error else { panic!("{error:?}") };
        assert!(message.contains(word) && message.contains(&etcd.endpoint(0)), "{message}");
    }
    let error = refused(EtcdConfig { endpoints: vec![http.clone()], ..good.clone() }).await;
    assert!(error.to_string().contains(&http), "{error}");
    // It is reached as localhost only if it listens there.
    let error = refused(EtcdConfig { endpoints: vec![by_name], ..good }).await;
    assert!(error.to_string().contains("localhost"), "{error}");
}

/// Out of space: writes say so, reads go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_without_space_says_so() {
    let arguments = vec!["--quota-backend-bytes=4000000".to_owned()];
    let options = EtcdOptions { members: 1, tls: None, arguments };
    let etcd = Etcd::start_with(options, &Etcd::addresses(1).unwrap()).unwrap();
    let store = connect(&etcd).await;
    let error = loop {
        match store.commit(Txn::of(Op::put("k", vec![7; 1_000_000]))).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    let StoreError::Unavailable(message) = &error else { panic!("{error:?}") };
    assert!(message.contains("alarm NOSPACE") && message.contains(&etcd.endpoint(0)), "{message}");
    assert!(store.get("k").await.unwrap().is_some());
    let health = store.health().await;
    let problems = health[0].member.as_ref().unwrap().problems.join(" ");
    assert!(problems.contains("NOSPACE"), "{problems}");
}
