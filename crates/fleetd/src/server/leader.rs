//! Which server's engine decides.
//!
//! With a registry of its own a server always leads. Of several servers on one registry that one does whose lease holds the
//! key `leader`. When the key is gone, whoever writes it first leads; the revision at which it was written is the term, and
//! everything its engine writes is guarded by it. So it does not matter whether a leader knows that it was replaced: what it
//! writes is refused. It stops by itself, too, when it could not renew its lease in time.
//!
//! A leader that takes over from another in a quiet registry knows as much as that one did: a machine without presence is gone.
//! After trouble with the registry, or when nobody led before, machines may be there that could not say so yet; then they have
//! their TTL to show it, as after the start of a single server.

#[cfg(test)]
mod tests;

use super::Server;
use super::engine::{Ended, Mandate, Term};
use super::peers::{LEADER, Leader, LeaderRecord};
use fleet_registry::{Compare, LeaseId, Store, StoreError, Txn};
use std::time::Duration;
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

/// How long a leader that is not heard of still leads: with the time the registry takes to notice, and to elect, less than 3 s.
const TTL: Duration = Duration::from_secs(2);
/// How often it renews its lease.
const RENEW: Duration = Duration::from_millis(500);
/// How long to wait after an attempt that failed.
const RETRY: Duration = Duration::from_millis(250);
/// How long giving up may take when the server stops.
const RESIGN: Duration = Duration::from_secs(2);

impl<S: Store> Server<S> {
    /// Runs the engine whenever this server leads, until cancelled.
    pub(super) async fn lead(&self) -> anyhow::Result<()> {
        if !self.config.shared_registry {
            let mandate = Mandate { term: None, grace: self.config.agent_ttl };
            self.run_engine(mandate).await?;
            return Ok(());
        }
        let mut leader = self.peers.leader();
        let mut succeeds = false;
        loop {
            // Until the view is complete nobody knows whether there is a leader.
            let vacant = async {
                self.hub.reached(1).await;
                succeeds |= leader.borrow().is_some();
                // The sender lives as long as the server.
                let _ = leader.wait_for(Option::is_none).await;
            };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                () = vacant => {}
            }
            let elected = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                elected = self.campaign(&mut leader) => elected,
            };
            match elected {
                Ok(Some((lease, term))) => {
                    let quiet = self.peers.trouble().is_none_or(|ago| ago > self.config.agent_ttl);
                    let grace = if succeeds && quiet { Duration::ZERO } else { self.config.agent_ttl };
                    let term = Some(Term { revision: term, lease });
                    self.govern(lease, Mandate { term, grace }, &mut leader).await?;
                    succeeds = true;
                }
                Ok(None) => {}
                Err(error) => {
                    self.trouble("trying to become leader", &error);
                    tokio::select! {
                        biased;
                        () = self.cancel.cancelled() => return Ok(()),
                        () = tokio::time::sleep(RETRY) => {}
                    }
                }
            }
        }
    }

    /// Tries to become leader; `None` when another did. Either way the view knows the leader afterwards.
    async fn campaign(
        &self,
        leader: &mut watch::Receiver<Option<Leader>>,
    ) -> Result<Option<(LeaseId, u64)>, StoreError> {
        let lease = self.store.grant(TTL).await?;
        let record = LeaderRecord::new(self.config.machine.clone(), super::now_seconds(), lease);
        let put = record.put(lease).map_err(|error| StoreError::Damaged(format!("{LEADER}: {error}")))?;
        let txn = Txn { compares: vec![Compare { key: LEADER.to_owned(), revision: 0 }], ops: vec![put] };
        match self.store.commit(txn).await {
            // Whether it was written shows in the view: so does who was faster.
            Ok(_) | Err(StoreError::Conflict(_) | StoreError::Unknown(_)) => {}
            Err(error) => return Err(error),
        }
        let term = match tokio::time::timeout(TTL, leader.wait_for(Option::is_some)).await {
            Ok(Ok(seen)) => seen.as_ref().filter(|leader| leader.record == record).map(|leader| leader.term),
            _ => None,
        };
        match term {
            Some(term) => Ok(Some((lease, term))),
            None => {
                // Should it fail, the lease runs out by itself.
                let _ = self.store.revoke(lease).await;
                Ok(None)
            }
        }
    }

    /// Leads until deposed or cancelled.
    async fn govern(
        &self,
        lease: LeaseId,
        mandate: Mandate,
        leader: &mut watch::Receiver<Option<Leader>>,
    ) -> anyhow::Result<()> {
        let term = mandate.term.map(|term| term.revision);
        info!("this server leads, in term {}", term.unwrap_or_default());
        let replaced = async {
            let _ = leader.wait_for(|leader| leader.as_ref().map(|leader| leader.term) != term).await;
        };
        let why = tokio::select! {
            biased;
            () = self.cancel.cancelled() => {
                // So that another leads at once.
                let _ = tokio::time::timeout(RESIGN, self.store.revoke(lease)).await;
                return Ok(());
            }
            ended = self.run_engine(mandate) => match ended? {
                Ended::Cancelled => return Ok(()),
                Ended::Deposed => "another server was elected",
            },
            () = replaced => "its lease ended",
            () = self.keep(lease) => "its lease could not be renewed in time",
            never = self.store.tidy() => match never {},
        };
        warn!("this server does not lead any more: {why}");
        self.unpublish();
        // Frees the way for another, if it is still ours after all.
        let _ = tokio::time::timeout(RESIGN, self.store.revoke(lease)).await;
        Ok(())
    }

    /// Renews the lease; ends when it ended, or when the last renewal is so long ago that it may have.
    async fn keep(&self, lease: LeaseId) {
        let mut held_until = Instant::now() + TTL;
        loop {
            let sent = Instant::now();
            match tokio::time::timeout_at(held_until, self.store.keep_alive(lease)).await {
                Ok(Ok(())) => held_until = sent + TTL,
                Ok(Err(StoreError::LeaseEnded)) | Err(_) => return,
                Ok(Err(_)) => self.peers.had_trouble(),
            }
            tokio::time::sleep_until((sent + RENEW).min(held_until)).await;
        }
    }
}
