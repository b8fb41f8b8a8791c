//! Runs the engine: what changed goes in, decisions come out and are committed with the revisions they were made from, and
//! with the term of the leader who made them.

use super::Server;
use super::peers::LEADER;
use crate::metrics::{Metrics, Operation, Task};
use fleet_api::types::Notice;
use fleet_cluster::engine::{Decision, Engine};
use fleet_cluster::model::Revision;
use fleet_registry::records::{presence_key, put_schedule, schedule_key, unit_key};
use fleet_registry::store::MAX_OPS;
use fleet_registry::{Compare, Op, Store, StoreError, Txn};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::{debug, info, warn};

/// Decisions made before the view is looked at again.
const ROUND: usize = 4_000;

/// How long to wait before trying to write to a store that can't be written.
const RETRY: Duration = Duration::from_millis(500);

/// The ID of the notice that many machines vanished at once.
const MASS_LOSS: &str = "massLoss";

/// By what right an engine decides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mandate {
    /// The revision of the leader's record, by which everything it writes is guarded; `None` where there is one server only.
    pub(super) term: Option<Revision>,
    /// How long machines have to show that they are there.
    pub(super) grace: Duration,
}

/// Why an engine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The server stops.
    Cancelled,
    /// Its term is over.
    Deposed,
}

/// Why decisions were not carried out.
enum Failed {
    Deposed,
    Store(StoreError),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict(conflict) if conflict.key == LEADER => Failed::Deposed,
            other => Failed::Store(other),
        }
    }
}

impl<S: Store> Server<S> {
    /// Decides until cancelled, or until the term is over.
    pub(super) async fn run_engine(&self, mandate: Mandate) -> anyhow::Result<Ended> {
        let _leads = Leads::now(&self.metrics);
        let mut engine = Engine::with_policy(self.now(), mandate.grace, self.config.policy.clone());
        let mailbox = self.hub.engine_mailbox();
        loop {
            // That a mass loss is over shows only when somebody looks.
            let look = engine.is_mass_loss().then(|| self.now() + self.config.policy.window);
            let wake_at = [engine.wake_at(), look].into_iter().flatten().min();
            let wake = async {
                match wake_at {
                    Some(at) => tokio::time::sleep(at.saturating_sub(self.now())).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(Ended::Cancelled),
                () = mailbox.wait() => {}
                () = wake => {}
            }
            loop {
                let round = Instant::now();
                engine.note(&mailbox.take());
                let decisions = engine.decide(&self.hub.view(), self.now(), ROUND);
                self.publish(&mut engine);
                if decisions.is_empty() {
                    self.metrics.round(round.elapsed());
                    break;
                }
                let carried_out = tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => return Ok(Ended::Cancelled),
                    carried_out = self.carry_out(&decisions, mandate.term) => carried_out,
                };
                if let Err(failed) = carried_out {
                    let Failed::Store(error) = failed else { return Ok(Ended::Deposed) };
                    self.metrics.round_failed();
                    self.trouble("writing the schedule", &error);
                    tokio::select! {
                        biased;
                        () = self.cancel.cancelled() => return Ok(Ended::Cancelled),
                        () = tokio::time::sleep(RETRY) => {}
                    }
                } else {
                    self.metrics.round(round.elapsed());
                }
            }
        }
    }

    /// Lets everybody know what the engine delays, and why.
    fn publish(&self, engine: &mut Engine) {
        if let Some(loss) = engine.take_mass_loss() {
            warn!("{loss}");
            let since = i64::try_from(super::now_seconds()).unwrap_or(i64::MAX);
            self.hub.set_notice(Notice { id: MASS_LOSS.to_owned(), since, text: loss.to_string() });
        } else if !engine.is_mass_loss() && self.hub.clear_notice(MASS_LOSS) {
            info!("units of machines that vanished are placed elsewhere as usual again");
        }
        self.hub.set_delays(engine.delays().map(|(name, delay)| (name.clone(), delay)).collect());
    }

    /// What was let known is not known any more: another server's engine decides now.
    pub(super) fn unpublish(&self) {
        self.hub.clear_notice(MASS_LOSS);
        self.hub.set_delays(BTreeMap::new());
    }

    /// Commits decisions and waits until the view has them. A decision whose ground has changed meanwhile is dropped. So are
    /// those after it: they were made as if it were carried out (a unit has to go because another takes its place). The
    /// engine sees which are not in the view.
    async fn carry_out(&self, decisions: &[Decision], term: Option<Revision>) -> Result<(), Failed> {
        let mut newest = 0;
        let mut rest = decisions;
        while !rest.is_empty() {
            let (txn, taken) = transaction(rest, term);
            let (batch, others) = rest.split_at(taken);
            rest = others;
            match self.write_schedule(batch, txn).await {
                Ok(revision) => newest = revision,
                Err(Failed::Store(StoreError::Conflict(_))) => {
                    for decision in batch {
                        let (txn, _) = transaction(std::slice::from_ref(decision), term);
                        match self.write_schedule(std::slice::from_ref(decision), txn).await {
                            Ok(revision) => {
                                newest = revision;
                                tell(decision);
                            }
                            Err(Failed::Store(StoreError::Conflict(conflict))) => {
                                debug!(unit = %decision.unit, "decision dropped: {conflict}");
                                // The revision of now: what was in the way has to be seen before anything is decided.
                                let now = self.store.commit(Txn::default()).await?;
                                self.hub.reached(now).await;
                                return Ok(());
                            }
                            Err(failed) => return Err(failed),
                        }
                    }
                    continue;
                }
                Err(failed) => return Err(failed),
            }
            batch.iter().for_each(tell);
        }
        self.hub.reached(newest).await;
        Ok(())
    }

    /// Commits the transaction of these decisions, and counts them.
    async fn write_schedule(&self, decisions: &[Decision], txn: Txn) -> Result<Revision, Failed> {
        let asked = Instant::now();
        let written = self.store.commit(txn).await;
        // Refused is answered, too.
        let answered = matches!(written, Ok(_) | Err(StoreError::Conflict(_)));
        self.metrics.operation(Operation::Set, asked.elapsed(), answered);
        // Several that are refused together are tried one by one, and counted then.
        if written.is_ok() || !answered || decisions.len() == 1 {
            for decision in decisions {
                let task = if decision.machine.is_some() { Task::Schedule } else { Task::Unschedule };
                self.metrics.task(task, written.is_ok());
            }
        }
        written.map_err(Failed::from)
    }
}

/// Says in the metrics that this server leads, for as long as it does.
struct Leads(Arc<Metrics>);

impl Leads {
    fn now(metrics: &Arc<Metrics>) -> Leads {
        metrics.leads_since(super::now_seconds());
        Leads(metrics.clone())
    }
}

impl Drop for Leads {
    fn drop(&mut self) {
        self.0.leads_since(0);
    }
}

fn tell(decision: &Decision) {
    let Decision { unit, machine, reason, .. } = decision;
    match machine {
        Some(machine) => info!(%unit, %machine, "placed {unit} on {machine}: {reason}"),
        None => info!(%unit, "took {unit} off its machine: {reason}"),
    }
}

/// One transaction of as many decisions, from the first on, as fit in it; and how many those are, at least one of one.
fn transaction(decisions: &[Decision], term: Option<Revision>) -> (Txn, usize) {
    let mut txn = Txn::default();
    // First, so that a leader whose term is over learns that, whatever else changed.
    txn.compares.extend(term.map(|term| Compare { key: LEADER.to_owned(), revision: term }));
    let mut absent = BTreeSet::new();
    for (taken, decision) in decisions.iter().enumerate() {
        // At most three conditions and one write.
        if txn.compares.len() + 3 > MAX_OPS {
            return (txn, taken);
        }
        txn.compares.push(Compare { key: unit_key(&decision.unit), revision: decision.unit_revision });
        txn.compares
            .push(Compare { key: schedule_key(&decision.unit), revision: decision.schedule_revision });
        // A machine given up for lost must still be away: had it come back meanwhile, it might run what is placed elsewhere.
        if let Some(machine) = decision.absent.as_ref().filter(|machine| absent.insert(*machine)) {
            txn.compares.push(Compare { key: presence_key(machine), revision: 0 });
        }
        txn.ops.push(match &decision.machine {
            Some(machine) => put_schedule(&decision.unit, machine),
            None => Op::Delete { key: schedule_key(&decision.unit) },
        });
    }
    (txn, decisions.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use fleet_cluster::model::MachineId;
    use fleet_registry::store::check_size;
    use fleet_unit::UnitName;

    #[test]
    fn transactions_take_what_fits() {
        let machine = |n: u8| MachineId::parse(&format!("{n:032x}")).unwrap();
        for (lost_machines, term) in [(0, None), (1, Some(7)), (200, Some(7)), (200, None)] {
            let decision = |n: u64| Decision {
                unit: UnitName::parse(&format!("u{n}.service")).unwrap(),
                machine: Some(machine(255)),
                reason: String::new(),
                unit_revision: n,
                schedule_revision: 0,
                absent: u8::try_from(n).ok().filter(|n| *n < lost_machines).map(machine),
            };
            let decisions: Vec<_> = (0..300).map(decision).collect();
            let mut rest = decisions.as_slice();
            while !rest.is_empty() {
                let (txn, taken) = transaction(rest, term);
                check_size(&txn).unwrap();
                assert!(taken == rest.len() || taken >= 42, "{taken} of {}", rest.len());
                let guards = |key: String, revision| txn.compares.contains(&Compare { key, revision });
                for decision in &rest[..taken] {
                    assert!(guards(unit_key(&decision.unit), decision.unit_revision));
                    assert!(guards(schedule_key(&decision.unit), decision.schedule_revision));
                    assert!(decision.absent.as_ref().is_none_or(|id| guards(presence_key(id), 0)));
                }
                assert!(term.is_none_or(|term| guards(LEADER.to_owned(), term)));
                assert_eq!(txn.ops.len(), taken);
                rest = &rest[taken..];
            }
        }
    }
}
