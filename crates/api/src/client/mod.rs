//! The client that fleetctl and the tests use: HTTP/1 over a unix socket, TCP, TLS, or
//! whatever a [`Connector`] gives; to one server, or the first of several that answers.
//!
//! Every request has a deadline, every answer a bound. Connections are kept and used again, up to
//! [`KEPT`] of them for each server, so that many requests at a time may be under way.
//!
//! With several servers, the next one is asked when one can't be reached, is no server (an agent's fleetd), or breaks off;
//! the one that answered is asked first from then on. After breaking off, or not answering in time, a request may have been
//! carried out: it is repeated only if that does no harm, which is so for all but those that make something new (most with `POST`).
//!
//! Each request asks for an answer of the newest revision at least that the client was told of: so it reads what it wrote, whichever server
//! answers. A server that has not come so far waits a moment; after that the next one is asked.
mod call;
mod changes;
mod endpoint;
mod error;
mod stream;
mod tls;
mod transport;

pub use endpoint::{Endpoint, EndpointError};
pub use error::Error;
pub use stream::{EventStream, JournalStream};
pub use tls::{Credentials, CredentialsError, Tls};
pub use transport::{ByteStream, Connecting, Connector};

use crate::types::{
    Drain, Explanation, JoinToken, JoinTokenList, JoinTokenRequest, Machine, MachinePage, Member, MemberList,
    MetadataOp, NewJoinToken, NewUser, Notice, NoticeList, RegistryImport, ServerList, Unit, UnitOption,
    UnitPage, UnitState, UnitStatePage, User, UserList, UserRequest,
};
use bytes::Bytes;
use call::{Call, Server};
use fleet_unit::UnitFile;
use futures_util::{StreamExt, TryStreamExt, stream as futures};
use http::{HeaderMap, Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Semaphore;

/// How many idle connections are kept.
pub const KEPT: usize = 16;

/// The most units that [`Client::find_units`] asks for at the same time.
const AT_ONCE: usize = 16;

/// The largest export of a registry, bytes.
const LARGEST_EXPORT: usize = 256 << 20;

/// The shortest deadline of an export or import of the registry: all of it is on its way, and every record written.
const TRANSFER: Duration = Duration::from_secs(60);

/// The shortest deadline of requests that have to ask a machine (status, journal).
const ASKING_A_MACHINE: Duration = Duration::from_secs(30);

/// What is escaped in names within a URL: all that RFC 3986 does not allow in a path segment.
const ESCAPED: &AsciiSet =
    &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'@').remove(b':');

/// Is told what the client does.
pub type Trace = Arc<dyn Fn(&str) + Send + Sync>;

/// How the client behaves.
#[derive(Clone)]
pub struct Options {
    /// How long a request to one server may take, from the try to connect to the end of the answer.
    pub request_timeout: Duration,
    /// How long one try to connect may take.
    pub connect_timeout: Duration,
    /// Connects in another way than dialing the endpoint.
    pub connector: Option<Arc<dyn Connector>>,
    /// How many requests may be under way at the same time, streams not counted; more wait. At most [`KEPT`].
    pub at_once: usize,
    /// How to talk to https endpoints; without it they can't be reached.
    pub tls: Option<Tls>,
    /// Is told of every request and its outcome, in one line each.
    pub trace: Option<Trace>,
}

impl Default for Options {
    /// 3 s for everything, as the original's `--request-timeout`.
    fn default() -> Self {
        let timeout = Duration::from_secs(3);
        Options {
            request_timeout: timeout,
            connect_timeout: timeout,
            connector: None,
            at_once: KEPT,
            tls: None,
            trace: None,
        }
    }
}

/// A client of a cluster.
pub struct Client {
    /// At least one.
    servers: Vec<Server>,
    /// The one to ask first.
    current: AtomicUsize,
    /// Whoever has a permit may have a connection.
    turns: Semaphore,
    /// The newest revision that any server told of; 0 before the first, and with servers that have none.
    known: Arc<AtomicU64>,
    options: Options,
}

/// The filter of [`Client::states`]; empty: everything.
#[derive(Clone, Debug, Default)]
pub struct StateFilter {
    /// Only states of this unit.
    pub unit: Option<String>,
    /// Only states on this machine.
    pub machine: Option<String>,
}

/// What `systemctl status` said on a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its exit code.
    pub exit_code: i32,
    /// The machine, where the server named it.
    pub machine_id: Option<String>,
    /// What it printed.
    pub text: Bytes,
}

/// What operators can say of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineMark {
    /// No new unit is placed there. Taking it away ends a drain, too.
    Cordon,
    /// Its units are to move away.
    Drain,
}

impl MachineMark {
    fn resource(self) -> &'static str {
        match self {
            MachineMark::Cordon => "cordon",
            MachineMark::Drain => "drain",
        }
    }
}

/// What [`Client::journal`] is to deliver.
#[derive(Clone, Debug)]
pub struct JournalQuery {
    /// How many of the last lines (passed to journalctl as it is).
    pub lines: i64,
    /// Whether to go on with new lines.
    pub follow: bool,
    /// journalctl's `--output`.
    pub output: String,
    /// Of which machine, where it is not clear.
    pub machine: Option<String>,
}

/// What [`Client::events`] is to deliver.
#[derive(Clone, Debug, Default)]
pub struct EventQuery {
    /// Only these units; empty: everything.
    pub units: Vec<String>,
    /// Machines and notices, too, though units are named.
    pub machines: bool,
    /// First everything there is, and `Ready`.
    pub snapshot: bool,
    /// Everything after this event.
    pub since: Option<String>,
}

impl Client {
    /// A client of the server at an endpoint. Connects with the first request. The requests have
    /// to run in a tokio runtime with I/O and time enabled.
    pub fn new(endpoint: Endpoint, options: Options) -> Self {
        let turns = Semaphore::new(options.at_once.clamp(1, KEPT));
        let connector = options.connector.clone();
        let first = Server { endpoint, connector, idle: Mutex::default() };
        let (current, known) = (AtomicUsize::new(0), Arc::default());
        Client { servers: vec![first], current, turns, known, options }
    }

    /// One more server, to be asked when those before do not answer; connects in its own way if it is given one.
    pub fn or(mut self, endpoint: Endpoint, connector: Option<Arc<dyn Connector>>) -> Self {
        self.servers.push(Server { endpoint, connector, idle: Mutex::default() });
        self
    }

    /// Where the servers are.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.servers.iter().map(|server| &server.endpoint)
    }

    /// All units, in the server's order (by name).
    pub async fn units(&self) -> Result<Vec<Unit>, Error> {
        self.pages(Call::get("units"), |page: UnitPage| (page.units, page.next_page_token)).await
    }

    /// One unit, if it exists.
    pub async fn unit(&self, name: &str) -> Result<Option<Unit>, Error> {
        match self.get(Call::get(unit_path(name, ""))).await {
            Err(error) if error.code() == Some(404) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Those of the units that exist, in the order of the names. Asks for each by itself, since a
    /// cluster has many more units than a command names; but as the original read the whole list
    /// for this, errors name the list. A unit is missing only if the server that knows most of the registry does not have it.
    pub async fn find_units(&self, names: &[String]) -> Result<Vec<Unit>, Error> {
        let mut found = self.look_for(names).await?;
        if found.iter().any(Option::is_none) && self.hear_of_newer().await {
            found = self.look_for(names).await?;
        }
        Ok(found.into_iter().flatten().collect())
    }

    async fn look_for(&self, names: &[String]) -> Result<Vec<Option<Unit>>, Error> {
        let found: Result<_, Error> =
            futures::iter(names.iter().map(|name| self.unit(name))).buffered(AT_ONCE).try_collect().await;
        found.map_err(|error| match error {
            Error::NoAnswer { reason, .. } => self.target(&Call::get("units")).no_answer(reason),
            other => other,
        })
    }

    /// Whether a server has come further than what was known so far, which is asked for from now on. One that can't tell has not.
    async fn hear_of_newer(&self) -> bool {
        let before = self.known.load(Ordering::Relaxed);
        let Ok(list) = self.servers().await else { return false };
        let newest = list.servers.iter().filter_map(|server| server.revision).max().unwrap_or(0);
        self.known.fetch_max(newest, Ordering::Relaxed);
        newest > before
    }

    /// Creates the unit, replaces it when the options differ, or sets its desired state. Whether it
    /// was created or replaced.
    pub async fn put_unit(&self, unit: &Unit) -> Result<bool, Error> {
        let body = serde_json::to_vec(unit).unwrap_or_default();
        let call =
            Call { method: Method::PUT, body: Some(body.into()), ..Call::get(unit_path(&unit.name, "")) };
        Ok(self.call(call).await?.status == StatusCode::CREATED)
    }

    /// Destroys the unit; false when it did not exist.
    pub async fn delete_unit(&self, name: &str) -> Result<bool, Error> {
        match self.call(Call { method: Method::DELETE, ..Call::get(unit_path(name, "")) }).await {
            Err(error) if error.code() == Some(404) => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// The states that machines report, in the server's order.
    pub async fn states(&self, filter: &StateFilter) -> Result<Vec<UnitState>, Error> {
        let mut call = Call::get("state");
        call.query.extend(filter.unit.iter().map(|name| ("unitName", name.clone())));
        call.query.extend(filter.machine.iter().map(|id| ("machineID", id.clone())));
        self.pages(call, |page: UnitStatePage| (page.states, page.next_page_token)).await
    }

    /// The machines that are there, in the server's order (by ID).
    pub async fn machines(&self) -> Result<Vec<Machine>, Error> {
        self.pages(Call::get("machines"), |page: MachinePage| (page.machines, page.next_page_token)).await
    }

    /// Edits metadata of machines.
    pub async fn patch_machines(&self, edits: &[MetadataOp]) -> Result<(), Error> {
        let body = serde_json::to_vec(edits).unwrap_or_default();
        let call = Call { method: Method::PATCH, body: Some(body.into()), ..Call::get("machines") };
        self.call(call).await.map(drop)
    }

    /// Takes a machine out of the cluster: revokes its credentials, ends its session, forgets its
    /// metadata edits. False when there is no such member.
    pub async fn delete_machine(&self, id: &str) -> Result<bool, Error> {
        self.delete_if_known(format!("machines/{}", escape(id))).await
    }

    /// Sets or takes away one of a machine's marks. False when there is no such machine.
    pub async fn mark_machine(&self, id: &str, mark: MachineMark, set: bool) -> Result<bool, Error> {
        let method = if set { Method::PUT } else { Method::DELETE };
        let call = Call { method, ..Call::get(format!("machines/{}/{}", escape(id), mark.resource())) };
        match self.call(call).await {
            Err(error) if error.code() == Some(404) && !error.is_unknown_resource() => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// How far the units of a machine have moved away, if there is such a machine.
    pub async fn drain(&self, id: &str) -> Result<Option<Drain>, Error> {
        match self.get(Call::get(format!("machines/{}/drain", escape(id)))).await {
            Err(error) if error.code() == Some(404) && !error.is_unknown_resource() => Ok(None),
            result => result.map(Some),
        }
    }

    /// What operators should know of the cluster as a whole now.
    pub async fn notices(&self) -> Result<Vec<Notice>, Error> {
        self.get(Call::get("notices")).await.map(|list: NoticeList| list.notices)
    }

    /// The machines that joined with a token, in the server's order.
    pub async fn members(&self) -> Result<Vec<Member>, Error> {
        self.get(Call::get("members")).await.map(|list: MemberList| list.members)
    }

    /// The servers of the cluster, and the members of their registry.
    pub async fn servers(&self) -> Result<ServerList, Error> {
        self.get(Call::get("servers")).await
    }

    /// Takes a registry that was exchanged for the right one.
    pub async fn accept_registry(&self) -> Result<(), Error> {
        self.call(Call { method: Method::POST, ..Call::get("registry/accept") }).await?;
        // It may be of an older revision than the one before.
        self.known.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// All that lasts in the registry, as a file with the cluster's secrets in it.
    pub async fn export_registry(&self) -> Result<Vec<u8>, Error> {
        let call = Call { deadline: TRANSFER, largest: LARGEST_EXPORT, ..Call::get("registry/export") };
        Ok(self.call(call).await?.body.into())
    }

    /// Makes the registry what such a file says; `replace`: whatever it is now.
    pub async fn import_registry(&self, file: Vec<u8>, replace: bool) -> Result<RegistryImport, Error> {
        let mut call = Call::get("registry/import");
        if replace {
            call.query.push(("replace", "1".to_owned()));
        }
        self.get(Call { method: Method::POST, body: Some(file.into()), deadline: TRANSFER, ..call }).await
    }

    /// Makes a join token.
    pub async fn create_join_token(&self, request: &JoinTokenRequest) -> Result<NewJoinToken, Error> {
        let body = serde_json::to_vec(request).unwrap_or_default();
        self.get(Call { method: Method::POST, body: Some(body.into()), ..Call::get("join-tokens") }).await
    }

    /// The join tokens that there are, in the server's order, without their secrets.
    pub async fn join_tokens(&self) -> Result<Vec<JoinToken>, Error> {
        self.get(Call::get("join-tokens")).await.map(|list: JoinTokenList| list.join_tokens)
    }

    /// Revokes a join token; false when there is none of this ID.
    pub async fn delete_join_token(&self, id: &str) -> Result<bool, Error> {
        self.delete_if_known(format!("join-tokens/{}", escape(id))).await
    }

    /// Makes a user.
    pub async fn create_user(&self, request: &UserRequest) -> Result<NewUser, Error> {
        let body = serde_json::to_vec(request).unwrap_or_default();
        self.get(Call { method: Method::POST, body: Some(body.into()), ..Call::get("users") }).await
    }

    /// The users that there are, in the server's order (by name).
    pub async fn users(&self) -> Result<Vec<User>, Error> {
        self.get(Call::get("users")).await.map(|list: UserList| list.users)
    }

    /// Gives a user another role; `None` when there is none of this name.
    pub async fn set_role(&self, name: &str, role: &str) -> Result<Option<User>, Error> {
        let request = UserRequest { role: role.to_owned(), ..UserRequest::default() };
        let body = serde_json::to_vec(&request).unwrap_or_default();
        let call = Call::get(format!("users/{}", escape(name)));
        match self.get(Call { method: Method::PATCH, body: Some(body.into()), ..call }).await {
            Err(error) if error.code() == Some(404) && !error.is_unknown_resource() => Ok(None),
            result => result.map(Some),
        }
    }

    /// Removes a user; false when there is none of this name.
    pub async fn delete_user(&self, name: &str) -> Result<bool, Error> {
        self.delete_if_known(format!("users/{}", escape(name))).await
    }

    /// Deletes what may not be there; an error where the server does not know this kind of thing.
    async fn delete_if_known(&self, path: String) -> Result<bool, Error> {
        match self.call(Call { method: Method::DELETE, ..Call::get(path) }).await {
            Err(error) if error.code() == Some(404) && !error.is_unknown_resource() => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// The text of a unit's file, if the unit exists; from a server that does not keep it, the
    /// options in normal form.
    pub async fn unit_file(&self, name: &str) -> Result<Option<String>, Error> {
        let call = Call::get(unit_path(name, "/file"));
        let target = self.target(&call);
        match self.call(call).await {
            Ok(answer) => match String::from_utf8(answer.body.into()) {
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(target.malformed("the unit file is not UTF-8".to_owned())),
            },
            Err(error) if matches!(error.code(), Some(404 | 405)) => {
                let Some(unit) = self.unit(name).await? else { return Ok(None) };
                let file = file_of_options(&unit.options)
                    .map_err(|error| target.malformed(format!("the options of {name}: {error}")))?;
                Ok(Some(file.text().to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    /// Why a unit is not what it should be, if it exists.
    pub async fn explain(&self, name: &str) -> Result<Option<Explanation>, Error> {
        match self.get(Call::get(unit_path(name, "/explain"))).await {
            Err(error) if error.code() == Some(404) && !error.is_unknown_resource() => Ok(None),
            result => result.map(Some),
        }
    }

    /// What `systemctl status` says of a unit on its machine, or on another that has it.
    pub async fn status(&self, name: &str, machine: Option<&str>) -> Result<Status, Error> {
        let mut call = Call::get(unit_path(name, "/status"));
        call.query.extend(machine.map(|id| ("machine", id.to_owned())));
        call.deadline = ASKING_A_MACHINE;
        let answer = self.call(call).await?;
        let machine_id = answer.headers.get("fleet-machine").and_then(|v| v.to_str().ok()).map(str::to_owned);
        Ok(Status { exit_code: exit_code(&answer.headers).unwrap_or(0), machine_id, text: answer.body })
    }

    /// The journal of a unit on its machine, or on another that has it.
    pub async fn journal(&self, name: &str, query: &JournalQuery) -> Result<JournalStream, Error> {
        let mut call = Call::get(unit_path(name, "/journal"));
        call.query.push(("lines", query.lines.to_string()));
        if query.follow {
            call.query.push(("follow", "1".to_owned()));
        }
        call.query.push(("output", query.output.clone()));
        call.query.extend(query.machine.iter().map(|id| ("machine", id.clone())));
        call.deadline = ASKING_A_MACHINE;
        call.streaming = true;
        Ok(JournalStream(self.stream(call).await?))
    }

    /// What happens, as it happens.
    pub async fn events(&self, query: &EventQuery) -> Result<EventStream, Error> {
        let mut call = Call::get("events");
        if query.snapshot {
            call.query.push(("snapshot", "1".to_owned()));
        }
        call.query.extend(query.since.iter().map(|id| ("since", id.clone())));
        if query.machines && !query.units.is_empty() {
            call.query.push(("machines", "1".to_owned()));
        }
        call.query.extend(query.units.iter().map(|name| ("unitName", name.clone())));
        call.streaming = true;
        Ok(EventStream::new(self.stream(call).await?, self.known.clone()))
    }

    /// Follows the pages of a list.
    async fn pages<P: DeserializeOwned, T>(
        &self,
        call: Call,
        split: impl Fn(P) -> (Vec<T>, String),
    ) -> Result<Vec<T>, Error> {
        let mut all = Vec::new();
        let mut token = String::new();
        loop {
            let mut query = call.query.clone();
            if !token.is_empty() {
                query.push(("nextPageToken", token.clone()));
            }
            let page_call = Call { query, ..Call::get(call.path.clone()) };
            let target = self.target(&page_call);
            let (mut items, next) = split(self.get(page_call).await?);
            // A server that turns in a circle would keep us for ever.
            if !next.is_empty() && (next == token || items.is_empty()) {
                return Err(target.malformed("the pages of the list do not end".to_owned()));
            }
            all.append(&mut items);
            if next.is_empty() {
                return Ok(all);
            }
            token = next;
        }
    }

    /// Makes a request and reads the JSON that it is answered with.
    async fn get<T: DeserializeOwned>(&self, call: Call) -> Result<T, Error> {
        let target = self.target(&call);
        let answer = self.call(call).await?;
        serde_json::from_slice(&answer.body)
            .map_err(|error| target.malformed(format!("the answer is not understood: {error}")))
    }
}

/// The file that options make, in normal form.
pub fn file_of_options(options: &[UnitOption]) -> Result<UnitFile, fleet_unit::ParseError> {
    let options = options.iter().map(|option| fleet_unit::UnitOption {
        section: option.section.clone(),
        name: option.name.clone(),
        value: option.value.clone(),
    });
    UnitFile::from_options(options.collect())
}

/// The options of a file, as the API has them.
pub fn options_of_file(file: &UnitFile) -> Vec<UnitOption> {
    file.options()
        .iter()
        .map(|option| UnitOption {
            section: option.section.clone(),
            name: option.name.clone(),
            value: option.value.clone(),
        })
        .collect()
}

fn unit_path(name: &str, below: &str) -> String {
    format!("units/{}{below}", escape(name))
}

fn escape(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, ESCAPED)
}

/// The exit code of the program that an answer came from.
fn exit_code(headers: &HeaderMap) -> Option<i32> {
    headers.get("fleet-exit-code")?.to_str().ok()?.trim().parse().ok()
}
