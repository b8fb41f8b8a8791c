//! Which member of etcd is spoken to, and how calls go there.
//!
//! All calls and watches go to one member. When it fails (a call has no answer in time, the connection breaks, it lost
//! the others) it is left, by all of them, for the next one that works. A *keeper* task looks for it: in rounds over all
//! endpoints, the next one when the one before did not work or is slow; between rounds that found none it pauses.
//!
//! A member works when it speaks the API, takes our credentials, is of a version we know, answers a linearizable read
//! (so it has a quorum) and has the registry that we know, at no older a revision: see [`super::identity`]. So an etcd that was
//! emptied or exchanged is found out before anything is read from it, as its data cannot change under a connection.

use super::config::Settings;
use super::connection::{Connection, Obstacle};
use super::generated::{
    self as pb, AuthenticateRequest, RangeRequest, StatusRequest, request_op::Request, response_op::Response,
};
use super::identity::{self, Identity, RegistryRecord};
use super::status::Failure;
use crate::store::{Revision, StoreError};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::hash::{BuildHasher, RandomState};
use std::mem::discriminant;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::metadata::{Ascii, MetadataValue};
use tracing::{debug, info};

/// The oldest version that has what is needed: watches that say why they ended, and fragments of large answers.
const OLDEST: (u32, u32) = (3, 4);
/// The pause after a round that found no member: doubled up to the second value.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// A member that was left sooner than this after it was found did not work.
const WORKED: Duration = Duration::from_secs(1);

/// Whether etcd can be reached.
#[derive(Clone, Debug, PartialEq)]
pub enum Contact {
    /// Not yet known: the first round is under way.
    Trying,
    /// With this endpoint.
    Held(String),
    /// With none.
    Lost {
        /// When the last contact ended, or the first attempt failed.
        since: Instant,
        /// What the last attempt ran into.
        error: StoreError,
    },
}

/// The member that is spoken to, or why there is none.
#[derive(Clone)]
pub(super) enum Link {
    Up(Arc<Connection>),
    /// With what the last round ran into, if there was one since contact was lost.
    Down(Option<StoreError>),
}

impl Link {
    pub(super) fn is(&self, connection: &Arc<Connection>) -> bool {
        matches!(self, Link::Up(up) if Arc::ptr_eq(up, connection))
    }
}

/// What the store, its watches and the keeper share.
pub(super) struct Members {
    pub(super) settings: Settings,
    link: watch::Sender<Link>,
    contact: watch::Sender<Contact>,
    /// The highest revision seen.
    seen: watch::Sender<Revision>,
    /// The registry that is expected, by its first two fields. `None`: whatever is there.
    expected: Mutex<Option<Identity>>,
    /// Ends the keeper's pause.
    hurry: Notify,
}

/// What a call does to etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// It may be sent again.
    Repeatable,
    /// It must not.
    Once,
}

impl Members {
    pub(super) fn new(settings: Settings, expected: Option<Identity>) -> Self {
        let seen = expected.as_ref().map_or(0, |e| e.revision);
        Members {
            settings,
            link: watch::Sender::new(Link::Down(None)),
            contact: watch::Sender::new(Contact::Trying),
            seen: watch::Sender::new(seen),
            expected: Mutex::new(expected),
            hurry: Notify::new(),
        }
    }

    fn expected(&self) -> MutexGuard<'_, Option<Identity>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn contact(&self) -> watch::Receiver<Contact> {
        self.contact.subscribe()
    }

    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    pub(super) fn seen(&self) -> watch::Receiver<Revision> {
        self.seen.subscribe()
    }

    /// Takes note of a revision that etcd is at, and gives it.
    pub(super) fn saw(&self, header: Option<&pb::ResponseHeader>) -> Revision {
        let revision = header.map_or(0, |h| Revision::try_from(h.revision).unwrap_or(0));
        self.seen.send_if_modified(|seen| {
            let newer = revision > *seen;
            *seen = revision.max(*seen);
            newer
        });
        revision
    }

    /// The registry as it was last seen, once it was.
    pub(super) fn identity(&self) -> Option<Identity> {
        let mut identity = self.expected().clone()?;
        identity.revision = identity.revision.max(*self.seen.borrow());
        Some(identity)
    }

    /// Expects this registry from now on, and looks for it at once; `None`: whatever is there. Gives what was expected.
    pub(super) fn expect(&self, registry: Option<Identity>) -> Option<Identity> {
        let before = self.identity();
        self.seen.send_replace(registry.as_ref().map_or(0, |r| r.revision));
        *self.expected() = registry;
        self.link.send_replace(Link::Down(None));
        self.hurry.notify_one();
        before
    }

    /// Leaves a member, so that another is looked for.
    pub(super) fn leave(&self, connection: &Arc<Connection>, why: &str) {
        let left = self.link.send_if_modified(|link| {
            let it = link.is(connection);
            if it {
                *link = Link::Down(None);
            }
            it
        });
        if left {
            info!("leaving etcd's member {}: {why}", connection.endpoint());
        }
    }

    /// The member to speak to, as soon as there is one. Errors that waiting does not help against come at once.
    pub(super) async fn member(&self) -> Result<Arc<Connection>, StoreError> {
        let mut link = self.link.subscribe();
        loop {
            match &*link.borrow_and_update() {
                Link::Up(connection) => return Ok(connection.clone()),
                Link::Down(Some(
                    error @ (StoreError::Denied(_) | StoreError::Unusable(_) | StoreError::Damaged(_)),
                )) => {
                    return Err(error.clone());
                }
                Link::Down(_) => {}
            }
            if link.changed().await.is_err() {
                return Err(StoreError::Unavailable("the registry is closed".into()));
            }
        }
    }

    fn none(&self) -> StoreError {
        match &*self.link.borrow() {
            Link::Down(Some(error)) => error.clone(),
            _ => StoreError::Unavailable(format!(
                "no member of etcd answered within {:?}: {}",
                self.settings.timeout,
                self.settings.endpoints.iter().map(|e| e.url.as_str()).collect::<Vec<_>>().join(", ")
            )),
        }
    }

    /// Makes a call, within the time a call may take, at as many members as it takes.
    pub(super) async fn call<T, F>(
        &self,
        effect: Effect,
        call: impl Fn(Arc<Connection>) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<T, tonic::Status>>,
    {
        let deadline = Instant::now() + self.settings.timeout;
        let mut last = None;
        loop {
            let Ok(member) = timeout_at(deadline, self.member()).await else {
                return Err(last.map_or_else(|| self.none(), StoreError::Unavailable).into());
            };
            let member = member?;
            match timeout_at(deadline, member.ready()).await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => {
                    self.leave(&member, &why);
                    last = Some(why);
                    continue;
                }
                Err(_) => {
                    let why = format!("{}: no request could be sent in time", member.endpoint());
                    self.leave(&member, &why);
                    return Err(StoreError::Unavailable(why).into());
                }
            }
            let why = match timeout_at(deadline, call(member.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => match member.failure(&status) {
                    Failure::Final(error) => return Err(error.into()),
                    Failure::Compacted => return Err(CallError::Compacted),
                    Failure::LargeAnswer => return Err(CallError::LargeAnswer),
                    Failure::Unsure(why) if effect == Effect::Once => {
                        self.leave(&member, &why);
                        return Err(StoreError::Unknown(why).into());
                    }
                    Failure::Elsewhere(why) | Failure::Unsure(why) => why,
                },
                Err(_) => {
                    let why = format!("{}: no answer within {:?}", member.endpoint(), self.settings.timeout);
                    self.leave(&member, &why);
                    return Err(match effect {
                        Effect::Once => StoreError::Unknown(why),
                        Effect::Repeatable => StoreError::Unavailable(why),
                    }
                    .into());
                }
            };
            self.leave(&member, &why);
            last = Some(why);
        }
    }

    /// The keeper: always looks for a member while there is none. Never ends.
    pub(super) async fn keep(&self) {
        let count = self.settings.endpoints.len();
        // Not all servers of a cluster at the same member.
        let mut first = RandomState::new().hash_one(()) as usize % count;
        let mut pause = PAUSE.0;
        loop {
            match self.round(first).await {
                Ok((index, connection)) => {
                    let since = Instant::now();
                    self.hold(connection).await;
                    first = (index + 1) % count;
                    if since.elapsed() >= WORKED {
                        pause = PAUSE.0;
                        continue;
                    }
                }
                Err(error) => {
                    first = (first + 1) % count;
                    self.lost(error);
                }
            }
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = self.hurry.notified() => pause = PAUSE.0,
            }
        }
    }

    /// Gives a member out until it is left or its connection ends.
    async fn hold(&self, connection: Arc<Connection>) {
        let mut link = self.link.subscribe();
        self.contact.send_if_modified(|contact| {
            if let Contact::Lost { .. } = contact {
                debug!("etcd answers again, at {}", connection.endpoint());
            }
            let held = Contact::Held(connection.endpoint().to_owned());
            let other = *contact != held;
            *contact = held;
            other
        });
        self.link.send_replace(Link::Up(connection.clone()));
        tokio::select! {
            () = connection.closed() => self.leave(&connection, "the connection ended"),
            _ = link.wait_for(|link| matches!(link, Link::Down(_))) => {}
        }
    }

    /// Makes known that no member works.
    fn lost(&self, error: StoreError) {
        self.contact.send_modify(|contact| {
            let (since, news) = match contact {
                Contact::Lost { since, error: before } => {
                    (*since, discriminant(before) != discriminant(&error))
                }
                _ => (Instant::now(), true),
            };
            if news {
                debug!("{error}; trying again");
            }
            *contact = Contact::Lost { since, error: error.clone() };
        });
        self.link.send_replace(Link::Down(Some(error)));
    }

    /// Tries all endpoints from the `first` on, until one works.
    async fn round(&self, first: usize) -> Result<(usize, Arc<Connection>), StoreError> {
        let endpoints = &self.settings.endpoints;
        let mut order = (0..endpoints.len()).map(|n| (first + n) % endpoints.len());
        let mut failures: Vec<StoreError> = Vec::new();
        let mut tries = FuturesUnordered::new();
        let mut more = true;
        loop {
            match order.next() {
                Some(index) => tries.push(async move { (index, self.open(index).await) }),
                None => more = false,
            }
            let done = tokio::select! {
                done = tries.next() => done,
                // It is slow: the next one beside it.
                () = sleep(self.settings.timeout / 4), if more => continue,
            };
            match done {
                Some((index, Ok(connection))) => return Ok((index, Arc::new(connection))),
                Some((_, Err(error))) => failures.push(error),
                None if !more => return Err(combined(failures)),
                None => {}
            }
        }
    }

    /// Opens a connection to a member that works.
    async fn open(&self, index: usize) -> Result<Connection, StoreError> {
        let endpoint = &self.settings.endpoints[index];
        // Several calls, each of which may take its time.
        match timeout(self.settings.timeout * 2, self.open_unbounded(index)).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Unavailable(format!("{endpoint}: no answer"))),
        }
    }

    async fn open_unbounded(&self, index: usize) -> Result<Connection, StoreError> {
        // What is read from now on must not be older.
        let seen = *self.seen.borrow();
        let mut connection = Connection::open(&self.settings.endpoints[index], &self.settings).await?;
        self.log_in(&mut connection).await?;
        let status = connection.request(StatusRequest {}, None);
        let status = connection.maintenance().status(status).await;
        match status.map_err(|status| unusable(&connection, &status)) {
            Ok(status) => check_version(connection.endpoint(), &status.into_inner().version)?,
            // Newer ones tell only some users how they are.
            Err(StoreError::Denied(why)) => debug!("{}: {why}", connection.endpoint()),
            Err(error) => return Err(error),
        }
        match self.check_identity(&connection, seen).await {
            Ok(()) => Ok(connection),
            Err(StoreError::Damaged(why)) if !why.contains(connection.endpoint()) => {
                Err(StoreError::Damaged(format!("{}: {why}", connection.endpoint())))
            }
            Err(error) => Err(error),
        }
    }

    /// Has calls made as the user, if there is one.
    pub(super) async fn log_in(&self, connection: &mut Connection) -> Result<(), StoreError> {
        if let Some(token) = self.token(connection).await? {
            connection.set_token(token);
        }
        Ok(())
    }

    /// A token for the user, if there is one.
    async fn token(&self, connection: &Connection) -> Result<Option<MetadataValue<Ascii>>, StoreError> {
        let Some(login) = &self.settings.login else { return Ok(None) };
        let request = AuthenticateRequest { name: login.name.clone(), password: login.password.clone() };
        let answer = connection.auth().authenticate(connection.request(request, None)).await;
        match answer {
            Ok(answer) => {
                let token = answer.into_inner().token.parse::<MetadataValue<Ascii>>();
                let mut token = token.map_err(|_| {
                    StoreError::Unusable(format!("{} gave a token that is no text", connection.endpoint()))
                })?;
                token.set_sensitive(true);
                Ok(Some(token))
            }
            Err(status) if status.message().contains("authentication is not enabled") => Ok(None),
            Err(status) => Err(unusable(connection, &status)),
        }
    }

    /// Reads which registry there is, makes it where there never was one, and compares it with the one expected.
    async fn check_identity(&self, connection: &Connection, seen: Revision) -> Result<(), StoreError> {
        let layout = &self.settings.layout;
        let key = layout.registry();
        let name = String::from_utf8_lossy(&key).into_owned();
        loop {
            let request = RangeRequest { key: key.clone(), ..RangeRequest::default() };
            let answer = connection.kv().range(connection.request(request, None)).await;
            let answer = answer.map_err(|status| unusable(connection, &status))?.into_inner();
            let record = answer.kvs.first().map(|kv| RegistryRecord::parse(&name, &kv.value)).transpose()?;
            let header = answer.header.unwrap_or_default();
            let now = record.map(|record| Identity {
                registry: record.id,
                etcd_cluster: format!("{:016x}", header.cluster_id),
                revision: Revision::try_from(header.revision).unwrap_or(0),
            });
            let before = self.expected().clone();
            if let Some(mut before) = before {
                before.revision = before.revision.max(seen);
                identity::compare(&before, now.as_ref(), layout.prefix())?;
            }
            match now {
                Some(now) => {
                    self.expected().get_or_insert(now);
                    self.saw(Some(&header));
                    return Ok(());
                }
                None => self.make(connection).await?,
            }
        }
    }

    /// Makes the record of the registry, unless somebody else does, where there is nothing yet.
    async fn make(&self, connection: &Connection) -> Result<(), StoreError> {
        let layout = &self.settings.layout;
        let (from, to) = layout.ours();
        let ours = Request::RequestRange(RangeRequest {
            key: from.clone(),
            range_end: to.clone(),
            limit: 1,
            keys_only: true,
            ..RangeRequest::default()
        });
        let foreign = layout.foreign().into_iter().map(|(from, to)| {
            Request::RequestRange(RangeRequest {
                key: from,
                range_end: to,
                limit: 1,
                keys_only: true,
                ..RangeRequest::default()
            })
        });
        let reads: Vec<_> =
            std::iter::once(ours).chain(foreign).map(|r| pb::RequestOp { request: Some(r) }).collect();
        let txn = pb::TxnRequest { success: reads, ..pb::TxnRequest::default() };
        let answer = connection.kv().txn(connection.request(txn, None)).await;
        let answer = answer.map_err(|status| unusable(connection, &status))?.into_inner();
        let mut found = answer.responses.into_iter().filter_map(|op| match op.response {
            Some(Response::ResponseRange(range)) => range.kvs.into_iter().next(),
            _ => None,
        });
        if let Some(kv) = found.next() {
            let key = String::from_utf8_lossy(&kv.key).escape_debug().to_string();
            let prefix = layout.prefix();
            let endpoint = connection.endpoint();
            return Err(match kv.key.starts_with(&from) {
                // Its record may have been made just now.
                true if kv.key == layout.registry() => return Ok(()),
                true => StoreError::Damaged(format!(
                    "etcd at {endpoint} has data of a registry ({key}), but not the record {prefix}v3/registry that \
                     belongs to it: restore it from a backup, or remove all below {prefix}v3/"
                )),
                false => StoreError::Unusable(format!(
                    "etcd at {endpoint} has data of something else at etcd_key_prefix {prefix}: the key {key}; give \
                     fleet a prefix of its own"
                )),
            });
        }
        let id = identity::new_id()?;
        let put = Request::RequestPut(pb::PutRequest {
            key: layout.registry(),
            value: RegistryRecord::new(id.clone()).to_json().into(),
            lease: 0,
        });
        let absent = pb::Compare {
            result: pb::compare::CompareResult::Equal.into(),
            target: pb::compare::CompareTarget::Mod.into(),
            key: from,
            range_end: to,
            target_union: Some(pb::compare::TargetUnion::ModRevision(0)),
        };
        let success = vec![pb::RequestOp { request: Some(put) }];
        let txn = pb::TxnRequest { compare: vec![absent], success, failure: Vec::new() };
        let answer = connection.kv().txn(connection.request(txn, None)).await;
        // Whether it was carried out, the caller reads.
        if answer.map_err(|status| unusable(connection, &status))?.into_inner().succeeded {
            info!("made the registry {id} in etcd at {} below {}", connection.endpoint(), layout.prefix());
        }
        Ok(())
    }
}

/// Why a call was not answered.
#[derive(Debug)]
pub(super) enum CallError {
    Store(StoreError),
    /// The revision asked for is no longer kept.
    Compacted,
    /// Less has to be asked for.
    LargeAnswer,
}

impl From<StoreError> for CallError {
    fn from(error: StoreError) -> Self {
        CallError::Store(error)
    }
}

impl From<CallError> for StoreError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Store(error) => error,
            // Only of calls that name a revision, whose callers look for it.
            CallError::Compacted => StoreError::Unavailable("etcd no longer keeps that revision".into()),
            CallError::LargeAnswer => StoreError::Unavailable("etcd's answer is too large".into()),
        }
    }
}

impl From<Obstacle> for StoreError {
    fn from(obstacle: Obstacle) -> Self {
        match obstacle {
            Obstacle::Unreachable(why) => StoreError::Unavailable(why),
            Obstacle::Denied(why) => StoreError::Denied(why),
            Obstacle::Unusable(why) => StoreError::Unusable(why),
        }
    }
}

/// Why a member does not work that answered one of the first calls so.
pub(super) fn unusable(connection: &Connection, status: &tonic::Status) -> StoreError {
    if let Some(obstacle) = connection.obstacle() {
        return obstacle.into();
    }
    match connection.failure(status) {
        Failure::Final(error) => error,
        Failure::Elsewhere(why) | Failure::Unsure(why) => StoreError::Unavailable(why),
        other @ (Failure::Compacted | Failure::LargeAnswer) => {
            StoreError::Unusable(format!("{}: {other:?}", connection.endpoint()))
        }
    }
}

fn check_version(endpoint: &str, version: &str) -> Result<(), StoreError> {
    let mut parts = version.split('.').map(|part| part.parse::<u32>());
    let known = match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= OLDEST,
        _ => false,
    };
    if known {
        return Ok(());
    }
    let (major, minor) = OLDEST;
    let version = super::status::clean(version);
    Err(StoreError::Unusable(format!(
        "{endpoint} runs etcd {version:?}; fleet needs etcd {major}.{minor} or newer"
    )))
}

/// What to say when no endpoint works: what waiting does not help against first.
fn combined(failures: Vec<StoreError>) -> StoreError {
    let worst = |error: &StoreError| match error {
        StoreError::Damaged(_) => 0,
        StoreError::Unusable(_) => 1,
        StoreError::Denied(_) => 2,
        _ => 3,
    };
    let reasons: Vec<&str> = failures
        .iter()
        .map(|error| match error {
            StoreError::Unavailable(why)
            | StoreError::Denied(why)
            | StoreError::Unusable(why)
            | StoreError::Damaged(why) => why.as_str(),
            _ => "no answer",
        })
        .collect();
    let all = reasons.join("; ");
    match failures.iter().min_by_key(|error| worst(error)) {
        Some(StoreError::Denied(_)) => StoreError::Denied(all),
        Some(error @ (StoreError::Damaged(_) | StoreError::Unusable(_))) => error.clone(),
        _ => StoreError::Unavailable(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_too_old_or_odd_are_refused() {
        for good in ["3.4.0", "3.4.23", "3.10.1", "4.0.0", "3.5.0-rc.1", "3.6"] {
            assert_eq!(check_version("x", good), Ok(()), "{good}");
        }
        for bad in ["3.3.27", "2.3.8", "", "3", "new", "3.x"] {
            let Err(StoreError::Unusable(message)) = check_version("http://x", bad) else { panic!("{bad}") };
            assert!(message.contains("http://x runs etcd") && message.contains("3.4 or newer"), "{message}");
        }
    }

    #[test]
    fn what_waiting_does_not_help_against_is_said() {
        let unavailable = || StoreError::Unavailable("a: refused".into());
        let denied = || StoreError::Denied("b: no".into());
        assert_eq!(combined(vec![unavailable()]), unavailable());
        assert_eq!(combined(vec![unavailable(), denied()]), StoreError::Denied("a: refused; b: no".into()));
        let damaged = StoreError::Damaged("gone".into());
        assert_eq!(combined(vec![denied(), unavailable(), damaged.clone()]), damaged);
        assert!(matches!(combined(vec![]), StoreError::Unavailable(_)));
    }
}
