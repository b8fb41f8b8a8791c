//! The last session of a machine that was removed from the cluster.
//!
//! Its credentials are worth nothing any more, but its units still run there, and are to run elsewhere. So it is told once more what it is
//! to hold: nothing. It stops them, and when it says that nothing of them runs any more (a report alone may be older), its presence ends as if it
//! had left by itself ([`Change::Farewell`]): its units are placed elsewhere at once, and never run twice. Until then its presence is marked as
//! leaving.
//!
//! A machine that is out of reach when it is removed keeps its units running, as absence is no instruction; it is told when it
//! comes back, for which the record of its removal lets it in once more. It gets nothing else in such a session: no presence, no
//! units, no new certificate. Its presence is ended at once by the server that it had its session with, which alone knows that there is none any
//! more ([`Server::end_presences`]); only that of a machine with units that must not run twice runs out. A server that merely does not know a machine refuses it, and stops nothing there: its registry may have been lost.
//!
//! [`Change::Farewell`]: fleet_cluster::model::Change::Farewell

use super::session::{Session, at};
use super::{MembershipError, Server, membership::removed_key};
use fleet_cluster::model::{MachineId, Revision};
use fleet_link::{Beat, FromAgent, Held, Instruction, ToAgent};
use fleet_registry::records::put_presence;
use fleet_registry::{Compare, Store, StoreError, Txn};
use fleet_unit::UnitName;
use std::{collections::BTreeSet, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tracing::{info, warn};

/// How long a machine may take to stop its units: longer than systemd lets a unit take, unless its file says otherwise.
const STOP_DEADLINE: Duration = Duration::from_secs(120);
/// How long to wait before the registry is tried again.
const RETRY: Duration = Duration::from_millis(500);

impl<S: Store> Server<S> {
    /// Ends the presences of machines that are removed through other servers, had their session with this one and have none any more,
    /// until cancelled.
    pub(super) async fn end_presences(&self) -> anyhow::Result<()> {
        loop {
            let id = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                id = self.peers.next_removed() => id,
            };
            while let Some(Err(error)) = self.cancel.run_until_cancelled(self.end_presence(&id)).await {
                match error {
                    MembershipError::Store(error) if error.may_pass() => {
                        self.trouble("ending the presence of a machine that was removed", &error);
                        tokio::select! {
                            biased;
                            () = self.cancel.cancelled() => return Ok(()),
                            () = tokio::time::sleep(RETRY) => {}
                        }
                    }
                    other => {
                        warn!(machine = %id, "the presence of machine {id}, which was removed, runs out by itself: {other}");
                        break;
                    }
                }
            }
        }
    }

    async fn end_presence(&self, id: &MachineId) -> Result<(), MembershipError> {
        // Who joined anew meanwhile is not removed any more.
        let removed = self.store.get(&removed_key(id)).await?;
        let (Some(removed), true) =
            (removed, self.peers.session_of(id).is_some_and(|server| server == self.config.machine))
        else {
            return Ok(());
        };
        let still = Compare { key: removed_key(id), revision: removed.revision };
        let mut txn = Txn { compares: vec![still], ops: Vec::new() };
        let Some(lease) = self.add_farewell(&mut txn, id).await? else { return Ok(()) };
        match self.store.commit(txn).await {
            Ok(_) => {
                self.end_lease(lease).await?;
                info!(machine = %id, "machine {id}, which was removed, is out of reach: its presence ends");
                Ok(())
            }
            // A session began, or it ended meanwhile.
            Err(StoreError::Conflict(_) | StoreError::LeaseEnded) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The number with which it is asked to say that units have stopped: nothing is told after that. It is no revision.
const ASKED: Revision = Revision::MAX;

impl<S: Store> Session<'_, S> {
    /// Has the machine let go of its units, and ends its presence.
    pub(super) async fn dismiss(
        &mut self,
        mut receive: mpsc::Receiver<FromAgent>,
        mut beats: mpsc::Receiver<Beat>,
    ) -> anyhow::Result<()> {
        let id = self.hello.id.clone();
        // This server may have heard late of a removal, and the machine have joined again: then another session is as good as the first.
        if !self.server.is_removed(&id).await? {
            info!(machine = %id, "machine {id} was removed, and has joined again: it begins another session");
            return Ok(());
        }
        info!(machine = %id, "machine {id} was removed: it is told to stop its units");
        self.dismissed = true;
        if let Some(lease) = self.lease {
            // From now on nothing is placed there.
            let ops = vec![put_presence(&id, &self.presence(true), lease)];
            self.presence = self.server.store.commit(Txn { compares: vec![self.guard()], ops }).await?;
        }
        let asked = self.ask_all_releases();
        let told = asked.iter().map(|name| (name.clone(), Instruction::Release(ASKED)));
        if self.send.send(ToAgent::Snapshot(told.collect())).await.is_err() {
            return Ok(());
        }
        self.asked = asked;
        match timeout(STOP_DEADLINE, self.wait_until_stopped(&mut receive, &mut beats)).await {
            Ok(true) => {}
            // Its presence runs out by itself, and when it comes back it is told again.
            Ok(false) => return Ok(()),
            Err(_) => {
                let left: BTreeSet<_> =
                    self.reports.keys().chain(&self.asked).map(ToString::to_string).collect();
                let left: Vec<_> = left.into_iter().collect();
                warn!(
                    machine = %id,
                    "machine {id}, which was removed, has not stopped {} within {} s; its presence runs out by itself",
                    left.join(", "),
                    STOP_DEADLINE.as_secs()
                );
                return Ok(());
            }
        }
        self.leave().await?;
        self.server.forget_removed(&id).await?;
        info!(machine = %id, "machine {id} has stopped its units and is out of the cluster");
        Ok(())
    }

    /// All units that may run there, or may be started by what it was told last; also those of which its word did not count before.
    fn ask_all_releases(&self) -> BTreeSet<UnitName> {
        let view = self.server.hub.view();
        let id = &self.hello.id;
        let known = view.scheduled_on(id).chain(view.leaving_from(id)).chain(view.reported_on(id));
        known.chain(&self.ever_told).chain(self.reports.keys()).chain(&self.left_out).cloned().collect()
    }

    /// Takes reports until there are none left, and nothing of which it was asked runs; false when the machine is gone before that.
    async fn wait_until_stopped(
        &mut self,
        receive: &mut mpsc::Receiver<FromAgent>,
        beats: &mut mpsc::Receiver<Beat>,
    ) -> bool {
        while !self.complete || !self.reports.is_empty() || !self.asked.is_empty() {
            let write_at = self.write_at();
            tokio::select! {
                biased;
                message = receive.recv() => match message {
                    Some(FromAgent::Released(units)) => {
                        self.asked.retain(|name| units.get(name) != Some(&ASKED));
                    }
                    Some(message) => self.take(message),
                    None => return false,
                },
                // While it stops its units it is there; without a presence, or with one that was lost, there is nothing to hold.
                Some(beat) = beats.recv() => {
                    if let Some(lease) = self.lease
                        && self.renew(lease).await.is_ok()
                    {
                        let _ = beat.held.send(Held::during(self.server.config.agent_ttl));
                    }
                }
                () = at(write_at) => {
                    if !self.write().await {
                        return false;
                    }
                }
            }
        }
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::server::ServerConfig;
    use fleet_cluster::{engine::Policy, model::Machine};
    use fleet_link::serve::{Joining, Membership as _};
    use fleet_link::{Hello, ServerEnd, ca::MachineKey, token::Terms};
    use fleet_registry::EmbeddedStore;
    use fleet_registry::records::{PresenceRecord, presence_key};
    use tokio::task::JoinSet;
    use tokio_util::sync::CancellationToken;

    /// Nobody could wait for it.
    const TTL: Duration = Duration::from_secs(24 * 3600);
    const PEER: &str = "10.0.0.2:40000";

    fn id(number: u8) -> MachineId {
        MachineId::parse(&format!("{number:032x}")).unwrap()
    }

    #[tokio::test]
    async fn who_had_the_session_ends_the_presence() {
        let directory = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(directory.path()).unwrap();
        let (mut tasks, cancel) = (JoinSet::new(), CancellationToken::new());
        let mut server = |number| {
            let config = ServerConfig {
                machine: id(number),
                agent_ttl: TTL,
                policy: Policy::for_ttl(TTL),
                disable_engine: true,
                shared_registry: true,
                address: None,
            };
            let server = Server::new(store.clone(), config, cancel.clone());
            server.start(&mut tasks);
            let task = server.clone();
            tasks.spawn(async move { task.end_presences().await });
            server
        };
        let (one, two) = (server(1), server(2));
        let (token, _) = two.create_token(Terms { ttl: TTL, uses: None }).await.unwrap();
        for number in [7, 8] {
            let joining = Joining {
                token: token.id,
                secret: token.secret.clone(),
                machine: id(number),
                key: MachineKey::generate().unwrap().id(),
                peer: PEER.parse().unwrap(),
            };
            two.join(joining).await.unwrap();
        }
        let session = |number| {
            let (end, agent) = fleet_link::local(Hello { id: id(number), machine: Machine::default() });
            let (end, server) = (ServerEnd { peer: Some(PEER.parse().unwrap()), ..end }, one.clone());
            (tokio::spawn(async move { server.serve_agent(end).await }), agent)
        };
        let mut revisions = two.hub().applied();
        let (ended, mut agent) = session(7);
        agent.receive.recv().await.unwrap();
        drop(agent);
        ended.await.unwrap().unwrap();
        // This one stays.
        let (stays, mut agent) = session(8);
        agent.receive.recv().await.unwrap();
        while [7, 8].iter().any(|number| two.peers.session_of(&id(*number)) != Some(id(1)))
            || two.peers.servers().len() < 2
        {
            revisions.changed().await.unwrap();
        }
        let presence = store.get(&presence_key(&id(7))).await.unwrap().unwrap();
        let presence: PresenceRecord = serde_json::from_slice(&presence.value).unwrap();
        for number in [8, 7] {
            two.remove_machine(&id(number)).await.unwrap();
        }
        while two.peers.session_of(&id(7)).is_some() {
            revisions.changed().await.unwrap();
        }
        // A session that went on somewhere after all would find that out as it renews.
        assert_eq!(store.keep_alive(presence.lease.unwrap()).await, Err(StoreError::LeaseEnded));
        // It lets go of its units first. That it was removed first means that it was looked at.
        assert!(store.get(&presence_key(&id(8))).await.unwrap().is_some());
        cancel.cancel();
        stays.await.unwrap().unwrap();
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap().unwrap();
        }
        store.close().await;
    }
}
