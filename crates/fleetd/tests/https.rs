//! The API over https: the real server, port and client, on this host. Who may do what, and what becomes of everybody else.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_api::client::{
    Client, Credentials, CredentialsError, Endpoint, Error, EventQuery, EventStream, Options, StateFilter,
    Tls,
};
use fleet_api::types::{JoinTokenRequest, MetadataOp, NewUser, Unit, UnitOption, UserRequest};
use fleet_cluster::{engine::Policy, model::MachineId};
use fleet_link::ca::{Authority, MachineKey};
use fleet_link::serve::{Guests, Limits, Options as PortOptions, serve};
use fleet_registry::EmbeddedStore;
use fleetd::api::Api;
use fleetd::server::{Server, ServerConfig};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// No test waits longer for anything; none expects anything to be faster.
const DEADLINE: Duration = Duration::from_secs(60);
const MACHINE: &str = "4a1e0c2fb7d94e6c8f3a51d2c07e9b11";

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// Everything that anybody logs, at all levels.
static LOG: LazyLock<Arc<Mutex<Vec<u8>>>> = LazyLock::new(|| {
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || Writer(writer.clone()))
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    log
});

struct Writer(Arc<Mutex<Vec<u8>>>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn log() -> String {
    String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned()
}

/// A server with its unix socket and its port.
struct Rig {
    server: Server<EmbeddedStore>,
    authority: Arc<Authority>,
    address: SocketAddr,
    directory: tempfile::TempDir,
    cancel: CancellationToken,
    _tasks: JoinSet<anyhow::Result<()>>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Rig {
    async fn new() -> Rig {
        Rig::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Rig {
        LazyLock::force(&LOG);
        let directory = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(directory.path()).unwrap();
        let cancel = CancellationToken::new();
        let config = ServerConfig {
            machine: MachineId::parse(MACHINE).unwrap(),
            agent_ttl: Duration::from_secs(30),
            disable_engine: true,
            shared_registry: false,
            address: None,
            policy: Policy::for_ttl(Duration::from_secs(30)),
        };
        let server = Server::new(store, config, cancel.clone());
        let mut tasks = JoinSet::new();
        server.start(&mut tasks);
        let api = Arc::new(Api::new(server.clone(), 100, cancel.clone()));
        let unix = UnixListener::bind(directory.path().join("fleet.sock")).unwrap();
        let local = api.clone();
        tasks.spawn(async move {
            loop {
                let (stream, _) = unix.accept().await?;
                tokio::spawn(local.clone().serve(stream));
            }
        });
        let authority = Arc::new(server.authority().await.unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let guests = Guests::new(move |stream, visitor| api.clone().serve_guest(stream, visitor));
        let options = PortOptions {
            addresses: vec!["127.0.0.1".to_owned()],
            guests: Some(guests),
            limits,
            ..PortOptions::default()
        };
        let (sessions, mut ends) = tokio::sync::mpsc::channel(4);
        let (port, end) = (
            serve(listener, authority.clone(), Arc::new(server.clone()), options, sessions, cancel.clone()),
            cancel.clone(),
        );
        tasks.spawn(async move { Ok(port.await?) });
        tasks.spawn(async move {
            while ends.recv().await.is_some() {}
            end.cancelled().await;
            Ok(())
        });
        Rig { server, authority, address, directory, cancel, _tasks: tasks }
    }

    /// Through the unix socket.
    fn local(&self) -> Client {
        let path = self.directory.path().join("fleet.sock");
        Client::new(Endpoint::Unix { path }, patient(None))
    }

    fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    fn client(&self, credentials: Credentials<'_>) -> Client {
        Client::new(Endpoint::parse(&self.url()).unwrap(), patient(Some(Tls::new(credentials).unwrap())))
    }

    fn with_token(&self, token: &str) -> Client {
        self.client(Credentials { token: Some(token), ..Credentials::default() })
    }

    async fn user(&self, name: &str, role: &str) -> NewUser {
        let request = UserRequest { name: name.to_owned(), role: role.to_owned(), ..UserRequest::default() };
        self.local().create_user(&request).await.unwrap()
    }

    async fn user_with_certificate(&self, name: &str, role: &str) -> (NewUser, KeyPair) {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let request = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let (name, role) = (name.to_owned(), role.to_owned());
        let request = UserRequest { name, role, request: Some(request), ttl: None };
        (self.local().create_user(&request).await.unwrap(), key)
    }

    /// What an https server says to a request with these headers, from a client that shows a certificate or none.
    async fn raw(&self, shown: Option<(&str, &str)>, alpn: &[&[u8]], head: &str) -> String {
        let mut stream = self.tls(shown, alpn).await.unwrap();
        let request = format!("{head}Host: x\r\nConnection: close\r\n\r\n");
        let mut answer = String::new();
        let _ = stream.write_all(request.as_bytes()).await;
        match within("an answer", stream.read_to_string(&mut answer)).await {
            Ok(_) => answer,
            Err(error) => format!("{answer}{error}"),
        }
    }

    async fn tls(
        &self,
        shown: Option<(&str, &str)>,
        alpn: &[&[u8]],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.authority.root().certificate().clone()).unwrap();
        let builder = rustls::ClientConfig::builder_with_provider(fleet_trust::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let stream = TcpStream::connect(self.address).await?;
        // As curl: by the address, which the certificate names.
        let name = rustls::pki_types::ServerName::from(self.address.ip());
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }
}

fn patient(tls: Option<Tls>) -> Options {
    Options { request_timeout: DEADLINE, connect_timeout: DEADLINE, tls, ..Options::default() }
}

fn unit(name: &str) -> Unit {
    let option =
        UnitOption { section: "Service".into(), name: "ExecStart".into(), value: "/bin/true".into() };
    Unit { name: name.into(), desired_state: "inactive".into(), options: vec![option], ..Unit::default() }
}

/// 0 for an answer, the status code of a refusal.
fn code<T>(result: Result<T, Error>) -> u16 {
    match result {
        Ok(_) => 0,
        Err(error) => error.code().unwrap_or_else(|| panic!("{error}")),
    }
}

/// What happens to requests of a kind that takes a viewer, an operator, an admin.
async fn may(client: &Client) -> (Vec<u16>, Vec<u16>, Vec<u16>) {
    let edit = MetadataOp {
        op: "add".into(),
        path: format!("/{MACHINE}/metadata/a"),
        value: Some(serde_json::json!({"value": "b"})),
    };
    let viewer = vec![
        code(client.units().await),
        code(client.machines().await),
        code(client.states(&StateFilter::default()).await),
        code(client.members().await),
        code(client.explain("a.service").await),
        code(client.unit_file("a.service").await),
        code(client.events(&EventQuery::default()).await),
    ];
    let operator = vec![
        code(client.put_unit(&unit("b.service")).await),
        code(client.delete_unit("b.service").await),
        code(client.patch_machines(&[edit]).await),
    ];
    let nobody = UserRequest { name: "x".into(), role: "none".into(), ..UserRequest::default() };
    let admin = vec![
        code(client.join_tokens().await),
        code(client.create_join_token(&JoinTokenRequest::default()).await),
        code(client.delete_join_token("123456789012").await),
        code(client.delete_machine(MACHINE).await),
        code(client.users().await),
        code(client.set_role("nobody", "viewer").await),
        code(client.delete_user("nobody").await),
        // 400: it may, but that is no role.
        code(client.create_user(&nobody).await),
    ];
    (viewer, operator, admin)
}

const ADMIN: [u16; 8] = [0, 0, 0, 0, 0, 0, 0, 400];

#[tokio::test]
async fn each_role_may_what_it_may() {
    let rig = Rig::new().await;
    rig.local().put_unit(&unit("a.service")).await.unwrap();
    for (role, operator, admin) in
        [("viewer", [403; 3], [403; 8]), ("operator", [0; 3], [403; 8]), ("admin", [0; 3], ADMIN)]
    {
        let (user, key) = rig.user_with_certificate(role, role).await;
        let key = key.serialize_pem();
        let certificate = Some((user.certificate.as_str(), key.as_str()));
        let (by_token, ca) = (rig.with_token(&user.token), Some(user.ca.as_str()));
        let by_certificate = rig.client(Credentials { ca, token: None, certificate });
        for client in [by_token, by_certificate] {
            let expected = (vec![0; 7], operator.to_vec(), admin.to_vec());
            assert_eq!(may(&client).await, expected, "{role}");
        }
    }
    assert_eq!(may(&rig.local()).await, (vec![0; 7], vec![0; 3], ADMIN.to_vec()), "the unix socket");
    let error = rig.with_token(&rig.user("vera", "viewer").await.token).users().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "googleapi: Error 403: user vera has the role viewer; this takes the role admin"
    );
}

#[tokio::test]
async fn who_shows_nothing_gets_nothing() {
    let rig = Rig::new().await;
    let ca = rig.authority.root().to_pem();
    let nobody = rig.client(Credentials { ca: Some(&ca), ..Credentials::default() });
    let (viewer, operator, admin) = may(&nobody).await;
    assert!([viewer, operator, admin].concat().iter().all(|code| *code == 401));
    assert!(rig.local().units().await.unwrap().is_empty());
    for path in ["", "/", "/fleet/v1/discovery", "/fleet/v1/nonsuch", "/v1-alpha/units", "/metrics"] {
        let answer = rig.raw(None, &[b"http/1.1"], &format!("GET {path} HTTP/1.1\r\n")).await;
        let refused = answer.starts_with("HTTP/1.1 401") || answer.starts_with("HTTP/1.1 400");
        assert!(refused && !answer.contains("fleet v1"), "{path}: {answer}");
    }
    let answer = rig.raw(None, &[], "GET /fleet/v1/units HTTP/1.1\r\n").await;
    assert!(answer.contains("Www-Authenticate: Bearer realm=\"fleet\"\r\n"), "{answer}");
    assert!(answer.contains("fleetctl user create makes them"), "{answer}");
    for (header, says) in [
        ("Basic cm9vdDpyb290", "Authorization has to be"),
        ("Bearer", "Authorization has to be"),
        ("Bearer x", "not a user token: those begin with"),
        ("bearer fleetuser1-abc", "it has 14 characters instead of 99"),
    ] {
        let head = format!("GET /fleet/v1/units HTTP/1.1\r\nAuthorization: {header}\r\n");
        let answer = rig.raw(None, &[b"http/1.1"], &head).await;
        assert!(answer.starts_with("HTTP/1.1 401") && answer.contains(says), "{header}: {answer}");
    }
    assert!(log().contains("it shows neither a user token nor a certificate to the API"));
}

#[tokio::test]
async fn wrong_removed_and_expired_tokens_are_told_apart_only_to_their_owners() {
    let rig = Rig::new().await;
    let ann = rig.user("ann", "viewer").await;
    let client = rig.with_token(&ann.token);
    client.units().await.unwrap();
    // The ID of one token with the secret of another.
    use fleet_trust::token::{Kind, Token};
    let token = Token::parse(Kind::User, &ann.token).unwrap();
    let forged = Token { secret: Token::generate(token.root).unwrap().secret, ..token };
    let wrong = "googleapi: Error 401: the user token is wrong: this cluster knows no such token (was its user removed?)";
    let says = async |token: &str| rig.with_token(token).units().await.unwrap_err().to_string();
    assert_eq!(says(&forged.to_text(Kind::User)).await, wrong);
    // Removed, on the same connection.
    assert!(rig.local().delete_user("ann").await.unwrap());
    assert_eq!(client.units().await.unwrap_err().to_string(), wrong);
    assert!(!rig.local().delete_user("ann").await.unwrap());
    // A user of the same name is another one.
    let (again, _) = rig.user_with_certificate("ann", "viewer").await;
    assert_eq!(client.units().await.unwrap_err().to_string(), wrong);
    rig.with_token(&again.token).units().await.unwrap();
    let refused = rig
        .local()
        .create_user(&UserRequest { name: "ann".into(), role: "admin".into(), ..UserRequest::default() })
        .await
        .unwrap_err();
    assert_eq!(refused.to_string(), "googleapi: Error 409: user ann exists already");
    // Expired.
    let request = UserRequest {
        name: "bob".into(),
        role: "viewer".into(),
        ttl: Some("1s".into()),
        ..UserRequest::default()
    };
    let bob = rig.local().create_user(&request).await.unwrap();
    let client = rig.with_token(&bob.token);
    within("the token expires", async {
        loop {
            match client.units().await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(error) => {
                    return assert!(error.to_string().contains("access of user bob has expired"), "{error}");
                }
            }
        }
    })
    .await;
    // And may be made anew.
    rig.local().create_user(&request).await.unwrap();
    let list = rig.local().users().await.unwrap();
    let list: Vec<_> = list.iter().map(|it| (it.name.as_str(), it.role.as_str(), it.certificate)).collect();
    assert_eq!(list, [("ann", "viewer", true), ("bob", "viewer", false)]);
}

/// Reads a stream until it ends, in whatever way.
async fn ends(events: &mut EventStream) {
    within("the stream ends", async { while let Ok(Some(_)) = events.next().await {} }).await;
}

#[tokio::test]
async fn open_streams_end_with_the_access() {
    let rig = Rig::new().await;
    let stream = async |name: &str, ttl: Option<&str>| {
        let request = UserRequest {
            name: name.to_owned(),
            role: "viewer".into(),
            ttl: ttl.map(str::to_owned),
            ..UserRequest::default()
        };
        let user = rig.local().create_user(&request).await.unwrap();
        let query = EventQuery { snapshot: true, ..EventQuery::default() };
        rig.with_token(&user.token).events(&query).await.unwrap()
    };
    let (mut removed, mut expiring) = (stream("ann", None).await, stream("bob", Some("2s")).await);
    let mut other = stream("cid", None).await;
    assert!(matches!(within("ready", removed.next()).await, Ok(Some(_))));
    rig.local().delete_user("ann").await.unwrap();
    ends(&mut removed).await;
    ends(&mut expiring).await;
    // A role that is still enough changes nothing.
    rig.local().set_role("cid", "operator").await.unwrap().unwrap();
    rig.local().put_unit(&unit("a.service")).await.unwrap();
    within("an event", async {
        loop {
            if let Some((_, fleet_api::events::Event::Unit(_))) = other.next().await.unwrap() {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_change_of_role_counts_at_once() {
    let rig = Rig::new().await;
    let (user, key) = rig.user_with_certificate("ann", "viewer").await;
    let key = key.serialize_pem();
    let certificate = Some((user.certificate.as_str(), key.as_str()));
    let client = rig.client(Credentials { ca: Some(&user.ca), token: None, certificate });
    let put = async || code(client.put_unit(&unit("a.service")).await);
    assert_eq!(put().await, 403);
    assert_eq!(rig.local().set_role("ann", "operator").await.unwrap().unwrap().role, "operator");
    assert_eq!(put().await, 0);
    rig.local().set_role("ann", "viewer").await.unwrap();
    assert_eq!(put().await, 403);
    assert_eq!(rig.local().set_role("bob", "viewer").await.unwrap(), None);
    rig.local().delete_user("ann").await.unwrap();
    let error = client.units().await.unwrap_err().to_string();
    assert!(
        error.contains("401") && error.contains("certificate of user ann is not valid any more"),
        "{error}"
    );
}

#[tokio::test]
async fn machines_are_no_users_and_users_no_machines() {
    let rig = Rig::new().await;
    let (token, _) = rig
        .server
        .create_token(fleet_link::token::Terms { ttl: Duration::from_secs(60), uses: None })
        .await
        .unwrap();
    let addresses = [rig.address.to_string().parse().unwrap()];
    let id = MachineId::parse(&"1".repeat(32)).unwrap();
    let key = MachineKey::generate().unwrap();
    let joined = fleet_link::dial::join(&addresses, &token, &id, key, Default::default());
    let machine = within("the machine joins", joined).await.unwrap();
    let key = machine.key().to_pem();
    let answer = rig
        .raw(Some((&machine.certificate_pem(), &key)), &[b"http/1.1"], "GET /fleet/v1/units HTTP/1.1\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("machines are no users"), "{answer}");
    // A machine with a user's token is that user.
    let user = rig.user("ann", "viewer").await;
    let head = format!("GET /fleet/v1/units HTTP/1.1\r\nAuthorization: Bearer {}\r\n", user.token);
    let answer = rig.raw(Some((&machine.certificate_pem(), &key)), &[b"http/1.1"], &head).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // A join token is no user token.
    let head = format!("GET /fleet/v1/units HTTP/1.1\r\nAuthorization: Bearer {}\r\n", *token.to_text());
    let answer = rig.raw(None, &[b"http/1.1"], &head).await;
    assert!(answer.starts_with("HTTP/1.1 401") && answer.contains("not a user token"), "{answer}");
    // A user's certificate where machines speak.
    let (user, key) = rig.user_with_certificate("bob", "admin").await;
    let key = key.serialize_pem();
    let mut stream = rig.tls(Some((&user.certificate, &key)), &[b"h2"]).await.unwrap();
    let mut rest = Vec::new();
    let _ = within("the end of the connection", stream.read_to_end(&mut rest)).await;
    within("the refusal", async {
        while !log().contains("its certificate is a user's, and it wants to be a machine") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn only_servers_of_the_cluster_are_trusted_and_only_its_users() {
    let (rig, other) = (Rig::new().await, Rig::new().await);
    let (user, key) = other.user_with_certificate("ann", "admin").await;
    let key = key.serialize_pem();
    // Neither by token nor by CA; the token is not sent.
    for credentials in [
        Credentials { token: Some(&user.token), ..Credentials::default() },
        Credentials { ca: Some(&user.ca), ..Credentials::default() },
    ] {
        let error = rig.client(credentials).units().await.unwrap_err();
        assert!(error.is_no_answer(), "{error}");
        assert!(error.to_string().ends_with("tls: its certificate is not of this cluster"), "{error}");
    }
    // A foreign certificate, to a server that is trusted. Whichever comes first, the request or the server's no.
    let ca = rig.authority.root().to_pem();
    let certificate = Some((user.certificate.as_str(), key.as_str()));
    for _ in 0..20 {
        let client = rig.client(Credentials { ca: Some(&ca), token: None, certificate });
        let error = client.units().await.unwrap_err().to_string();
        assert!(error.contains("it does not take our certificate"), "{error}");
    }
    // A token with the CA of another cluster is not used at all.
    let mixed = Credentials { ca: Some(&ca), token: Some(&user.token), certificate: None };
    assert!(matches!(Tls::new(mixed), Err(CredentialsError::OtherCluster(_))));
    let own = rig.user("ann", "viewer").await;
    rig.client(Credentials { ca: Some(&own.ca), token: Some(&own.token), certificate: None })
        .units()
        .await
        .unwrap();
}

#[tokio::test]
async fn http_where_https_is_due_and_the_other_way_round() {
    let rig = Rig::new().await;
    let plain = Client::new(Endpoint::parse(&format!("http://{}", rig.address)).unwrap(), patient(None));
    let error = plain.units().await.unwrap_err();
    assert_eq!(error.to_string(), "googleapi: Error 400: this port of fleetd speaks https, not http");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::parse(&format!("https://{}", listener.local_addr().unwrap())).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    let user = rig.user("ann", "viewer").await;
    let tls = Tls::new(Credentials { token: Some(&user.token), ..Credentials::default() }).unwrap();
    let error = Client::new(endpoint, patient(Some(tls))).units().await.unwrap_err().to_string();
    assert!(error.contains("it does not speak TLS"), "{error}");
}

/// curl offers both, and means HTTP/1.1 as well as HTTP/2; others offer nothing.
#[tokio::test]
async fn clients_without_preference_get_the_api() {
    let rig = Rig::new().await;
    let user = rig.user("ann", "viewer").await;
    let head = format!("GET /fleet/v1/units HTTP/1.1\r\nAuthorization: Bearer {}\r\n", user.token);
    for alpn in [&[b"h2".as_slice(), b"http/1.1"][..], &[b"http/1.1"], &[]] {
        assert!(rig.raw(None, alpn, &head).await.starts_with("HTTP/1.1 200"), "{alpn:?}");
    }
    let text = rig.raw(None, &[], &head.replace("/units", "/discovery")).await;
    assert!(
        text.contains("\"rootUrl\":\"https://x/\"") || text.contains("\"rootUrl\": \"https://x/\""),
        "{text}"
    );
}

#[tokio::test]
async fn strangers_take_no_place_for_long_and_guests_have_theirs() {
    // Before it has run out a busy machine is through with the handshake of one who is known.
    let short = Duration::from_secs(2);
    let rig = Rig::with(Limits { idle: short, guests: 1, ..Limits::default() }).await;
    let user = rig.user("ann", "viewer").await;
    // Says nothing, or nothing that counts, and is closed.
    let mut silent = rig.tls(None, &[b"http/1.1"]).await.unwrap();
    let mut rest = Vec::new();
    let _ = within("the end of the connection", silent.read_to_end(&mut rest)).await;
    // One who is known stays, also when idle.
    let client = rig.with_token(&user.token);
    let mut events = client.events(&EventQuery { snapshot: true, ..EventQuery::default() }).await.unwrap();
    within("ready", events.next()).await.unwrap().unwrap();
    tokio::time::sleep(2 * short).await;
    let error = rig.with_token(&user.token).units().await.unwrap_err();
    assert_eq!(error.to_string(), "googleapi: Error 503: too many users are connected");
    rig.local().put_unit(&unit("a.service")).await.unwrap();
    within("an event", events.next()).await.unwrap().unwrap();
}

#[tokio::test]
async fn no_log_has_a_token_or_a_key() {
    let rig = Rig::new().await;
    let (user, key) = rig.user_with_certificate("ann", "viewer").await;
    let client = rig.with_token(&user.token);
    client.units().await.unwrap();
    assert_eq!(code(client.users().await), 403);
    rig.local().delete_user("ann").await.unwrap();
    assert_eq!(code(client.units().await), 401);
    let log = log();
    assert!(log.contains("made user ann, viewer") && log.contains("removed user ann"));
    let secret = &user.token["fleetuser1-".len()..];
    // Beyond the ID, which is no secret; in base64, and as numbers.
    assert!(!log.contains(&secret[12..30]) && !log.contains(&secret[30..40]));
    let token = fleet_trust::token::Token::parse(fleet_trust::token::Kind::User, &user.token).unwrap();
    assert!(!log.contains(format!("{:?}", token.secret.to_bytes()).trim_matches(['[', ']'])));
    assert!(!log.contains(key.serialize_pem().lines().nth(1).unwrap()));
}

#[tokio::test]
async fn certificates_expire() {
    let rig = Rig::new().await;
    let (user, key) = rig.user_with_certificate("ann", "admin").await;
    // The same user's, of a year ago.
    let request = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let public = fleet_link::ca::PublicKey::from_request_pem(&request).unwrap();
    let year = Duration::from_secs(365 * 86_400);
    let name = fleet_link::user::UserName::parse("ann").unwrap();
    let old = rig.authority.sign_user(&public, &name, year / 2, SystemTime::now() - year).unwrap();
    let key = key.serialize_pem();
    let error = rig
        .client(Credentials { ca: Some(&user.ca), token: None, certificate: Some((&old, &key)) })
        .units()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("it takes our certificate for expired"), "{error}");
}

#[tokio::test]
async fn users_are_made_of_good_names_and_requests() {
    let rig = Rig::new().await;
    let good = || UserRequest { name: "ann".into(), role: "viewer".into(), ..UserRequest::default() };
    for (request, says) in [
        (UserRequest { name: "a b".into(), ..good() }, "\"a b\" is no name of a user"),
        (UserRequest { name: String::new(), ..good() }, "is no name of a user"),
        (UserRequest { role: "root".into(), ..good() }, "invalid role \"root\""),
        (UserRequest { ttl: Some("0s".into()), ..good() }, "ttl must be from 1s to 3660 days"),
        (UserRequest { ttl: Some("long".into()), ..good() }, "ttl: "),
        (
            UserRequest { request: Some("x".into()), ..good() },
            "request: no certificate request in the PEM text",
        ),
    ] {
        let error = rig.local().create_user(&request).await.unwrap_err();
        assert_eq!(error.code(), Some(400));
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(rig.local().users().await.unwrap().is_empty());
    assert_eq!(code(rig.local().set_role("a b", "viewer").await), 0, "no such user");
}
