//! What is logged of refusals, at all levels and by all libraries. In a process of its own, since there is one log in each.
#![allow(clippy::unwrap_used)]

use fleet_cluster::model::MachineId;
use fleet_link::ca::{Authority, MachineKey};
use fleet_link::dial::{Address, join};
use fleet_link::serve::{Joining, Member, Membership, Options, Refusal, serve};
use fleet_link::token::{Terms, Token, TokenError, TokenRecord};
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);

/// Whoever has one of these tokens.
struct Tokens(Vec<TokenRecord>);

impl Membership for Tokens {
    async fn join(&self, joining: Joining) -> Result<(), Refusal> {
        let record = self.0.iter().find(|record| record.id == joining.token).ok_or(TokenError::Wrong)?;
        Ok(record.check(&joining.secret, SystemTime::now())?)
    }

    async fn renew(&self, _: &Member) -> Result<(), Refusal> {
        Ok(())
    }

    async fn admit(&self, _: &Member) -> Result<(), Refusal> {
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn refusals_are_logged_once_with_the_address_and_without_secrets() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();

    let authority = Arc::new(Authority::create(SystemTime::now()).unwrap());
    let terms = Terms { ttl: Duration::from_secs(3600), uses: None };
    let create = || Token::create(authority.root().fingerprint(), &terms, SystemTime::now()).unwrap();
    let ((token, record), (other, other_record)) = (create(), create());
    let wrong = Token { id: other.id, ..token.clone() };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let socket = listener.local_addr().unwrap();
    let addresses: [Address; 1] = [socket.to_string().parse().unwrap()];
    let (sessions, _ends) = tokio::sync::mpsc::channel(1);
    let cancel = CancellationToken::new();
    let tokens = Arc::new(Tokens(vec![record, other_record]));
    let served =
        tokio::spawn(serve(listener, authority, tokens, Options::default(), sessions, cancel.clone()));

    let machine = MachineId::parse(&"1".repeat(32)).unwrap();
    let key = MachineKey::generate().unwrap();
    let key_text = key.to_pem();
    for _ in 0..3 {
        let key = MachineKey::generate().unwrap();
        let refused = join(&addresses, &wrong, &machine, key, Default::default());
        assert!(tokio::time::timeout(DEADLINE, refused).await.unwrap().is_err());
    }
    let mut plain = TcpStream::connect(socket).await.unwrap();
    plain.write_all(b"GET /fleet/v1/units HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, plain.read_to_end(&mut rest)).await.unwrap();
    let joined = join(&addresses, &token, &machine, key, Default::default());
    tokio::time::timeout(DEADLINE, joined).await.unwrap().unwrap();
    cancel.cancel();
    tokio::time::timeout(DEADLINE, served).await.unwrap().unwrap().unwrap();

    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("refused 127.0.0.1:")).collect();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("the join token is wrong"), "{}", lines[0]);
    assert!(lines[1].contains("it does not speak TLS; is it http where https is due?"), "{}", lines[1]);
    assert!(log.contains("h2::"), "the libraries' own lines are not there");

    // Not in any form that it has: the token's text, the secret's bytes as hexadecimal, as numbers, as a byte string.
    for token in [&token, &other] {
        let text = token.to_text();
        let secret =
            &data_encoding::BASE64URL_NOPAD.decode(&text.as_bytes()["fleet1-".len()..]).unwrap()[6..30];
        assert!(!log.contains(&text[20..50]));
        assert!(!log.contains(&data_encoding::HEXLOWER.encode(secret)[..20]));
        assert!(!log.contains(format!("{secret:?}").trim_matches(['[', ']'])));
        let escaped: String =
            secret.iter().flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect();
        assert!(!log.contains(&escaped));
    }
    assert!(!log.contains(key_text.lines().nth(1).unwrap()));
}
