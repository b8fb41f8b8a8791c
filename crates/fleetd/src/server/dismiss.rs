//! The last session of a machine that was removed from the cluster.
//!
//! Its credentials are worth nothing any more, but its units still run there, and are to run elsewhere. So it is told once more what it is
//! to hold: nothing. It stops them, and when it reports that, its presence ends as if it had left by itself ([`Change::Farewell`]): its units
//! are placed elsewhere at once, and never run twice. Until then its presence is marked as leaving.
//!
//! A machine that is out of reach when it is removed keeps its units running, as absence is no instruction; it is told when it
//! comes back, for which the record of its removal lets it in once more. It gets nothing else in such a session: no presence, no
//! units, no new certificate. A server that merely does not know a machine refuses it, and stops nothing there: its registry may have been lost.
//!
//! [`Change::Farewell`]: fleet_cluster::model::Change::Farewell

use super::session::{Session, at};
use fleet_link::{Beat, FromAgent, Held, ToAgent};
use fleet_registry::records::put_presence;
use fleet_registry::{Store, Txn};
use std::{collections::BTreeMap, time::Duration};
use tokio::{sync::mpsc, time::timeout};
use tracing::{info, warn};

/// How long a machine may take to stop its units: longer than systemd lets a unit take, unless its file says otherwise.
const STOP_DEADLINE: Duration = Duration::from_secs(120);

impl<S: Store> Session<'_, S> {
    /// Has the machine let go of its units, and ends its presence.
    pub(super) async fn dismiss(
        &mut self,
        mut receive: mpsc::Receiver<FromAgent>,
        mut beats: mpsc::Receiver<Beat>,
    ) -> anyhow::Result<()> {
        let id = self.hello.id.clone();
        info!(machine = %id, "machine {id} was removed: it is told to stop its units");
        self.dismissed = true;
        if let Some(lease) = self.lease {
            // From now on nothing is placed there.
            let ops = vec![put_presence(&id, &self.presence(true), lease)];
            self.presence = self.server.store.commit(Txn { compares: vec![self.guard()], ops }).await?;
        }
        if self.send.send(ToAgent::Snapshot(BTreeMap::new())).await.is_err() {
            return Ok(());
        }
        match timeout(STOP_DEADLINE, self.wait_until_stopped(&mut receive, &mut beats)).await {
            Ok(true) => {}
            // Its presence runs out by itself, and when it comes back it is told again.
            Ok(false) => return Ok(()),
            Err(_) => {
                let left: Vec<_> = self.reports.keys().map(ToString::to_string).collect();
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

    /// Takes reports until there are none left; false when the machine is gone before that.
    async fn wait_until_stopped(
        &mut self,
        receive: &mut mpsc::Receiver<FromAgent>,
        beats: &mut mpsc::Receiver<Beat>,
    ) -> bool {
        while !self.complete || !self.reports.is_empty() {
            let write_at = self.write_at();
            tokio::select! {
                biased;
                message = receive.recv() => match message {
                    Some(message) => self.take(message),
                    None => return false,
                },
                // While it stops its units it is there; without a presence, or with one that was lost, there is nothing to hold.
                Some(beat) = beats.recv() => {
                    if let Some(lease) = self.lease
                        && self.server.store.keep_alive(lease).await.is_ok()
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
