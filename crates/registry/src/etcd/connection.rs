//! One connection to one member: TCP, TLS and HTTP/2, and what is wrong when one of them fails.
//!
//! A member that is gone without a word is found out by pings. They are at least five seconds apart, since etcd ends
//! connections that ping more often; calls have deadlines of their own and notice sooner.

use super::config::{Endpoint, Settings};
use super::generated::auth_client::AuthClient;
use super::generated::kv_client::KvClient;
use super::generated::lease_client::LeaseClient;
use super::generated::maintenance_client::MaintenanceClient;
use super::generated::watch_client::WatchClient;
use super::status::{self, clean};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError};
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, Uri};
use tonic::metadata::{Ascii, MetadataValue};

/// Silence after which the member is pinged: etcd's least is five seconds.
const PING_AFTER: Duration = Duration::from_secs(6);
/// How long it may take to answer that.
const PING_DEADLINE: Duration = Duration::from_secs(3);
/// The largest answer, bytes. One entry is at most 1.5 MB; of more entries fewer are asked for.
const MAX_ANSWER: usize = 16 << 20;

const NO_HTTP2: &str = "it does not speak HTTP/2, so it has no etcd API v3; fleet needs etcd 3.4 or newer";

/// Why there is no connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Obstacle {
    /// It may go away by itself.
    Unreachable(String),
    /// Somebody has to change credentials or certificates.
    Denied(String),
    /// There is something else than an etcd that fleet can use.
    Unusable(String),
}

/// A connection. It is closed when the last clone of its clients and this are gone.
pub(super) struct Connection {
    endpoint: Endpoint,
    channel: Channel,
    origin: Uri,
    /// What says who we are, once that was asked for.
    token: Option<MetadataValue<Ascii>>,
    with_login: bool,
    noted: Noted,
    /// Ends with the connection.
    alive: watch::Receiver<()>,
    _driver: JoinSet<()>,
}

impl Connection {
    /// Connects. Has no deadline of its own.
    pub(super) async fn open(endpoint: &Endpoint, settings: &Settings) -> Result<Self, Obstacle> {
        let unreachable = |problem: String| Obstacle::Unreachable(format!("{endpoint}: {problem}"));
        let stream = TcpStream::connect((endpoint.host.as_str(), endpoint.port)).await;
        let stream = stream.map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => unreachable("connection refused".to_owned()),
            _ => unreachable(error.to_string()),
        })?;
        let limit = u32::try_from((PING_AFTER + PING_DEADLINE).as_millis()).unwrap_or(u32::MAX);
        stream.set_nodelay(true).map_err(|e| unreachable(e.to_string()))?;
        // Frees the buffers of a dead connection, too.
        let set = rustix::net::sockopt::set_tcp_user_timeout(&stream, limit);
        set.map_err(|e| unreachable(e.to_string()))?;
        match &settings.tls {
            Some(tls) if endpoint.tls => {
                let name = ServerName::try_from(endpoint.host.clone())
                    .map_err(|e| Obstacle::Unusable(format!("{endpoint}: {e}")))?;
                let stream = TlsConnector::from(tls.clone()).connect(name, stream).await;
                let stream = stream.map_err(|error| explain(endpoint, &error))?;
                Self::speak(endpoint, settings, Noting::new(endpoint, stream)).await
            }
            _ => Self::speak(endpoint, settings, Noting::new(endpoint, stream)).await,
        }
    }

    async fn speak(
        endpoint: &Endpoint,
        settings: &Settings,
        stream: Noting<impl AsyncRead + AsyncWrite + Unpin + Send + 'static>,
    ) -> Result<Self, Obstacle> {
        let noted = stream.noted.clone();
        let handshake = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_AFTER)
            .keep_alive_timeout(PING_DEADLINE)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .max_header_list_size(16 << 10)
            .handshake(TokioIo::new(stream))
            .await;
        let (send, driver) =
            handshake.map_err(|e| Obstacle::Unreachable(format!("{endpoint}: {}", innermost(&e))))?;
        let (ends, alive) = watch::channel(());
        let mut tasks = JoinSet::new();
        let name = endpoint.clone();
        tasks.spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!("connection to etcd at {name} broke: {}", innermost(&error));
            }
            drop(ends);
        });
        let scheme = if endpoint.tls { "https" } else { "http" };
        let authority = match endpoint.host.contains(':') {
            true => format!("[{}]:{}", endpoint.host, endpoint.port),
            false => format!("{}:{}", endpoint.host, endpoint.port),
        };
        let origin = Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build();
        let origin = origin.map_err(|e| Obstacle::Unusable(format!("{endpoint}: {e}")))?;
        Ok(Connection {
            endpoint: endpoint.clone(),
            channel: Channel { send },
            origin,
            token: None,
            with_login: settings.login.is_some(),
            noted,
            alive,
            _driver: tasks,
        })
    }

    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint.url
    }

    /// From now on calls carry this token.
    pub(super) fn set_token(&mut self, token: MetadataValue<Ascii>) {
        self.token = Some(token);
    }

    /// Waits for its end.
    pub(super) async fn closed(&self) {
        let mut alive = self.alive.clone();
        // Nothing is ever sent: an answer means that the sender is gone.
        while alive.changed().await.is_ok() {}
    }

    /// Waits until a request can be sent: an error says that nothing was sent.
    pub(super) async fn ready(&self) -> Result<(), String> {
        let mut channel = self.channel.clone();
        let ready = std::future::poll_fn(|context| channel.send.poll_ready(context)).await;
        ready.map_err(|e| format!("{}: the connection is closed ({})", self.endpoint, innermost(&e)))
    }

    /// A request with what every call carries: who we are, that the member has to have a leader, and the deadline.
    pub(super) fn request<T>(&self, message: T, timeout: Option<Duration>) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        // A member that lost the others answers at once then, instead of after a long time or never.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        if let Some(timeout) = timeout {
            request.set_timeout(timeout);
        }
        request
    }

    /// What reading from it ran into that says more than the errors of calls.
    pub(super) fn obstacle(&self) -> Option<Obstacle> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What an error answer means.
    pub(super) fn failure(&self, status: &Status) -> status::Failure {
        // Where the transport failed its error says more than tonic's text.
        let text = match status.source() {
            Some(source) => Status::new(status.code(), innermost(source)),
            None => status.clone(),
        };
        status::read(&text, &self.endpoint.url, self.with_login)
    }

    pub(super) fn kv(&self) -> KvClient<Channel> {
        KvClient::with_origin(self.channel.clone(), self.origin.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    pub(super) fn watch(&self) -> WatchClient<Channel> {
        WatchClient::with_origin(self.channel.clone(), self.origin.clone())
            .max_decoding_message_size(MAX_ANSWER)
    }

    pub(super) fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::with_origin(self.channel.clone(), self.origin.clone())
    }

    pub(super) fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::with_origin(self.channel.clone(), self.origin.clone())
    }

    pub(super) fn auth(&self) -> AuthClient<Channel> {
        AuthClient::with_origin(self.channel.clone(), self.origin.clone())
    }
}

/// What the generated clients send their calls through.
#[derive(Clone)]
pub(super) struct Channel {
    send: SendRequest<Body>,
}

impl tonic::codegen::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.send.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.send.send_request(request))
    }
}

type Noted = Arc<Mutex<Option<Obstacle>>>;

/// A stream that notes what HTTP/2 does not tell: that the other side refuses our certificate (with TLS 1.3 that comes
/// after the handshake), and that it speaks HTTP/1.
struct Noting<S> {
    stream: S,
    endpoint: Endpoint,
    noted: Noted,
    first: bool,
}

impl<S> Noting<S> {
    fn new(endpoint: &Endpoint, stream: S) -> Self {
        Noting { stream, endpoint: endpoint.clone(), noted: Noted::default(), first: true }
    }

    fn note(&self, obstacle: Obstacle) {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(obstacle);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Noting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        match &result {
            Err(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
                self.note(explain(&self.endpoint, error));
            }
            Ok(()) if std::mem::take(&mut self.first) && buffer.filled()[before..].starts_with(b"HTTP/1") => {
                self.note(Obstacle::Unusable(format!("{}: {NO_HTTP2}", self.endpoint)));
            }
            _ => {}
        }
        Poll::Ready(result)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noting<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What caused an error, as text.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    clean(&last.to_string())
}

/// What a failed TLS handshake means.
fn explain(endpoint: &Endpoint, error: &io::Error) -> Obstacle {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        let problem = match error.kind() {
            // What a server does that does not expect TLS.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                "it closed the connection during the TLS handshake; is its URL http://…?".to_owned()
            }
            _ => error.to_string(),
        };
        return Obstacle::Unreachable(format!("{endpoint}: {problem}"));
    };
    let problem = match tls {
        rustls::Error::InvalidMessage(_) => {
            return Obstacle::Unusable(format!("{endpoint}: it does not speak TLS; is its URL http://…?"));
        }
        rustls::Error::NoApplicationProtocol
        | rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            return Obstacle::Unusable(format!("{endpoint}: {NO_HTTP2}"));
        }
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "its certificate is not signed by an authority in etcd_cafile".to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!("its certificate is not for {}", endpoint.host),
        rustls::Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => "its certificate has expired or is not valid yet; are the clocks right?".to_owned(),
        rustls::Error::AlertReceived(alert) => refused(*alert),
        other => format!("TLS: {other}"),
    };
    Obstacle::Denied(format!("{endpoint}: {problem}"))
}

/// What a member's TLS alert says of our certificate.
fn refused(alert: AlertDescription) -> String {
    use AlertDescription::*;
    match alert {
        CertificateRequired
        | BadCertificate
        | UnknownCA
        | CertificateUnknown
        | DecryptError
        | AccessDenied
        | CertificateExpired
        | CertificateRevoked
        | UnsupportedCertificate => {
            format!("it does not take the certificate of etcd_certfile, or wants one ({alert:?})")
        }
        other => format!("it ended the connection with the TLS alert {other:?}"),
    }
}
