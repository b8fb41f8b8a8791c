//! A watch that goes on where it was when its member is left.
//!
//! It has a *position*: all changes up to that revision are known. It asks etcd for changes from the position on,
//! itself included, and passes that one over: so etcd says when changes right after the position were compacted, which a
//! watch that starts there would not be told (the deletions among them are gone then).
//!
//! A stream that is silent may have nothing to tell, or be of a member that fell behind. When the store has seen a
//! revision elsewhere that the stream knows nothing of, the stream is asked for its progress; when that does not help, its
//! member is left.

use super::Handle;
use super::connection::Connection;
use super::convert::{entry, of_etcd, to_etcd};
use super::generated::{
    WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse, event::EventType,
    watch_request::RequestUnion,
};
use super::layout::KeyRange;
use super::members::Link;
use super::status::{Failure, clean};
use crate::store::*;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Status, Streaming};

/// The number etcd gives to the answers to requests for progress.
const PROGRESS: i64 = -1;

/// The watch of an [`super::EtcdStore`].
pub struct EtcdWatch {
    handle: Arc<Handle>,
    range: KeyRange,
    changes: Changes,
    state: State,
    /// A member refused our user; once may be because its token had run out.
    denied: Option<StoreError>,
}

type Opening = Pin<Box<dyn Future<Output = Result<Stream, End>> + Send>>;

enum State {
    Closed,
    Opening(Opening),
    Open(Box<Stream>),
    Ended(StoreError),
}

/// Why a stream ended, or was not opened.
enum End {
    /// This member can't; again, perhaps elsewhere.
    Again,
    /// As [`StoreError::Compacted`], with the oldest revision that is kept.
    Compacted(Revision),
    /// Our user may not.
    Denied(StoreError),
    /// Again is of no use.
    Final(StoreError),
}

impl EtcdWatch {
    pub(super) fn new(handle: Arc<Handle>, range: KeyRange, after: Revision) -> Self {
        EtcdWatch { handle, range, changes: Changes::new(after), state: State::Closed, denied: None }
    }

    fn end(&mut self, end: End) {
        self.state = match end {
            End::Again => State::Closed,
            End::Compacted(oldest) => {
                State::Ended(StoreError::Compacted { asked: self.changes.position, oldest })
            }
            End::Final(error) => State::Ended(error),
            End::Denied(error) if self.denied.is_some() => State::Ended(error),
            End::Denied(error) => {
                self.denied = Some(error);
                State::Closed
            }
        };
    }
}

impl Watch for EtcdWatch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            if let Some(batch) = self.changes.ready.pop_front() {
                return Ok(batch);
            }
            match &mut self.state {
                State::Ended(error) => return Err(error.clone()),
                State::Closed => {
                    self.changes.unfinished = None;
                    let open = Stream::open(self.handle.clone(), self.range.clone(), self.changes.position);
                    self.state = State::Opening(Box::pin(open));
                }
                State::Opening(opening) => match opening.await {
                    Ok(stream) => {
                        self.denied = None;
                        self.state = State::Open(Box::new(stream));
                    }
                    Err(end) => self.end(end),
                },
                State::Open(stream) => {
                    let result = match stream.next(&self.handle).await {
                        Ok(answer) => self.changes.take(answer, &self.handle).map_err(|why| {
                            stream.leave(&self.handle, &why);
                            End::Again
                        }),
                        Err(end) => Err(end),
                    };
                    if let Err(end) = result {
                        self.end(end);
                    }
                }
            }
        }
    }
}

/// Puts what streams tell together: all changes of one revision are one batch.
struct Changes {
    /// All changes up to here are in `ready`, or were given out.
    position: Revision,
    ready: VecDeque<WatchBatch>,
    /// A revision of which more may follow.
    unfinished: Option<WatchBatch>,
}

impl Changes {
    fn new(position: Revision) -> Self {
        Changes { position, ready: VecDeque::new(), unfinished: None }
    }

    fn take(&mut self, answer: WatchResponse, handle: &Handle) -> Result<(), String> {
        let layout = &handle.members.settings.layout;
        let silent = answer.events.is_empty();
        for event in answer.events {
            let deleted = event.r#type() == EventType::Delete;
            let kv = event.kv.ok_or("an event without a key")?;
            let revision = of_etcd(kv.mod_revision);
            if revision <= self.position {
                continue;
            }
            if self.unfinished.as_ref().is_some_and(|batch| batch.revision != revision) {
                self.finish();
            }
            if revision <= self.position {
                return Err(format!("an event of revision {revision} after one of {}", self.position));
            }
            let batch = self.unfinished.get_or_insert(WatchBatch { revision, events: Vec::new() });
            if let Some(entry) = entry(&kv, layout) {
                let key = entry.key.clone();
                batch.events.push(Event { key, entry: (!deleted).then_some(entry) });
            }
        }
        if !answer.fragment {
            self.finish();
            // Nothing up to there was left out: said by etcd itself from time to time. (What it answers to a request
            // for progress may be ahead of changes that it has still to send.)
            if silent && !answer.created && answer.watch_id != PROGRESS {
                let revision = of_etcd(answer.header.map_or(0, |h| h.revision));
                self.position = self.position.max(revision);
            }
        }
        Ok(())
    }

    fn finish(&mut self) {
        if let Some(batch) = self.unfinished.take() {
            self.position = batch.revision;
            // Also one without changes: somebody may wait for its revision.
            self.ready.push_back(batch);
        }
    }
}

/// One watch of one member.
struct Stream {
    connection: Arc<Connection>,
    requests: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
    link: watch::Receiver<Link>,
    seen: watch::Receiver<Revision>,
    /// The highest revision that it told.
    heard: Revision,
    lag: Lag,
}

/// What is done about a revision that the store has seen, and the stream has not told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lag {
    None,
    /// Until then it may come by itself.
    Waiting(Revision, Instant),
    /// Its progress was asked for, and has to come until then.
    Asked(Revision, Instant),
}

impl Lag {
    /// With what the stream has told and the store has seen, now.
    fn after(self, heard: Revision, seen: Revision, now: Instant, patience: Duration) -> Lag {
        match self {
            Lag::Waiting(target, _) | Lag::Asked(target, _) if heard < target => self,
            _ if heard < seen => Lag::Waiting(seen, now + patience),
            _ => Lag::None,
        }
    }

    fn until(self) -> Option<Instant> {
        match self {
            Lag::None => None,
            Lag::Waiting(_, until) | Lag::Asked(_, until) => Some(until),
        }
    }
}

impl Stream {
    async fn open(handle: Arc<Handle>, range: KeyRange, position: Revision) -> Result<Self, End> {
        let connection = handle.members.member().await.map_err(End::Final)?;
        let patience = handle.members.settings.timeout;
        match timeout(patience, Self::create(&handle, &connection, range, position)).await {
            Ok(result) => result,
            Err(_) => {
                handle.members.leave(&connection, "no answer to a watch");
                Err(End::Again)
            }
        }
    }

    async fn create(
        handle: &Handle,
        connection: &Arc<Connection>,
        (key, range_end): KeyRange,
        position: Revision,
    ) -> Result<Self, End> {
        let members = &handle.members;
        let create = WatchCreateRequest {
            key,
            range_end,
            // 0 would mean: only what comes from now on.
            start_revision: to_etcd(position.max(1)),
            progress_notify: true,
            fragment: true,
        };
        let (requests, mut waiting) = mpsc::channel(1);
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        requests.try_send(create).map_err(|_| End::Again)?;
        let sending = futures_util::stream::poll_fn(move |context| waiting.poll_recv(context));
        let answers = connection.watch().watch(connection.request(sending, None)).await;
        let answers = answers.map_err(|status| failed(handle, connection, &status))?.into_inner();
        let mut stream = Stream {
            connection: connection.clone(),
            requests,
            answers,
            link: members.link(),
            seen: members.seen(),
            heard: 0,
            lag: Lag::None,
        };
        let created = stream.answers.message().await;
        let created = stream.read(handle, created)?;
        if !created.created {
            stream.leave(handle, "its first answer to a watch is no creation");
            return Err(End::Again);
        }
        if stream.heard < position {
            // Either this member is behind, or that revision has not been: the cluster knows.
            let now = handle.revision().await.map_err(|_| End::Again)?;
            if now < position {
                return Err(End::Compacted(now));
            }
        }
        Ok(stream)
    }

    fn leave(&self, handle: &Handle, why: &str) {
        handle.members.leave(&self.connection, why);
    }

    /// An answer, if it is none of an end.
    fn read(
        &mut self,
        handle: &Handle,
        message: Result<Option<WatchResponse>, Status>,
    ) -> Result<WatchResponse, End> {
        let answer = match message {
            Ok(Some(answer)) => answer,
            Ok(None) => {
                self.leave(handle, "it ended a watch");
                return Err(End::Again);
            }
            Err(status) => return Err(failed(handle, &self.connection, &status)),
        };
        self.heard = self.heard.max(handle.members.saw(answer.header.as_ref()));
        if answer.compact_revision > 0 {
            return Err(End::Compacted(of_etcd(answer.compact_revision)));
        }
        if answer.canceled {
            let why = clean(&answer.cancel_reason);
            self.leave(handle, &format!("it cancelled a watch: {why}"));
            // etcd 3.4 says the same of a user without permission and of one whose token has run out.
            let denied = why.contains("permission denied") || why.contains("auth");
            return Err(match denied {
                true => End::Denied(StoreError::Denied(format!(
                    "etcd at {} does not let its user watch {}: {why}",
                    self.connection.endpoint(),
                    handle.members.settings.layout.prefix()
                ))),
                false => End::Again,
            });
        }
        Ok(answer)
    }

    /// The next answer with changes or progress. Cancel-safe.
    async fn next(&mut self, handle: &Handle) -> Result<WatchResponse, End> {
        let patience = handle.members.settings.timeout;
        loop {
            let seen = *self.seen.borrow_and_update();
            self.lag = self.lag.after(self.heard, seen, Instant::now(), patience);
            let until = self.lag.until();
            let left = left(&mut self.link, &self.connection);
            tokio::select! {
                biased;
                message = self.answers.message() => return self.read(handle, message),
                () = left => return Err(End::Again),
                // It can't end: this stream's handle holds its other side.
                _ = self.seen.changed(), if until.is_none() => {}
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => self.ask(handle)?,
            }
        }
    }

    /// What the member did not tell in time is asked for, once.
    fn ask(&mut self, handle: &Handle) -> Result<(), End> {
        let progress = RequestUnion::ProgressRequest(WatchProgressRequest {});
        let request = WatchRequest { request_union: Some(progress) };
        match self.lag {
            Lag::Waiting(target, _) if self.requests.try_send(request).is_ok() => {
                self.lag = Lag::Asked(target, Instant::now() + handle.members.settings.timeout);
                Ok(())
            }
            _ => {
                self.leave(handle, "its watch has fallen behind");
                Err(End::Again)
            }
        }
    }
}

/// Waits until a member is no longer the one in use.
async fn left(link: &mut watch::Receiver<Link>, connection: &Arc<Connection>) {
    // An error says that there is no store any more.
    let _ = link.wait_for(|link| !link.is(connection)).await;
}

/// Why a watch failed that was answered so.
fn failed(handle: &Handle, connection: &Arc<Connection>, status: &Status) -> End {
    let end = match connection.failure(status) {
        Failure::Final(error @ StoreError::Denied(_)) => End::Denied(error),
        Failure::Final(error) => return End::Final(error),
        _ => End::Again,
    };
    handle.members.leave(connection, &format!("a watch ended: {}", clean(status.message())));
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_fallen_behind_when_it_does_not_reach_what_was_seen() {
        let (now, patience) = (Instant::now(), Duration::from_secs(1));
        let later = now + patience;
        assert_eq!(Lag::None.after(5, 5, now, patience), Lag::None);
        let waiting = Lag::None.after(5, 7, now, patience);
        assert_eq!(waiting, Lag::Waiting(7, later));
        // More that is seen does not put it off, and what it tells of that is enough.
        assert_eq!(waiting.after(6, 9, later, patience), waiting);
        assert_eq!(waiting.after(7, 7, later, patience), Lag::None);
        assert_eq!(waiting.after(7, 9, later, patience), Lag::Waiting(9, later + patience));
        let asked = Lag::Asked(7, later);
        assert_eq!(asked.after(6, 9, later, patience), asked);
        assert_eq!(asked.after(8, 8, later, patience), Lag::None);
    }
}
