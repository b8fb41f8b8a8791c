//! One agent's session: keeps its presence, tells it what its machine has to hold, and writes what it reports.

use super::{
    Server,
    hub::{self, lock},
    pace::Pace,
    renewal::Moment,
};
use anyhow::bail;
use fleet_cluster::model::*;
use fleet_cluster::view::View;
use fleet_link::{Ask, Beat, Chunk, FromAgent, Held, Hello, Instruction, Request, ServerEnd, ToAgent};
use fleet_registry::records::{PresenceRecord, leaving_key, presence_key, put_presence, put_states};
use fleet_registry::store::MAX_OPS;
use fleet_registry::{Compare, LeaseId, Op, Store, StoreError, Txn};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// How often a machine's states are written while many of its units change: a registry of our own takes more than one that
/// others share.
const OWN_STEP: Duration = Duration::from_millis(100);
const SHARED_STEP: Duration = Duration::from_secs(1);

/// How long to wait before trying again to write to a store that can't be written.
const RETRY: Duration = Duration::from_secs(1);

/// How long a question to an agent may wait for room in its queue.
const ASK_DEADLINE: Duration = Duration::from_secs(5);

/// Pieces of an answer under way to a reader.
const ANSWER_QUEUE: usize = 16;
/// Of so many units it is remembered that a machine reported them, which were none of its business.
const MOST_LEFT_OUT: usize = 1000;

/// The way to ask an agent.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    send: mpsc::Sender<ToAgent>,
    /// Cancelled when the machine was removed from the cluster.
    removed: CancellationToken,
    /// Whether it is that of a machine that joined, and not of this server's own.
    pub(super) joined: bool,
    /// Cancelled when its agent is to go to another server.
    pub(super) sent_away: CancellationToken,
}

/// Why a machine can't be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// No session with it here.
    #[error("machine {0} is not connected")]
    NotConnected(MachineId),
    /// No server is known to have a session with it.
    #[error("machine {0} is not connected: no server is known to have a session with it")]
    Nowhere(MachineId),
    /// Another server has its session, and can't ask it.
    #[error("machine {machine} has its session with server {server}, which {problem}")]
    #[allow(missing_docs)]
    Elsewhere { machine: MachineId, server: MachineId, problem: String },
    /// It takes no more questions now.
    #[error("machine {0} does not answer")]
    Busy(MachineId),
}

impl<S: Store> Server<S> {
    /// Asks a machine that has its session here; the answer comes in pieces. Dropping the receiver ends the work there.
    pub(super) async fn ask_here(
        &self,
        machine: &MachineId,
        ask: Ask,
    ) -> Result<mpsc::Receiver<Chunk>, AskError> {
        let handle = lock(&self.sessions).get(machine).cloned();
        let Some(handle) = handle else { return Err(AskError::NotConnected(machine.clone())) };
        let (answer, receiver) = mpsc::channel(ANSWER_QUEUE);
        let request = ToAgent::Request(Box::new(Request { ask, answer }));
        match handle.send.send_timeout(request, ASK_DEADLINE).await {
            Ok(()) => Ok(receiver),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => Err(AskError::Busy(machine.clone())),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(AskError::NotConnected(machine.clone())),
        }
    }

    /// Lets the session with a machine know, if there is one, that the machine was removed.
    pub(super) fn tell_removed(&self, id: &MachineId) {
        if let Some(handle) = lock(&self.sessions).get(id) {
            handle.removed.cancel();
        }
    }

    pub(super) async fn run_session(&self, end: ServerEnd) -> anyhow::Result<()> {
        let id = end.hello.id.clone();
        let mailbox = self.hub.open_mailbox(&id);
        let handle = Handle {
            send: end.send.clone(),
            removed: CancellationToken::new(),
            joined: end.peer.is_some(),
            sent_away: CancellationToken::new(),
        };
        lock(&self.sessions).insert(id.clone(), handle.clone());
        info!(machine = %id, "session with machine {id} begins");
        let mut session = Session {
            server: self,
            hello: end.hello,
            send: end.send,
            told: BTreeMap::new(),
            ever_told: BTreeSet::new(),
            peer: end.peer,
            left_out: BTreeSet::new(),
            untold: BTreeSet::new(),
            crowded: false,
            told_servers: 0,
            reports: BTreeMap::new(),
            complete: false,
            lease: None,
            renewed: None,
            written: false,
            doubtful: false,
            presence: 0,
            pace: Pace::new(if self.config.shared_registry { SHARED_STEP } else { OWN_STEP }),
            released: BTreeMap::new(),
            release_at: None,
            asked: BTreeSet::new(),
            dismissed: false,
        };
        let ended = tokio::select! {
            biased;
            () = self.cancel.cancelled() => Ok(()),
            () = handle.sent_away.cancelled() => Ok(()),
            ended = async {
                // From here on a removal cancels `removed`. One between the admission and here did not; and who has let go of its
                // units meanwhile is not to come back.
                let removed = loop {
                    match self.is_removed(&id).await {
                        // An agent elsewhere can ask another server; our own waits for the registry with us.
                        Err(error) if end.peer.is_none() => {
                            self.trouble("beginning the session with this machine's agent", &error);
                            tokio::time::sleep(RETRY).await;
                        }
                        removed => break removed?,
                    }
                };
                if end.peer.is_some() && !removed && !self.is_member(&id).await? {
                    bail!("it was removed from the cluster meanwhile");
                }
                if removed {
                    handle.removed.cancel();
                }
                session.run(&mailbox, end.receive, end.beats, &handle.removed).await
            } => ended,
        };
        self.hub.close_mailbox(&id, &mailbox);
        {
            let mut sessions = lock(&self.sessions);
            if sessions.get(&id).is_some_and(|current| current.send.same_channel(&handle.send)) {
                sessions.remove(&id);
            }
        }
        info!(machine = %id, "session with machine {id} ends");
        ended
    }
}

/// Ends at a time; never without one.
pub(super) async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Ends when there is room in an agent's queue, or the agent is gone.
async fn room(send: &mpsc::Sender<ToAgent>) {
    let _ = send.reserve().await;
}

pub(super) struct Session<'a, S: Store> {
    pub(super) server: &'a Server<S>,
    pub(super) hello: Hello,
    pub(super) send: mpsc::Sender<ToAgent>,
    /// What the agent was told last.
    told: BTreeMap<UnitName, Instruction>,
    /// All that it was told of in this session: some of it may still be stopping.
    pub(super) ever_told: BTreeSet<UnitName>,
    /// Where it connects from; `None` for this machine's own.
    peer: Option<SocketAddr>,
    /// What it reported though that is none of its business, as far as it is remembered.
    pub(super) left_out: BTreeSet<UnitName>,
    /// Units to look at again when the view has the machine, and the agent has taken some of what it was told before.
    untold: BTreeSet<UnitName>,
    /// Whether its queue had no room for what changed last.
    crowded: bool,
    /// Which servers there are the agent was told of, by the number that these have.
    told_servers: u64,
    pub(super) reports: BTreeMap<UnitName, UnitReport>,
    /// Whether the agent has sent all its reports once: before, what it did not mention is unknown, not gone.
    pub(super) complete: bool,
    pub(super) lease: Option<LeaseId>,
    /// When the last renewal of that was asked for that can be believed.
    renewed: Option<Moment>,
    /// Whether the store has the present reports.
    written: bool,
    /// Whether an older write may still arrive at the store and take the place of a newer one.
    doubtful: bool,
    /// The revision at which this session wrote the machine's presence.
    pub(super) presence: Revision,
    pace: Pace,
    /// Units of which the agent has said that nothing runs any more, and the registry is yet to be told, with the revisions at which
    /// that was asked.
    released: BTreeMap<UnitName, Revision>,
    /// When to tell the registry of them.
    release_at: Option<Instant>,
    /// Units of which a machine that was removed has yet to say that nothing runs.
    pub(super) asked: BTreeSet<UnitName>,
    /// Whether the machine was removed and is told so.
    pub(super) dismissed: bool,
}

impl<S: Store> Session<'_, S> {
    async fn run(
        &mut self,
        mailbox: &super::hub::Mailbox<BTreeSet<UnitName>>,
        mut receive: mpsc::Receiver<FromAgent>,
        mut beats: mpsc::Receiver<Beat>,
        removed: &CancellationToken,
    ) -> anyhow::Result<()> {
        if removed.is_cancelled() {
            return self.dismiss(receive, beats).await;
        }
        // Nothing is said to the agent before the view is complete and has its machine: absence is no instruction.
        loop {
            match self.begin().await {
                Ok(()) if self.look_at_all(mailbox) => break,
                Ok(()) => {
                    warn!(machine = %self.hello.id, "presence ran out as soon as it was written; trying again")
                }
                Err(error) => {
                    self.server
                        .trouble(&format!("writing the presence of machine {}", self.hello.id), &error);
                }
            }
            tokio::time::sleep(RETRY).await;
            // Only who still gives signs of life here is spoken for: the agent may have gone on to another server, and the
            // presence of that session must not be overwritten.
            while beats.try_recv().is_ok() {}
            if beats.recv().await.is_none() {
                return Ok(());
            }
        }
        if self.send.send(ToAgent::Snapshot(self.told.clone())).await.is_err() {
            return Ok(());
        }
        self.tell_servers().await;
        loop {
            let write_at = self.write_at();
            let write = at(write_at);
            let release = at(self.release_at);
            tokio::select! {
                biased;
                message = receive.recv() => match message {
                    Some(message) => {
                        self.take(message);
                        while let Ok(message) = receive.try_recv() {
                            self.take(message);
                        }
                    }
                    None => return Ok(()),
                },
                () = removed.cancelled() => return self.dismiss(receive, beats).await,
                Some(beat) = beats.recv() => self.beat(beat, mailbox).await,
                () = mailbox.wait() => {
                    if !self.tell(mailbox.take()).await {
                        return Ok(());
                    }
                }
                () = room(&self.send), if self.crowded => {
                    if !self.tell(BTreeSet::new()).await {
                        return Ok(());
                    }
                }
                () = write => {
                    if !self.write().await {
                        return Ok(());
                    }
                }
                () = release => {
                    if !self.release().await {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Finds out all that the agent is to be told; false when the view does not have the machine (any more).
    fn look_at_all(&mut self, mailbox: &super::hub::Mailbox<BTreeSet<UnitName>>) -> bool {
        mailbox.take();
        {
            let view = self.server.hub.view();
            if view.machine(&self.hello.id).is_none() {
                return false;
            }
            self.told.clear();
            let id = &self.hello.id;
            let mut names: BTreeSet<_> = view.all_wanted(id).into_keys().collect();
            names.extend(view.leaving_from(id).cloned());
            names.extend(view.all_unread().filter_map(|record| match record {
                Record::OfUnit(_, name) => Some(name),
                Record::OfMachine(..) => None,
            }));
            if view.is_unread(id, RecordKind::Machine) {
                names.extend(view.globals().cloned());
            }
            let told = names
                .into_iter()
                .filter_map(|name| Some((name.clone(), self.instruction(&view, &name, true)?)));
            self.told = told.collect();
        }
        self.ever_told.extend(self.told.keys().cloned());
        true
    }

    /// What to say of a unit. What can't be read is no instruction: a machine that was told to hold the unit, or is told for the first time
    /// (`first`), leaves it as it is. It does not go on holding it: had its presence run out, and the unit been placed elsewhere, it would
    /// start it again. But it has to let go of one that is elsewhere, or was taken off there, by records that can be read.
    fn instruction(&self, view: &View, name: &UnitName, first: bool) -> Option<Instruction> {
        let id = &self.hello.id;
        let global =
            view.unit(name).filter(|unit| unit.requirements.global && unit.desired >= DesiredState::Loaded);
        // Whether a Global unit is for this machine shows by the machine's metadata.
        let asks = global.is_some_and(|unit| !unit.requirements.metadata.is_empty());
        let in_doubt = hub::unread(view, name).is_some() || asks && view.is_unread(id, RecordKind::Machine);
        if !in_doubt {
            let wanted = view.wanted(id, name).map(Instruction::Hold);
            return wanted.or_else(|| self.asks_release(view, name));
        }
        let is_read = |kind| view.unread_record(name.as_str(), kind).is_none();
        if global.is_none() && is_read(RecordKind::Schedule) {
            // What was decided before the record that can't be read says nothing: by that the unit may be Global.
            let unread = view.unread_revision(name.as_str()).unwrap_or_default();
            let place = view.place(name);
            let is_here = place.is_some_and(|(at, _)| at == id);
            let is_elsewhere = !is_here && place.is_some_and(|(_, decided)| decided > unread);
            let release = self.asks_release(view, name).filter(|_| is_read(RecordKind::Leaving));
            let has_left =
                view.leaving(name).is_some_and(|(_, decided)| decided > unread) && release.is_some();
            if is_elsewhere || !is_here && has_left {
                return release;
            }
        }
        match self.told.get(name) {
            Some(Instruction::Release(number)) => Some(Instruction::Release(*number)),
            Some(Instruction::Hold(_) | Instruction::Leave) => Some(Instruction::Leave),
            None => first.then_some(Instruction::Leave),
        }
    }

    /// What to say of a unit that is not wanted, if the machine has yet to say that nothing of it runs.
    fn asks_release(&self, view: &View, name: &UnitName) -> Option<Instruction> {
        let (_, revision) = view.leaving(name).filter(|(id, _)| **id == self.hello.id)?;
        Some(Instruction::Release(revision))
    }

    /// When the states are to be written, if they are.
    pub(super) fn write_at(&mut self) -> Option<Instant> {
        // Without a lease there is nothing to write the states under; the next beat begins one.
        (!self.written && self.complete && self.lease.is_some()).then(|| self.pace.next(Instant::now()))
    }

    /// Whether a machine may report a unit: one that it was told of, or reported before. What else it claims to run must
    /// not keep that unit from running elsewhere.
    fn may_report(&mut self, name: &UnitName) -> bool {
        let id = &self.hello.id;
        // Nothing is told of who was removed; what it runs is of interest only to see it end.
        let may = self.dismissed
            || self.ever_told.contains(name)
            || self.server.hub.view().reports_of(name).any(|(machine, _)| machine == id);
        if !may && self.left_out.is_empty() {
            let from = self.peer.map(|peer| format!(" at {peer}")).unwrap_or_default();
            warn!(machine = %id, "machine {id}{from} reports units that are not placed on it, such as {name}; that is left out");
        }
        if !may && self.left_out.len() < MOST_LEFT_OUT {
            self.left_out.insert(name.clone());
        }
        may
    }

    pub(super) fn take(&mut self, message: FromAgent) {
        match message {
            FromAgent::Snapshot(mut reports) => {
                reports.retain(|name, _| self.may_report(name));
                self.written &= self.complete && self.reports == reports;
                let before = std::mem::replace(&mut self.reports, reports);
                self.complete = true;
                let names: BTreeSet<_> = before.into_keys().chain(self.reports.keys().cloned()).collect();
                for name in names.iter().chain(self.told.keys()) {
                    self.pace.note(name, self.told.get(name), self.reports.get(name), true);
                }
            }
            FromAgent::Changes(changes) => {
                for (name, report) in changes {
                    match report {
                        Some(report) if self.may_report(&name) => {
                            self.reports.insert(name.clone(), report);
                        }
                        Some(_) => continue,
                        None => {
                            self.reports.remove(&name);
                        }
                    }
                    self.pace.note(&name, self.told.get(&name), self.reports.get(&name), true);
                }
                self.written = false;
            }
            FromAgent::Released(units) => {
                // What was asked in the meantime is answered in the meantime.
                let asked =
                    |name: &UnitName, number| self.told.get(name) == Some(&Instruction::Release(number));
                let units = units.into_iter().filter(|(name, number)| asked(name, *number));
                self.released.extend(units);
                if !self.released.is_empty() {
                    self.release_at.get_or_insert_with(Instant::now);
                }
            }
        }
    }

    /// Sends what changed of these units; false when the agent is gone. While the view does not have the machine
    /// (its presence ran out) nothing is said: that the machine seems gone is no reason to stop anything on it.
    ///
    /// Never waits for this process's own agent when it has much to do: it may be waiting itself for its reports to be taken. What
    /// changes until it has room is told as one. The connection of another one always takes what it is to bring, and brings no answer
    /// that says that there is more to be heard.
    async fn tell(&mut self, names: BTreeSet<UnitName>) -> bool {
        self.untold.extend(names);
        if self.untold.is_empty() {
            self.crowded = false;
            return true;
        }
        let permit = match self.send.try_reserve() {
            Err(mpsc::error::TrySendError::Full(())) if self.peer.is_none() => {
                self.crowded = true;
                return true;
            }
            Err(mpsc::error::TrySendError::Full(())) => self.send.reserve().await.ok(),
            permit => permit.ok(),
        };
        let Some(permit) = permit else { return false };
        self.crowded = false;
        let mut changes = BTreeMap::new();
        {
            let view = self.server.hub.view();
            if view.machine(&self.hello.id).is_none() {
                return true;
            }
            for name in std::mem::take(&mut self.untold) {
                let wanted = self.instruction(&view, &name, false);
                if wanted.as_ref() != self.told.get(&name) {
                    match &wanted {
                        Some(wanted) => {
                            self.ever_told.insert(name.clone());
                            self.told.insert(name.clone(), wanted.clone())
                        }
                        None => self.told.remove(&name),
                    };
                    self.pace.note(&name, wanted.as_ref(), self.reports.get(&name), false);
                    changes.insert(name, wanted);
                }
            }
        }
        self.pace.asked(changes.keys());
        if !changes.is_empty() {
            permit.send(ToAgent::Changes(changes));
        }
        true
    }

    /// Sends where all servers are, if that has changed, to the agent of another machine: it has to find the next one when this one is gone.
    /// Looked at with each sign of life, so that sessions have nothing more to wait for.
    async fn tell_servers(&mut self) {
        if self.peer.is_none()
            || !self.server.config.shared_registry
            || self.told_servers == self.server.peers.generation()
        {
            return;
        }
        let (generation, servers) = self.server.peers.addresses();
        self.told_servers = generation;
        // That the agent is gone shows elsewhere.
        let _ = self.send.send(ToAgent::Servers(servers)).await;
    }

    /// A sign of life renews the machine's presence; its last one, when the machine shuts down, gives it up at once. The answer
    /// tells for how long the presence holds; without one it must not be counted on.
    async fn beat(&mut self, beat: Beat, mailbox: &super::hub::Mailbox<BTreeSet<UnitName>>) {
        let id = self.hello.id.clone();
        if beat.leaving {
            if let Err(error) = self.leave().await {
                warn!(machine = %id, "giving up the presence of machine {id}: {error}; it runs out by itself");
                return;
            }
            info!(machine = %id, "machine {id} leaves: it shuts down");
            let _ = beat.held.send(Held::during(Duration::ZERO));
            return;
        }
        let renewed = match self.lease {
            // An older session may have written it meanwhile; under its lease it would run out though this one is renewed.
            Some(_) if self.server.peers.presence(&id) != self.presence => self.begin().await,
            Some(lease) => self.renew(lease).await,
            None => self.begin().await,
        };
        let renewed = match renewed {
            Err(StoreError::LeaseEnded) => {
                warn!(machine = %id, "presence of machine {id} had run out, or may have; it is written anew");
                self.lease = None;
                self.begin().await
            }
            other => other,
        };
        match renewed {
            Ok(()) => {
                // First what changed, and was held back while the machine was not there: an agent that knows its presence renewed
                // must know what was decided before. That it is gone shows elsewhere.
                self.tell(mailbox.take()).await;
                self.tell_servers().await;
                let ttl = self.server.config.agent_ttl;
                let _ = beat.held.send(Held { ttl, told: !self.crowded });
            }
            Err(error) => self.server.trouble(&format!("renewing the presence of machine {id}"), &error),
        }
    }

    /// Renews the lease; one that may have ended though the store would renew it counts as ended.
    pub(super) async fn renew(&mut self, lease: LeaseId) -> Result<(), StoreError> {
        let now = Moment::now(&self.server.suspended);
        if self.renewed.is_none_or(|last| last.is_doubtful(now, self.server.config.agent_ttl)) {
            return Err(StoreError::LeaseEnded);
        }
        self.server.store.keep_alive(lease).await?;
        self.renewed = Some(now);
        Ok(())
    }

    /// Gives the machine's presence up on purpose: first says so, then ends the lease.
    pub(super) async fn leave(&mut self) -> Result<(), StoreError> {
        let Some(lease) = self.lease else { return Ok(()) };
        let ops = vec![put_presence(&self.hello.id, &self.presence(true), lease)];
        self.server.store.commit(Txn { compares: vec![self.guard()], ops }).await?;
        self.server.store.revoke(lease).await?;
        self.lease = None;
        Ok(())
    }

    pub(super) fn presence(&self, leaving: bool) -> PresenceRecord {
        PresenceRecord {
            format: 1,
            public_ip: self.hello.machine.public_ip.clone(),
            metadata: self.hello.machine.metadata.clone(),
            version: self.hello.machine.version.clone(),
            server: Some(self.server.config.machine.clone()),
            leaving,
            lease: None,
        }
    }

    /// Begins a lease and writes the machine's presence under it, unless another session did so while this one was about it.
    async fn begin(&mut self) -> Result<(), StoreError> {
        self.server.hub.reached(1).await;
        let known = self.server.peers.presence(&self.hello.id);
        let now = Moment::now(&self.server.suspended);
        let lease = self.server.store.grant(self.server.config.agent_ttl).await?;
        let ops = vec![put_presence(&self.hello.id, &self.presence(false), lease)];
        let guard = Compare { key: presence_key(&self.hello.id), revision: known };
        let written = self.server.store.commit(Txn { compares: vec![guard], ops }).await;
        if matches!(written, Err(StoreError::Unknown(_) | StoreError::Conflict(_))) {
            // It may be under another lease now, so that to renew the one from before would say nothing of it.
            self.lease = None;
        }
        let revision = written?;
        self.server.hub.reached(revision).await;
        self.lease = Some(lease);
        self.renewed = Some(now);
        self.presence = revision;
        self.written = false;
        self.doubtful = false;
        Ok(())
    }

    /// Holds as long as no other session wrote the machine's presence: an agent that has gone on to another server, or has
    /// connected anew, is spoken for there.
    pub(super) fn guard(&self) -> Compare {
        Compare { key: presence_key(&self.hello.id), revision: self.presence }
    }

    /// Writes the states; false when the agent has a newer session.
    pub(super) async fn write(&mut self) -> bool {
        if self.lease.is_some() && self.doubtful {
            // What was written for this session's present presence is refused once that is written anew.
            if let Err(error) = self.begin().await {
                self.pace.failed(Instant::now() + RETRY);
                self.server.trouble(&format!("writing the presence of machine {}", self.hello.id), &error);
                return true;
            }
        }
        let Some(lease) = self.lease else { return true };
        let id = &self.hello.id;
        let ops = vec![put_states(id, &self.reports, lease)];
        match self.server.store.commit(Txn { compares: vec![self.guard()], ops }).await {
            Ok(revision) => {
                debug!(machine = %id, revision, "states written");
                self.pace.wrote(Instant::now());
                self.written = true;
            }
            // The presence ran out, and the lease with it.
            Err(StoreError::LeaseEnded) => self.lease = None,
            Err(StoreError::Conflict(conflict)) if conflict.found == 0 => self.lease = None,
            Err(StoreError::Conflict(_)) => {
                info!(machine = %id, "machine {id} has a newer session");
                return false;
            }
            Err(error) => {
                self.doubtful |= matches!(error, StoreError::Unknown(_));
                self.pace.failed(Instant::now() + RETRY);
                self.server.trouble(&format!("writing the states of machine {id}"), &error);
            }
        }
        true
    }

    /// Lets the registry know of units that nothing of them runs here; false when the agent has a newer session. Who speaks for the machine
    /// no more must not say that: what the newer session has told may have started them.
    async fn release(&mut self) -> bool {
        self.release_at = None;
        let id = self.hello.id.clone();
        while !self.released.is_empty() {
            let units: Vec<_> = self.released.iter().take(MAX_OPS - 1).collect();
            let mut txn = Txn { compares: vec![self.guard()], ops: Vec::new() };
            for (name, revision) in &units {
                txn.compares.push(Compare { key: leaving_key(name), revision: **revision });
                txn.ops.push(Op::Delete { key: leaving_key(name) });
            }
            let last = units.last().map(|(name, _)| (*name).clone());
            match self.server.store.commit(txn).await {
                Ok(revision) => {
                    debug!(machine = %id, revision, "what has stopped is written");
                    self.released.retain(|name, _| last.as_ref().is_some_and(|last| name > last));
                }
                Err(StoreError::Conflict(conflict)) if conflict.key != presence_key(&id) => {
                    // Of this one it is of no interest any more.
                    self.released.retain(|name, _| leaving_key(name) != conflict.key);
                }
                // Its presence ran out; it is written anew with the next sign of life.
                Err(StoreError::Conflict(conflict)) if conflict.found == 0 => {
                    self.release_at = Some(Instant::now() + RETRY);
                    return true;
                }
                Err(StoreError::Conflict(_)) => {
                    info!(machine = %id, "machine {id} has a newer session");
                    return false;
                }
                Err(error) => {
                    self.release_at = Some(Instant::now() + RETRY);
                    self.server.trouble(&format!("writing what machine {id} has stopped"), &error);
                    return true;
                }
            }
        }
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
