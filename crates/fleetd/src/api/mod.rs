//! The HTTP API v1 (golden/19-api.txt) and what fleet adds to it, answered from the server's view.
//!
//! - `route`: which path and method is what; pure
//! - `decode`: bodies, with the original's words for what is wrong with them; pure
//! - `resources`: units, states, machines
//! - `changes`: many changes of units in one request
//! - `members`: join tokens, and the machines that joined
//! - `servers`: the servers of the cluster, and their registry
//! - `machines`: cordon and drain, notices
//! - `users`: the users who come over https
//! - `access`: who may ask for what
//! - `metrics`: what is counted
//! - `old_clients`: what fleetctl 1.0 needs
//! - `fuzz`: requests as any bytes, for fuzzing
//! - `live`: status, journal and events: answers that come from machines or go on
//!
//! Bounds: connections, header time, body size and time; every answer but the live ones has a deadline.

mod access;
mod changes;
mod decode;
#[doc(hidden)]
pub mod fuzz;
mod live;
mod machines;
mod members;
mod metrics;
mod old_clients;
mod page;
mod resources;
mod route;
mod servers;
mod users;

use crate::server::Server;
use access::Remote;
use bytes::Bytes;
use fleet_api::types::{ErrorBody, ErrorDetail};
use fleet_link::serve::{GuestStream, Visitor};
use fleet_registry::{Store, StoreError};
use http_body_util::{BodyExt, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// The largest request body, bytes: a unit file of the largest size, twice (as text and as options), escaped.
pub const MAX_BODY: usize = 8 << 20;
/// How long a client may take to send its header, and its body.
const HEADER_DEADLINE: Duration = Duration::from_secs(15);
const BODY_DEADLINE: Duration = Duration::from_secs(30);
/// How long an answer may take that is not live.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// How long a client that asks for a certain revision waits for it: less than clients wait for an answer.
const CATCH_UP: Duration = Duration::from_secs(2);

/// The header with the revision an answer stands for.
const REVISION: &str = "fleet-revision";
/// The header by which a client asks for an answer of this revision at least.
const MIN_REVISION: &str = "fleet-min-revision";
/// The header with the seconds for which the server has not reached its registry: what it answers may be old.
const STALE: &str = "fleet-stale";

/// Connections at the same time; more wait to be accepted.
pub const MAX_CONNECTIONS: usize = 1024;

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;
pub(crate) type Answer = Response<Body>;

/// The version in the `Server` header.
pub const SERVER: &str = concat!("fleetd/", env!("CARGO_PKG_VERSION"));

/// Says `agent` in answers of a fleetd that is no server.
pub const ROLE: header::HeaderName = header::HeaderName::from_static("fleet-role");

/// What the API needs.
pub struct Api<S: Store> {
    /// The server it speaks for.
    pub server: Server<S>,
    /// Units, states or machines on one page (`token_limit`).
    pub page_size: u16,
    /// Ends live answers.
    pub cancel: CancellationToken,
    stopped: old_clients::Stopped,
}

/// Serves one connection of an agent that is no server: says who can answer. Its metrics are its own.
pub async fn refuse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    servers: String,
    cancel: CancellationToken,
) {
    let message = format!(
        "fleetd on this machine is an agent only; ask one of its servers ({servers}): fleetctl --tunnel=HOST goes there \
         through ssh, --endpoint=URL where its API listens"
    );
    connection(stream, cancel, move |request| {
        let mut answer = match route::route(request.method(), request.uri().path()) {
            route::Route::Metrics => {
                let mut text = crate::metrics::Text::default();
                text.process();
                metrics::answer(text)
            }
            _ => failure(StatusCode::SERVICE_UNAVAILABLE, &message),
        };
        // So that clients that know of servers ask those.
        answer.headers_mut().insert(ROLE, header::HeaderValue::from_static("agent"));
        async move { answer }
    })
    .await;
}

/// Serves one connection until its end, or, after cancellation, until the request under way is answered.
async fn connection<F>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    cancel: CancellationToken,
    answer: impl Fn(Request<Incoming>) -> F + Send + 'static,
) where
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answered = answer(request);
        async move {
            let mut answer = answered.await;
            answer.headers_mut().insert(header::SERVER, header::HeaderValue::from_static(SERVER));
            Ok::<_, Infallible>(answer)
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    // Names of headers as the original wrote them.
    http.title_case_headers(true);
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE).max_buf_size(64 << 10);
    let connection = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        // First of all: a request that is there by now is answered.
        biased;
        ended = connection.as_mut() => ended,
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!("API connection: {error}");
    }
}

impl<S: Store> Api<S> {
    /// The API of a server; see the fields.
    pub fn new(server: Server<S>, page_size: u16, cancel: CancellationToken) -> Self {
        Api { server, page_size, cancel, stopped: old_clients::Stopped::default() }
    }

    /// Serves one connection.
    pub async fn serve(self: Arc<Self>, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let cancel = self.cancel.clone();
        connection(stream, cancel, move |request| {
            let api = self.clone();
            async move { api.answer(request, None).await }
        })
        .await;
    }

    /// Serves one connection of a user who comes over https. It is cut off when the user may not have the answer any more
    /// that is under way: an end in good order would look like the end of the log.
    pub async fn serve_guest(self: Arc<Self>, stream: GuestStream, visitor: Visitor) {
        let (api, remote) = (self.clone(), Arc::new(Remote::new(visitor)));
        let asking = remote.clone();
        let served = connection(stream, self.cancel.clone(), move |request| {
            let (api, remote) = (api.clone(), asking.clone());
            async move { api.answer(request, Some(&remote)).await }
        });
        tokio::select! {
            () = served => {}
            () = remote.lost(self.server.users()) => {}
        }
    }

    async fn answer(&self, request: Request<Incoming>, remote: Option<&Remote>) -> Answer {
        debug!("HTTP {} {}", request.method(), request.uri());
        let answered = self.dispatch(request, remote);
        let mut answer = match tokio::time::timeout(ANSWER_DEADLINE + BODY_DEADLINE, answered).await {
            Ok(answer) => answer,
            Err(_) => failure(StatusCode::GATEWAY_TIMEOUT, "no answer within a minute"),
        };
        if answer.status() == StatusCode::UNAUTHORIZED {
            return answer;
        }
        let headers = answer.headers_mut();
        let revision = *self.server.hub().applied().borrow();
        headers.insert(REVISION, header::HeaderValue::from(revision));
        if let Some(stale) = self.server.stale_for() {
            headers.insert(STALE, header::HeaderValue::from(stale.as_secs()));
        }
        answer
    }

    /// Waits until this server knows what the client knows already, from another one.
    async fn caught_up(&self, headers: &header::HeaderMap) -> Result<(), Answer> {
        let Some(asked) = headers.get(MIN_REVISION) else { return Ok(()) };
        let Some(asked) = asked.to_str().ok().and_then(|text| text.parse().ok()) else {
            return Err(failure(StatusCode::BAD_REQUEST, &format!("{MIN_REVISION} must be a revision")));
        };
        match tokio::time::timeout(CATCH_UP, self.server.hub().reached(asked)).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let applied = *self.server.hub().applied().borrow();
                Err(failure(
                    StatusCode::SERVICE_UNAVAILABLE,
                    &format!(
                        "this server is behind: it knows revision {applied} of the registry, not yet {asked}, which another told of; \
                         try again"
                    ),
                ))
            }
        }
    }
}

/// Reads a whole body within its bounds.
pub(crate) async fn read_body(body: Incoming) -> Result<Bytes, Answer> {
    read_large_body(body, MAX_BODY).await
}

/// The same, with another bound in bytes.
pub(crate) async fn read_large_body(body: Incoming, limit: usize) -> Result<Bytes, Answer> {
    match tokio::time::timeout(BODY_DEADLINE, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(failure(StatusCode::PAYLOAD_TOO_LARGE, &format!("request body is larger than {limit} bytes")))
        }
        Ok(Err(error)) => Err(failure(StatusCode::BAD_REQUEST, &format!("unable to read body: {error}"))),
        Err(_) => Err(failure(StatusCode::REQUEST_TIMEOUT, "request body did not arrive in time")),
    }
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// An answer in JSON.
pub(crate) fn json<T: serde::Serialize>(status: StatusCode, value: &T) -> Answer {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut answer = Response::new(full(bytes));
            *answer.status_mut() = status;
            answer
                .headers_mut()
                .insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
            answer
        }
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// An answer without a body.
pub(crate) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(full(Bytes::new()));
    *answer.status_mut() = status;
    answer
}

/// The status of a failure of the registry: nearly always one that passes.
pub(crate) fn store_status(error: &StoreError) -> StatusCode {
    match error {
        StoreError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
        StoreError::Unavailable(_)
        | StoreError::Unknown(_)
        | StoreError::Damaged(_)
        | StoreError::Denied(_)
        | StoreError::Unusable(_) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// An error answer.
pub(crate) fn failure(status: StatusCode, message: &str) -> Answer {
    let error = ErrorDetail { code: status.as_u16(), message: message.to_owned() };
    json(status, &ErrorBody { error })
}
