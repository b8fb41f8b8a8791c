//! One request: to one server after the other, on a kept connection or a new one, until there is an answer that counts.

use super::transport::{Connection, Connector, Lost};
use super::{Client, Endpoint, Error, KEPT, Tls, escape, exit_code, stream};
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The largest answer, bytes (event streams and journals are not answers in this sense).
const LARGEST_ANSWER: usize = 64 << 20;

/// The most of an error answer that is read, bytes.
const LARGEST_ERROR: usize = 64 << 10;

/// The header by which an agent's fleetd says that it is no server.
const ROLE: &str = "fleet-role";

/// The header with the revision an answer stands for, and the one by which an answer of that revision at least is asked for.
const REVISION: &str = "fleet-revision";

const MIN_REVISION: &str = "fleet-min-revision";

/// Where the resources are.
const ROOT: &str = "/fleet/v1/";

/// A server, as far as the client knows.
pub(super) struct Server {
    pub(super) endpoint: Endpoint,
    pub(super) connector: Option<Arc<dyn Connector>>,
    pub(super) idle: Mutex<Vec<Connection>>,
}

/// Why a server gave no answer that counts.
struct Failed {
    error: Error,
    /// Whether another server may be asked.
    elsewhere: bool,
    /// Whether the request may have been carried out all the same.
    perhaps_done: bool,
}

impl Failed {
    /// The request did not reach the server.
    fn unsent(error: Error) -> Self {
        Failed { error, elsewhere: true, perhaps_done: false }
    }

    /// The request was sent, and the answer did not come.
    fn lost(error: Error, call: &Call) -> Self {
        Failed { error, elsewhere: call.is_repeatable(), perhaps_done: true }
    }
}

impl From<Error> for Failed {
    /// Another server would say the same.
    fn from(error: Error) -> Self {
        Failed { error, elsewhere: false, perhaps_done: false }
    }
}

/// An answer that counts.
enum Reply {
    Whole(Answer),
    Streaming(stream::Pieces),
}

/// What is asked for, as errors name it.
#[derive(Clone, Debug)]
pub(super) struct Target {
    method: &'static str,
    url: String,
}

impl Target {
    pub(super) fn no_answer(&self, reason: String) -> Error {
        Error::NoAnswer { method: self.method, url: self.url.clone(), reason }
    }

    pub(super) fn malformed(&self, reason: String) -> Error {
        Error::Malformed { method: self.method, url: self.url.clone(), reason }
    }
}

/// One request.
pub(super) struct Call {
    pub(super) method: Method,
    /// Below [`ROOT`].
    pub(super) path: String,
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Option<Bytes>,
    pub(super) deadline: Duration,
    pub(super) streaming: bool,
    /// The largest answer, bytes.
    pub(super) largest: usize,
    /// It says what is to be, though its method would let one think otherwise.
    pub(super) idempotent: bool,
    /// Set when it was sent before, and may have been carried out.
    pub(super) again: AtomicBool,
}

/// An answer with its whole body.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Client {
    /// Makes a request and reads its whole answer.
    pub(super) async fn call(&self, call: Call) -> Result<Answer, Error> {
        self.ask_whole(&call).await
    }

    pub(super) async fn ask_whole(&self, call: &Call) -> Result<Answer, Error> {
        match self.ask(call).await? {
            Reply::Whole(answer) => Ok(answer),
            Reply::Streaming(_) => Err(self.target(call).malformed("the answer has no end".to_owned())),
        }
    }

    /// Makes a request whose answer is read as it comes.
    pub(super) async fn stream(&self, call: Call) -> Result<stream::Pieces, Error> {
        match self.ask(&call).await? {
            Reply::Streaming(pieces) => Ok(pieces),
            Reply::Whole(_) => Err(self.target(&call).malformed("the answer is no stream".to_owned())),
        }
    }

    /// Asks one server after the other until one gives an answer that counts.
    async fn ask(&self, call: &Call) -> Result<Reply, Error> {
        let first = self.current.load(Ordering::Relaxed);
        let mut perhaps_done = false;
        let mut reasons = Vec::new();
        for index in (0..self.servers.len()).map(|step| (first + step) % self.servers.len()) {
            let server = &self.servers[index];
            match self.ask_one(server, call, &mut perhaps_done).await {
                Ok(reply) => {
                    self.current.store(index, Ordering::Relaxed);
                    call.again.store(perhaps_done, Ordering::Relaxed);
                    return Ok(reply);
                }
                Err(failed) if failed.elsewhere && self.servers.len() > 1 => {
                    perhaps_done |= failed.perhaps_done;
                    let reason = failed.error.reason();
                    self.trace(|| format!("{}: {reason}", server.endpoint));
                    reasons.push(format!("{}: {reason}", server.endpoint));
                }
                // An earlier try has deleted it.
                Err(failed)
                    if perhaps_done && call.method == Method::DELETE && failed.error.code() == Some(404) =>
                {
                    let (headers, body) = (HeaderMap::new(), Bytes::new());
                    return Ok(Reply::Whole(Answer { status: StatusCode::NO_CONTENT, headers, body }));
                }
                Err(failed) => return Err(failed.error),
            }
        }
        Err(self.target(call).no_answer(format!("no server answers ({})", reasons.join("; "))))
    }

    async fn ask_one(&self, server: &Server, call: &Call, perhaps_done: &mut bool) -> Result<Reply, Failed> {
        let target = self.target_at(server, call);
        let deadline = self.options.request_timeout.max(call.deadline);
        let whole = async {
            // The semaphore is never closed. Given back when the connection can be used again.
            let _turn = if call.streaming { None } else { self.turns.acquire().await.ok() };
            let asked = self.known.load(Ordering::Relaxed);
            let (response, connection) = self.exchange(server, call, &target, asked, perhaps_done).await?;
            let (head, body) = response.into_parts();
            let revision = head.headers.get(REVISION).and_then(|value| value.to_str().ok()?.parse().ok());
            self.known.fetch_max(revision.unwrap_or(0), Ordering::Relaxed);
            let success = head.status.is_success();
            if success && call.streaming {
                let code = exit_code(&head.headers);
                return Ok(Reply::Streaming(stream::Pieces::new(body, target.clone(), code, connection)));
            }
            let limit = if success { call.largest } else { LARGEST_ERROR };
            let body = match Limited::new(body, limit).collect().await {
                Ok(body) => body.to_bytes(),
                Err(error) if error.downcast_ref::<LengthLimitError>().is_some() => {
                    let reason = format!("the answer is larger than {} KiB", limit >> 10);
                    return Err(target.malformed(reason).into());
                }
                Err(error) => {
                    return Err(Failed::lost(target.no_answer(format!("connection lost: {error}")), call));
                }
            };
            server.keep(connection);
            if success {
                return Ok(Reply::Whole(Answer { status: head.status, headers: head.headers, body }));
            }
            let error = Error::of_answer(head.status.as_u16(), &body, exit_code(&head.headers));
            let no_server = head.headers.get(ROLE).is_some_and(|role| role == "agent");
            // Another server may have come further.
            let behind =
                head.status == StatusCode::SERVICE_UNAVAILABLE && revision.is_some_and(|it| it < asked);
            Err(if no_server || behind { Failed::unsent(error) } else { error.into() })
        };
        match tokio::time::timeout(deadline, whole).await {
            Ok(reply) => reply,
            Err(_) => {
                let late = format!("no answer within {} s", deadline.as_secs_f64());
                Err(Failed::lost(target.no_answer(late), call))
            }
        }
    }

    /// Sends a request on a kept connection, or a new one, and waits for the head of the answer.
    async fn exchange(
        &self,
        server: &Server,
        call: &Call,
        target: &Target,
        asked: u64,
        perhaps_done: &mut bool,
    ) -> Result<(http::Response<Incoming>, Connection), Failed> {
        self.trace(|| format!("HTTP {} {}", call.method, target.url));
        let mut kept = server.kept();
        let mut is_last = false;
        loop {
            let reused = kept.is_some();
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => Connection::open(
                    &server.endpoint,
                    server.connector.as_deref(),
                    self.options.tls.as_ref(),
                    self.options.connect_timeout,
                )
                .await
                .map_err(|reason| Failed::unsent(target.no_answer(reason)))?,
            };
            match connection.send(self.request(&server.endpoint, call, target, asked)?).await {
                Ok(response) => {
                    self.trace(|| format!("HTTP {} {} {}", call.method, target.url, response.status()));
                    return Ok((response, connection));
                }
                // The server may have closed the kept connection just now. What can be done twice
                // with the same result is tried once more.
                Err(lost) if reused && (lost.unsent || call.is_repeatable()) => {
                    *perhaps_done |= !lost.unsent;
                }
                // One that begins again closes also a new connection on which it has heard nothing yet.
                Err(Lost { unsent: true, .. }) if !is_last => is_last = true,
                Err(Lost { reason, unsent: true }) => return Err(Failed::unsent(target.no_answer(reason))),
                Err(Lost { reason, .. }) => return Err(Failed::lost(target.no_answer(reason), call)),
            }
        }
    }

    fn request(
        &self,
        endpoint: &Endpoint,
        call: &Call,
        target: &Target,
        asked: u64,
    ) -> Result<http::Request<Full<Bytes>>, Error> {
        let mut builder = http::Request::builder()
            .method(call.method.clone())
            .uri(format!("{}{}", endpoint.base(), call.path_and_query()))
            .header(header::HOST, endpoint.host_header())
            .header(header::USER_AGENT, concat!("fleet-client/", env!("CARGO_PKG_VERSION")));
        if endpoint.is_secure()
            && let Some(authorization) = self.options.tls.as_ref().and_then(Tls::authorization)
        {
            builder = builder.header(header::AUTHORIZATION, authorization);
        }
        if asked > 0 {
            builder = builder.header(MIN_REVISION, asked);
        }
        if call.body.is_some() {
            builder = builder.header(header::CONTENT_TYPE, "application/json");
        }
        if call.streaming {
            builder = builder.header(header::TE, "trailers");
        }
        builder
            .body(Full::new(call.body.clone().unwrap_or_default()))
            .map_err(|error| target.malformed(format!("no such request can be made: {error}")))
    }

    /// What is asked for, as errors name it: with the `alt=json` that the original sent.
    /// Of several servers none is named: the reason names them all.
    pub(super) fn target(&self, call: &Call) -> Target {
        let mut target = self.target_at(&self.servers[0], call);
        if self.servers.len() > 1 {
            let path = target.url.find(ROOT).unwrap_or_default();
            target.url.drain(..path);
        }
        target
    }

    fn target_at(&self, server: &Server, call: &Call) -> Target {
        let method = match call.method {
            Method::GET => "Get",
            Method::PUT => "Put",
            Method::DELETE => "Delete",
            Method::POST => "Post",
            _ => "Patch",
        };
        let path = call.path_and_query();
        let separator = if path.contains('?') { '&' } else { '?' };
        let url = server.endpoint.url_of(&path);
        Target { method, url: if call.streaming { url } else { format!("{url}{separator}alt=json") } }
    }

    pub(super) fn trace(&self, line: impl Fn() -> String) {
        if let Some(trace) = &self.options.trace {
            trace(&line());
        }
    }
}

impl Server {
    fn kept(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::from_fn(|| idle.pop()).find(Connection::is_open)
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT && connection.is_open() {
            idle.push(connection);
        }
    }
}

impl Call {
    /// Whether it may be carried out twice.
    fn is_repeatable(&self) -> bool {
        self.method != Method::POST || self.idempotent
    }

    pub(super) fn get(path: impl Into<String>) -> Self {
        Call {
            method: Method::GET,
            path: path.into(),
            query: Vec::new(),
            body: None,
            deadline: Duration::ZERO,
            streaming: false,
            largest: LARGEST_ANSWER,
            idempotent: false,
            again: AtomicBool::new(false),
        }
    }

    fn path_and_query(&self) -> String {
        let mut text = format!("{ROOT}{}", self.path);
        for (at, (key, value)) in self.query.iter().enumerate() {
            let separator = if at == 0 { '?' } else { '&' };
            text.push_str(&format!("{separator}{key}={}", escape(value)));
        }
        text
    }
}

/// Why an answer broke off that had begun well.
pub(super) fn broke_off(trailers: &HeaderMap) -> Option<String> {
    Some(String::from_utf8_lossy(trailers.get("fleet-error")?.as_bytes()).into_owned())
}
