//! Connections to a server: dialing, the HTTP/1 handshake, and those kept open for the next request.
use super::{Endpoint, Tls};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::{future::Future, io, pin::Pin, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};

/// A stream of bytes both ways.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// What [`Connector::connect`] returns.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn ByteStream>, String>> + Send + 'a>>;

/// Makes connections to the server in another way than dialing its address: through a tunnel.
pub trait Connector: Send + Sync {
    /// Connects. The error is shown as it is: it has to say what was tried and what happened.
    fn connect(&self) -> Connecting<'_>;
}

/// How long a broken connection has to say what it broke of.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// An open connection.
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Moves the bytes; ends with the connection or with this value, whichever is first. Tells what the connection
    /// broke of.
    driver: tokio::task::JoinHandle<Option<String>>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Why a request got no answer, and whether that may be because the server had closed a kept
/// connection in the meantime, so that asking again on a new one is right.
pub(super) struct Lost {
    pub(super) reason: String,
    pub(super) unsent: bool,
}

impl Connection {
    /// Dials the endpoint.
    pub(super) async fn open(
        endpoint: &Endpoint,
        connector: Option<&dyn Connector>,
        tls: Option<&Tls>,
        patience: Duration,
    ) -> Result<Self, String> {
        let mut stream = match connector {
            Some(connector) => connector.connect().await?,
            None => dial(endpoint, patience).await?,
        };
        if let Endpoint::Http { secure: true, host, .. } = endpoint {
            let tls = tls.ok_or_else(|| super::CredentialsError::Nobody.to_string())?;
            // Through a connector that needs a password it may take as long as the request itself.
            let begun = tls.begin(host, stream);
            stream = match connector {
                Some(_) => begun.await?,
                None => tokio::time::timeout(patience, begun)
                    .await
                    .map_err(|_| "tls: no answer to the handshake".to_owned())??,
            };
        }
        let (sender, connection) =
            http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(|e| why(&e))?;
        let driver = tokio::spawn(async move { connection.await.err().map(|error| why(&error)) });
        Ok(Connection { sender, driver })
    }

    /// Whether the server has not closed it, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Sends a request and waits for the head of the answer.
    pub(super) async fn send(
        &mut self,
        request: http::Request<Full<Bytes>>,
    ) -> Result<http::Response<Incoming>, Lost> {
        if let Err(error) = self.sender.ready().await {
            return Err(Lost { reason: self.broke_of(&error).await, unsent: true });
        }
        match self.sender.send_request(request).await {
            Ok(response) => Ok(response),
            Err(error) => Err(Lost { unsent: error.is_canceled(), reason: self.broke_of(&error).await }),
        }
    }

    /// What a request failed of. One that finds the connection broken is told only that; what it broke of, such as
    /// a server that does not take our certificate, its driver knows.
    async fn broke_of(&mut self, error: &hyper::Error) -> String {
        if !error.is_canceled() || std::error::Error::source(error).is_some() {
            return why(error);
        }
        match tokio::time::timeout(LAST_WORDS, &mut self.driver).await {
            Ok(Ok(Some(reason))) => reason,
            _ => why(error),
        }
    }
}

async fn dial(endpoint: &Endpoint, patience: Duration) -> Result<Box<dyn ByteStream>, String> {
    match endpoint {
        Endpoint::Unix { path } => {
            let what = format!("dial unix {}", path.display());
            match tokio::time::timeout(patience, tokio::net::UnixStream::connect(path)).await {
                Ok(Ok(stream)) => Ok(Box::new(stream)),
                Ok(Err(error)) => Err(format!("{what}: connect: {}", words(&error))),
                Err(_) => Err(format!("{what}: i/o timeout")),
            }
        }
        Endpoint::Http { host, port, .. } => {
            match tokio::time::timeout(patience, dial_tcp(host, *port)).await {
                Ok(result) => result,
                Err(_) => Err(format!("dial tcp {}: i/o timeout", endpoint.host_header())),
            }
        }
        Endpoint::Other { scheme, .. } => Err(format!("unsupported protocol scheme {scheme:?}")),
    }
}

/// Has the kernel ask a silent server whether it is there, so that one that is gone without a word is known to be after 11 s.
fn find_out_when_gone(stream: &tokio::net::TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(sockopt::set_tcp_user_timeout(stream, 11_000)?)
}

async fn dial_tcp(host: &str, port: u16) -> Result<Box<dyn ByteStream>, String> {
    let addresses = tokio::net::lookup_host((host, port))
        .await
        .map_err(|error| format!("dial tcp: lookup {host}: {}", words(&error)))?;
    let mut last = format!("dial tcp: lookup {host}: no such host");
    for address in addresses {
        match tokio::net::TcpStream::connect(address).await {
            Ok(stream) => {
                // Requests are small and answered one by one: waiting for more to send only delays.
                let _ = stream.set_nodelay(true);
                // A stream that is silent may be one whose server lost its power.
                let _ = find_out_when_gone(&stream);
                return Ok(Box::new(stream));
            }
            Err(error) => last = format!("dial tcp {address}: connect: {}", words(&error)),
        }
    }
    Err(last)
}

/// An error of the system as Go words it: `connection refused`.
pub(super) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// What became of a connection.
fn why(error: &hyper::Error) -> String {
    // First of all what lies below: a request that was not begun is cancelled, for a reason.
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            if io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
                return format!("tls: {}", fleet_trust::explain(io));
            }
            return words(io);
        }
        source = inner.source();
    }
    if error.is_incomplete_message() || error.is_canceled() {
        return "EOF".to_owned();
    }
    error.to_string()
}
