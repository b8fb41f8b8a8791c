//! A peer that can send what no agent sends: it speaks TLS and HTTP/2 and puts gRPC messages together by hand.

use super::{DEADLINE, within};
use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use fleet_link::ca::{Identity, Root, SERVER_NAME};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::{TlsConnector, client::TlsStream};

/// What a request sends, piece by piece. It ends when all senders are dropped.
#[derive(Debug)]
struct Outgoing(mpsc::Receiver<Bytes>);

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// A connection with a server, with a certificate or without.
#[derive(Debug)]
pub(super) struct Rogue {
    send: SendRequest<Outgoing>,
    _driver: JoinSet<()>,
}

/// A call whose request is still being sent.
#[derive(Debug)]
pub(super) struct Call {
    /// More of the request.
    pub(super) out: mpsc::Sender<Bytes>,
    answer: Response<Incoming>,
}

/// TLS with a server of a cluster.
pub(super) async fn tls(
    address: &str,
    root: &Root,
    identity: Option<&Identity>,
    protocol: &str,
) -> Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(root.certificate().clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let certificate = CertificateDer::from_pem_slice(identity.certificate_pem().as_bytes())?;
            let key = PrivateKeyDer::from_pem_slice(identity.key().to_pem().as_bytes())?;
            builder.with_client_auth_cert(vec![certificate], key)?
        }
    };
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect(address).await?;
    let connector = TlsConnector::from(Arc::new(config));
    Ok(within("TLS", connector.connect(ServerName::try_from(SERVER_NAME)?, stream)).await??)
}

impl Rogue {
    pub(super) async fn connect(address: &str, root: &Root, identity: Option<&Identity>) -> Result<Rogue> {
        let stream = tls(address, root, identity, "h2").await?;
        let (send, driver) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // How it ends, the calls tell.
            let _ = driver.await;
        });
        Ok(Rogue { send, _driver: tasks })
    }

    async fn call(&mut self, method: &str, pieces: mpsc::Receiver<Bytes>) -> Result<Response<Incoming>> {
        let request = Request::post(format!("https://{SERVER_NAME}/fleet.link.v1.Link/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Outgoing(pieces))?;
        Ok(within("an answer", self.send.send_request(request)).await??)
    }

    /// Calls a method with bytes for which the server ends the call, or the whole connection.
    pub(super) async fn misuse(&mut self, method: &str, request: Bytes) -> Result<()> {
        let (out, pieces) = mpsc::channel(1);
        out.send(request).await?;
        drop(out);
        match self.call(method, pieces).await {
            Ok(answer) => {
                // Whatever it says; who was refused sees that in the log.
                let _ = within("the answer's end", answer.into_body().collect()).await?;
                Ok(())
            }
            Err(error) if error.is::<hyper::Error>() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Begins a session with a hello, which has to be taken.
    pub(super) async fn session(&mut self, hello: Bytes) -> Result<Call> {
        let (out, pieces) = mpsc::channel(4);
        out.send(hello).await?;
        let answer = self.call("Session", pieces).await?;
        let mut call = Call { out, answer };
        let first = within("a welcome", call.answer.body_mut().frame()).await?;
        let said = || call.answer.headers().get("grpc-message").cloned();
        match first.with_context(|| format!("the session ended before it began: {:?}", said()))?? {
            frame if frame.is_data() => Ok(call),
            frame => bail!("no welcome: {frame:?}"),
        }
    }
}

impl Call {
    /// Sends more, until that is refused; whether all of it went out.
    pub(super) async fn send(&self, piece: Bytes) -> Result<bool> {
        Ok(within("room for a piece", self.out.send(piece)).await?.is_ok())
    }

    /// Ends the request, if it is still being sent, and reads the answer to its end.
    pub(super) async fn ended(self) -> Result<()> {
        let Call { out, answer } = self;
        let end = answer.into_body().collect();
        let ended = tokio::time::timeout(DEADLINE, end).await.context("the server does not end the call")?;
        // A call that was cut off has ended, too.
        drop((ended, out));
        Ok(())
    }
}

/// A message as gRPC frames it.
pub(super) fn framed(message: &[u8]) -> Bytes {
    frame_of(message.len(), message)
}

/// A frame that promises a message of this length.
pub(super) fn frame_of(promised: usize, bytes: &[u8]) -> Bytes {
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(promised).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(bytes);
    frame.into()
}

/// A field of Protocol Buffers that has bytes in it.
fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        field.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
        length >>= 7;
    }
    field.push(u8::try_from(length).unwrap_or_default());
    field.extend_from_slice(bytes);
    field
}

fn number_field(number: u8, value: u8) -> Vec<u8> {
    vec![number << 3, value]
}

/// `FromAgent.hello`, framed.
pub(super) fn hello(machine: &str) -> Bytes {
    let (oldest, newest) = (fleet_link::OLDEST_PROTOCOL, fleet_link::NEWEST_PROTOCOL);
    let fields = [
        number_field(1, u8::try_from(oldest).unwrap_or_default()),
        number_field(2, u8::try_from(newest).unwrap_or_default()),
        bytes_field(3, machine.as_bytes()),
        bytes_field(4, b"10.9.9.9"),
        bytes_field(6, b"2.0.0"),
    ];
    framed(&bytes_field(1, &fields.concat()))
}

/// `FromAgent.probed`, framed: what an agent may send at any time.
pub(super) fn probed() -> Bytes {
    framed(&number_field(5, 1))
}

/// `JoinRequest` with these texts and bytes.
pub(super) fn join_request(token: &str, secret: &[u8], machine: &str, request: &[u8]) -> Bytes {
    let fields = [
        bytes_field(1, token.as_bytes()),
        bytes_field(2, secret),
        bytes_field(3, machine.as_bytes()),
        bytes_field(4, request),
    ];
    framed(&fields.concat())
}
