//! Runs the engine: what changed goes in, decisions come out and are committed with the revisions they were made from.

use super::Server;
use fleet_cluster::engine::{Decision, Engine};
use fleet_registry::records::{presence_key, put_schedule, schedule_key, unit_key};
use fleet_registry::{Compare, Op, Store, StoreError, Txn};
use std::time::Duration;
use tracing::{debug, info, warn};

/// Decisions in one transaction: each takes three conditions and one write of at most 128.
const BATCH: usize = 32;

/// Decisions made before the view is looked at again.
const ROUND: usize = 4_000;

/// How long to wait before trying to write to a store that can't be written.
const RETRY: Duration = Duration::from_millis(500);

impl<S: Store> Server<S> {
    pub(super) async fn run_engine(&self) -> anyhow::Result<()> {
        let mut engine = Engine::new(self.now(), self.config.agent_ttl);
        let mailbox = self.hub.engine_mailbox();
        loop {
            let wake = async {
                match engine.wake_at() {
                    Some(at) => tokio::time::sleep(at.saturating_sub(self.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.cancel.cancelled() => return Ok(()),
                () = mailbox.wait() => {}
                () = wake => {}
            }
            loop {
                engine.note(&mailbox.take());
                let decisions = engine.decide(&self.hub.view(), self.now(), ROUND);
                if decisions.is_empty() {
                    break;
                }
                let carried_out = tokio::select! {
                    () = self.cancel.cancelled() => return Ok(()),
                    carried_out = self.carry_out(&decisions) => carried_out,
                };
                if let Err(error) = carried_out {
                    warn!("writing the schedule: {error}; deciding again in {} ms", RETRY.as_millis());
                    tokio::select! {
                        () = self.cancel.cancelled() => return Ok(()),
                        () = tokio::time::sleep(RETRY) => {}
                    }
                    engine.note(&again(&decisions));
                }
            }
        }
    }

    /// Commits decisions and waits until the view has them. A decision whose ground has changed meanwhile is
    /// dropped: that change asks for a new one.
    async fn carry_out(&self, decisions: &[Decision]) -> Result<(), StoreError> {
        let mut newest = 0;
        for batch in decisions.chunks(BATCH) {
            match self.store.commit(transaction(batch)).await {
                Ok(revision) => newest = revision,
                Err(StoreError::Conflict(_)) => {
                    for decision in batch {
                        match self.store.commit(transaction(std::slice::from_ref(decision))).await {
                            Ok(revision) => newest = revision,
                            Err(StoreError::Conflict(conflict)) => {
                                debug!(unit = %decision.unit, "decision dropped: {conflict}");
                                continue;
                            }
                            Err(error) => return Err(error),
                        }
                    }
                }
                Err(error) => return Err(error),
            }
            for decision in batch {
                match &decision.machine {
                    Some(machine) => {
                        info!(unit = %decision.unit, %machine, "placed {} on {machine}: {}", decision.unit, decision.reason);
                    }
                    None => {
                        info!(unit = %decision.unit, "took {} off its machine: {}", decision.unit, decision.reason)
                    }
                }
            }
        }
        self.hub.reached(newest).await;
        Ok(())
    }
}

fn transaction(decisions: &[Decision]) -> Txn {
    let mut txn = Txn::default();
    for decision in decisions {
        txn.compares.push(Compare { key: unit_key(&decision.unit), revision: decision.unit_revision });
        txn.compares
            .push(Compare { key: schedule_key(&decision.unit), revision: decision.schedule_revision });
        // A machine given up for lost must still be away: had it come back meanwhile, it might run what is placed elsewhere.
        if let Some(absent) = &decision.absent {
            txn.compares.push(Compare { key: presence_key(absent), revision: 0 });
        }
        txn.ops.push(match &decision.machine {
            Some(machine) => put_schedule(&decision.unit, machine),
            None => Op::Delete { key: schedule_key(&decision.unit) },
        });
    }
    txn
}

fn again(decisions: &[Decision]) -> fleet_cluster::view::Effects {
    fleet_cluster::view::Effects {
        units: decisions.iter().map(|decision| decision.unit.clone()).collect(),
        ..Default::default()
    }
}
