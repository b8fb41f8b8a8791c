//! One connection to a server: TCP, TLS, HTTP/2, and what to say when one of them fails.

use super::address::Address;
use super::backoff::Trouble;
use crate::wire::generated::{link_client::LinkClient, peers_client::PeersClient};
use crate::wire::{MAX_DOWN, MAX_UP};
use crate::{KeepAlive, ca::SERVER_NAME, tls};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use std::{fmt, io};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response, Uri};
use tonic::{Code, Status};

/// How long a TCP connection, and then TLS and HTTP/2, may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a server may take to answer a call. It may have to ask its registry.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(20);

/// Why there is no session with a server, or no joining through it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address}: {problem}")]
pub struct DialError {
    address: String,
    problem: String,
    pub(crate) trouble: Trouble,
    /// The server does not take our certificate for a session (any more, by its clock).
    pub(crate) unauthenticated: bool,
}

impl DialError {
    /// Whether a server of the cluster has said no, so that trying again is of no use until somebody has done something.
    pub fn is_refusal(&self) -> bool {
        self.trouble == Trouble::Refused
    }

    /// What happened, without the address.
    pub(crate) fn problem(&self) -> &str {
        &self.problem
    }

    pub(crate) fn new(address: &Address, trouble: Trouble, problem: impl fmt::Display) -> Self {
        DialError {
            address: address.to_string(),
            problem: problem.to_string(),
            trouble,
            unauthenticated: false,
        }
    }

    /// Something here or there is not as it should be.
    pub(crate) fn wrong(address: &Address, problem: &dyn fmt::Display) -> Self {
        DialError::new(address, Trouble::Later, problem)
    }

    pub(crate) fn no_address() -> Self {
        DialError {
            address: "nowhere".to_owned(),
            problem: "no address of a server".to_owned(),
            trouble: Trouble::Refused,
            unauthenticated: false,
        }
    }
}

/// A connection. It is closed when this is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    address: Address,
    pub(crate) client: LinkClient<Channel>,
    channel: Channel,
    origin: Uri,
    /// What reading from it ran into; HTTP/2 tells only that it did.
    failure: Failure,
    _driver: JoinSet<()>,
}

type Failure = Arc<Mutex<Option<String>>>;

/// How much a session may have under way to the agent, bytes.
const SESSION_WINDOW: u32 = 1 << 20;

impl Connection {
    pub(crate) async fn open(
        address: &Address,
        config: ClientConfig,
        keep_alive: KeepAlive,
    ) -> Result<Self, DialError> {
        Connection::open_with(address, config, keep_alive, SESSION_WINDOW).await
    }

    /// As [`open`](Self::open); each of its streams may have so many bytes under way that nobody has read.
    pub(crate) async fn open_with(
        address: &Address,
        config: ClientConfig,
        keep_alive: KeepAlive,
        window: u32,
    ) -> Result<Self, DialError> {
        let stream = match timeout(CONNECT_DEADLINE, TcpStream::connect(address.parts())).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(DialError::new(
                    address,
                    Trouble::Soon,
                    "no fleetd serves there (connection refused)",
                ));
            }
            Ok(Err(error)) => return Err(DialError::new(address, Trouble::Later, error)),
            Err(_) => return Err(DialError::new(address, Trouble::Later, "no answer (timeout)")),
        };
        keep_alive.prepare(&stream).map_err(|error| DialError::new(address, Trouble::Soon, error))?;
        let tls = TlsConnector::from(Arc::new(config)).connect(tls::server_name(), stream);
        let stream = match timeout(CONNECT_DEADLINE, tls).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                // A server that stops closes connections that it has just accepted.
                let cut = error.get_ref().is_none_or(|inner| !inner.is::<rustls::Error>());
                let trouble = if cut { Trouble::Soon } else { Trouble::Later };
                return Err(DialError::new(address, trouble, tls::explain(&error)));
            }
            Err(_) => return Err(DialError::new(address, Trouble::Later, "no answer to the TLS handshake")),
        };
        let failure = Failure::default();
        let stream = Watched { stream, failure: failure.clone() };
        let handshake = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(keep_alive.after)
            .keep_alive_timeout(keep_alive.deadline)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(window)
            .initial_connection_window_size(2 * window)
            .max_header_list_size(16 << 10)
            .handshake(TokioIo::new(stream))
            .await;
        let (send, driver) = handshake.map_err(|error| DialError::new(address, Trouble::Soon, error))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!("connection to a server broke: {error}");
            }
        });
        let origin = Uri::builder().scheme("https").authority(SERVER_NAME).path_and_query("/").build();
        let origin = origin.map_err(|error| DialError::wrong(address, &error))?;
        let channel = Channel { send };
        let client = LinkClient::with_origin(channel.clone(), origin.clone())
            .max_decoding_message_size(MAX_DOWN)
            .max_encoding_message_size(MAX_UP);
        Ok(Connection { address: address.clone(), client, channel, origin, failure, _driver: tasks })
    }

    /// The calls of servers among themselves; only for who has shown a server's certificate.
    pub(crate) fn peers(&self) -> PeersClient<Channel> {
        PeersClient::with_origin(self.channel.clone(), self.origin.clone())
            .max_decoding_message_size(MAX_DOWN)
            .max_encoding_message_size(MAX_UP)
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// The answer to a call, or what to say of it.
    pub(crate) fn answered<T>(&self, answer: Result<Result<T, Status>, Elapsed>) -> Result<T, DialError> {
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(self.error(&status)),
            Err(_) => Err(DialError::new(&self.address, Trouble::Later, "the server does not answer")),
        }
    }

    /// Whether reading from it has failed.
    pub(crate) fn broke(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(crate) fn error(&self, status: &Status) -> DialError {
        let trouble = match status.code() {
            Code::Unauthenticated
            | Code::PermissionDenied
            | Code::AlreadyExists
            | Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::Unimplemented => Trouble::Refused,
            Code::Ok | Code::Unavailable | Code::Aborted => Trouble::Soon,
            _ => Trouble::Later,
        };
        // A refusal of our certificate comes as the end of the connection: TLS 1.3 is through before it.
        let trouble = if self.broke() { Trouble::Later } else { trouble };
        let error = DialError::new(&self.address, trouble, self.reason(status));
        DialError { unauthenticated: status.code() == Code::Unauthenticated, ..error }
    }

    /// Why a call or session ended, in words.
    pub(crate) fn reason(&self, status: &Status) -> String {
        if let Some(failure) = &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            return failure.clone();
        }
        let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
        let mut text = status.message().to_owned();
        while let Some(error) = cause {
            text = error.to_string();
            cause = error.source();
        }
        match (status.code(), text.as_str()) {
            (Code::Ok, "") => "the server has ended it".to_owned(),
            // It comes from outside: no control characters into logs and terminals.
            _ => text.chars().filter(|c| !c.is_control()).take(1000).collect(),
        }
    }
}

/// What the generated client sends its calls through.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
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

/// A stream that remembers why it broke.
struct Watched<S> {
    stream: S,
    failure: Failure,
}

impl<S> Watched<S> {
    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert_with(|| match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    "the server is gone".to_owned()
                }
                _ => tls::explain(error),
            });
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        Poll::Ready(self.noted(result))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
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
