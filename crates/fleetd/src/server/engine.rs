//! Runs the engine: what changed goes in, decisions come out and are committed with the revisions they were made from, and
//! with the term of the leader who made them.
//!
//! # What a decision is guarded by
//!
//! A decision rests on the unit's record, on its place, and on nobody else deciding. With a registry of its own a server guards it by
//! the revisions of both records. On a shared one transactions are dear, and one takes [`MAX_OPS`] conditions; so there the place has
//! none of its own. It is written by engines, and deleted with the unit's record, and by nobody else. So it stands as it was decided from if
//!
//! - the unit's record does, which is guarded;
//! - no other engine decided, which the *term* guards: the revision at which the leader's record was written;
//! - this one decided from a view in which all that it wrote is, for which it waits, also after a failure;
//! - it can be read, as all records can: while some can't, the place has its condition here, too;
//! - nothing that it wrote before arrives yet, which the *fence* guards: when the outcome of a transaction is not known, the engine
//!   writes the record [`FENCE`] before it decides anything else, and what it sent before finds another revision there.
//!
//! Nor has the record of the machine that may still run a unit a condition (`leaving/NAME`): it is written only together with the end of a
//! place, and who deletes it besides the engine, the session of that machine, does what the engine waits for.

use super::peers::LEADER;
use super::{Server, transfer::IMPORT};
use crate::metrics::{Metrics, Operation, Task};
use fleet_api::types::Notice;
use fleet_cluster::engine::{Decision, Engine, Leaving};
use fleet_cluster::model::Revision;
use fleet_registry::records::{leaving_key, presence_key, put_leaving, put_schedule, schedule_key, unit_key};
use fleet_registry::store::MAX_OPS;
use fleet_registry::{Compare, Conflict, LeaseId, Op, Store, StoreError, Txn};
use fleet_unit::UnitName;
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

/// The record that keeps away what a leader sent earlier in its term.
pub(super) const FENCE: &str = "fence";

/// A leader's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Term {
    /// The revision of the leader's record, by which everything it writes is guarded.
    pub(super) revision: Revision,
    /// What that record lives by.
    pub(super) lease: LeaseId,
}

/// By what right an engine decides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mandate {
    /// `None` where there is one server only.
    pub(super) term: Option<Term>,
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

/// How far decisions were carried out.
enum Carried {
    /// All of them, or as many as were to be before the view is looked at again.
    Out,
    /// Up to that about this unit, whose ground has changed, or is not what the view shows.
    UpTo(UnitName),
    /// Something that concerns all of them was in the way.
    No,
}

/// Why decisions were not carried out.
enum Failed {
    Deposed,
    Store(StoreError),
}

/// What guards a transaction as a whole: with a shared registry the term, and the revision of the fence.
type Right = Option<(Revision, Revision)>;

/// What an engine has written.
#[derive(Debug, Default)]
struct Written {
    /// The revision of the newest.
    newest: Revision,
    /// The revision of the fence; it goes with the term.
    fence: Revision,
    /// Whether something may arrive yet.
    in_doubt: bool,
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
        let mut written = Written::default();
        // What leaders before it wrote has to be in the view.
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => return Ok(Ended::Cancelled),
            () = self.hub.reached(mandate.term.map_or(0, |term| term.revision)) => {}
        }
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
                    carried_out = self.carry_out(&decisions, mandate.term, &mut written) => carried_out,
                };
                let failed = match carried_out {
                    Ok(Carried::Out) => {
                        self.metrics.round(round.elapsed());
                        continue;
                    }
                    // The others are decided about anew, without this one.
                    Ok(Carried::UpTo(unit)) => {
                        self.metrics.round(round.elapsed());
                        engine.drop_decision(unit);
                        continue;
                    }
                    Ok(Carried::No) => {
                        tokio::select! {
                            biased;
                            () = self.cancel.cancelled() => return Ok(Ended::Cancelled),
                            () = tokio::time::sleep(RETRY) => {}
                        }
                        continue;
                    }
                    Err(failed) => failed,
                };
                self.metrics.round_failed();
                tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => return Ok(Ended::Cancelled),
                    recovered = self.recover(failed, mandate.term, &mut written) => {
                        if !recovered {
                            return Ok(Ended::Deposed);
                        }
                    }
                }
            }
        }
    }

    /// After decisions could not be written: waits until others can be made; false when they can't, since the term is over.
    async fn recover(&self, failed: Failed, term: Option<Term>, written: &mut Written) -> bool {
        let mut failed = failed;
        loop {
            let Failed::Store(error) = &failed else { return false };
            self.trouble("writing the schedule", error);
            tokio::time::sleep(RETRY).await;
            let (Some(term), true) = (term, written.in_doubt) else { break };
            let txn = Txn::of(Op::put_leased(FENCE, "{}", term.lease)).when(LEADER, term.revision);
            match self.store.commit(txn).await.map_err(Failed::from) {
                Ok(revision) => {
                    (written.fence, written.in_doubt) = (revision, false);
                    // What is in doubt was written before that, if it was: the view has to have it.
                    written.newest = written.newest.max(revision);
                    break;
                }
                // Without its lease it does not lead.
                Err(Failed::Store(StoreError::LeaseEnded)) => return false,
                Err(error) => failed = error,
            }
        }
        self.hub.reached(written.newest).await;
        true
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
    /// engine sees which are not in the view. It decides about them anew, without waiting for the one that was in the way.
    async fn carry_out(
        &self,
        decisions: &[Decision],
        term: Option<Term>,
        written: &mut Written,
    ) -> Result<Carried, Failed> {
        // What can't be read may be a place that the view does not show.
        let all_read = self.hub.view().is_all_read();
        let mut rest = decisions;
        while !rest.is_empty() {
            let right = term.map(|term| (term.revision, written.fence));
            let (txn, taken) = transaction(rest, right, all_read);
            let (batch, others) = rest.split_at(taken);
            rest = others;
            match self.write_schedule(batch, txn, written).await {
                Ok(()) => {}
                // The fence that was not known to be written, was.
                Err(Failed::Store(StoreError::Conflict(conflict))) if conflict.key == FENCE => {
                    written.fence = conflict.found;
                    self.look_again(&conflict, written).await?;
                    return Ok(Carried::Out);
                }
                Err(Failed::Store(StoreError::Conflict(_))) => {
                    for decision in batch {
                        let (txn, _) = transaction(std::slice::from_ref(decision), right, all_read);
                        match self.write_schedule(std::slice::from_ref(decision), txn, written).await {
                            Ok(()) => tell(decision),
                            Err(Failed::Store(StoreError::Conflict(conflict))) => {
                                debug!(unit = %decision.unit, "decision dropped: {conflict}");
                                self.look_again(&conflict, written).await?;
                                let all = [IMPORT, FENCE].contains(&conflict.key.as_str());
                                return Ok(if all {
                                    Carried::No
                                } else {
                                    Carried::UpTo(decision.unit.clone())
                                });
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
        self.hub.reached(written.newest).await;
        Ok(Carried::Out)
    }

    /// Waits until the view has what was in the way, and all that was written before that, which may be newer.
    async fn look_again(&self, conflict: &Conflict, written: &Written) -> Result<(), Failed> {
        self.catch_up(conflict).await?;
        self.hub.reached(written.newest).await;
        Ok(())
    }

    /// Commits the transaction of these decisions, and counts them.
    async fn write_schedule(
        &self,
        decisions: &[Decision],
        txn: Txn,
        written: &mut Written,
    ) -> Result<(), Failed> {
        let asked = Instant::now();
        let outcome = self.store.commit(txn).await;
        // Refused is answered, too.
        let answered = matches!(outcome, Ok(_) | Err(StoreError::Conflict(_)));
        self.metrics.operation(Operation::Set, asked.elapsed(), answered);
        // Several that are refused together are tried one by one, and counted then.
        if outcome.is_ok() || !answered || decisions.len() == 1 {
            for decision in decisions {
                let task = if decision.machine.is_some() { Task::Schedule } else { Task::Unschedule };
                self.metrics.task(task, outcome.is_ok());
            }
        }
        written.in_doubt |= matches!(outcome, Err(StoreError::Unknown(_)));
        written.newest = written.newest.max(outcome?);
        Ok(())
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

/// One transaction of as many decisions, from the first on, as fit in it; and how many those are, at least one of one. `all_read`: the view
/// lacks no record that there is.
fn transaction(decisions: &[Decision], right: Right, all_read: bool) -> (Txn, usize) {
    let mut txn = Txn::default();
    if let Some((term, fence)) = right {
        // First, so that a leader whose term is over learns that, whatever else changed.
        txn.compares.push(Compare { key: LEADER.to_owned(), revision: term });
        txn.compares.push(Compare { key: FENCE.to_owned(), revision: fence });
    }
    // What is imported is not to be decided about before it is complete.
    txn.compares.push(Compare { key: IMPORT.to_owned(), revision: 0 });
    let guards_places = right.is_none() || !all_read;
    let mut absent = BTreeSet::new();
    for (taken, decision) in decisions.iter().enumerate() {
        let machine = decision.absent.as_ref().filter(|machine| !absent.contains(*machine));
        let conditions = 1 + usize::from(guards_places) + usize::from(machine.is_some());
        let writes = 1 + usize::from(decision.leaving != Leaving::None);
        if txn.compares.len() + conditions > MAX_OPS || txn.ops.len() + writes > MAX_OPS {
            return (txn, taken);
        }
        txn.compares.push(Compare { key: unit_key(&decision.unit), revision: decision.unit_revision });
        if guards_places {
            let (key, revision) = (schedule_key(&decision.unit), decision.schedule_revision);
            txn.compares.push(Compare { key, revision });
        }
        // A machine given up for lost must still be away: had it come back meanwhile, it might run what is placed elsewhere.
        if let Some(machine) = machine {
            absent.insert(machine);
            txn.compares.push(Compare { key: presence_key(machine), revision: 0 });
        }
        txn.ops.push(match &decision.machine {
            Some(machine) => put_schedule(&decision.unit, machine),
            None => Op::Delete { key: schedule_key(&decision.unit) },
        });
        match &decision.leaving {
            Leaving::None => {}
            Leaving::From(machine) => txn.ops.push(put_leaving(&decision.unit, machine)),
            Leaving::Over => txn.ops.push(Op::Delete { key: leaving_key(&decision.unit) }),
        }
    }
    (txn, decisions.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod fence_tests;

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use fleet_cluster::model::MachineId;
    use fleet_registry::store::check_size;

    #[test]
    fn transactions_take_what_fits() {
        let machine = |n: u8| MachineId::parse(&format!("{n:032x}")).unwrap();
        let shared = Some((7, 9));
        let cases = [
            (0, None, true),
            (0, Some((7, 0)), true),
            (1, shared, true),
            (200, shared, true),
            (200, shared, false),
            (200, None, true),
        ];
        let leaves = [Leaving::None, Leaving::Over, Leaving::From(machine(254))];
        for ((lost_machines, right, all_read), leaving) in
            cases.iter().flat_map(|case| leaves.iter().map(move |leaving| (*case, leaving)))
        {
            let writes = 1 + usize::from(*leaving != Leaving::None);
            let decision = |n: u64| Decision {
                unit: UnitName::parse(&format!("u{n}.service")).unwrap(),
                machine: Some(machine(255)),
                reason: String::new(),
                unit_revision: n,
                schedule_revision: 0,
                absent: u8::try_from(n).ok().filter(|n| *n < lost_machines).map(machine),
                leaving: leaving.clone(),
            };
            let decisions: Vec<_> = (0..300).map(decision).collect();
            let mut rest = decisions.as_slice();
            while !rest.is_empty() {
                let (txn, taken) = transaction(rest, right, all_read);
                check_size(&txn).unwrap();
                let least = match (lost_machines, right.filter(|_| all_read)) {
                    (0, Some(_)) => 125 / writes,
                    (_, Some(_)) => 62,
                    // With a guard of each place
                    (_, None) => 41,
                };
                assert!(taken == rest.len() || taken >= least, "{taken} of {}", rest.len());
                let guards = |key: String, revision| txn.compares.contains(&Compare { key, revision });
                for decision in &rest[..taken] {
                    assert!(guards(unit_key(&decision.unit), decision.unit_revision));
                    let schedule = guards(schedule_key(&decision.unit), decision.schedule_revision);
                    assert_eq!(schedule, right.is_none() || !all_read);
                    assert!(decision.absent.as_ref().is_none_or(|id| guards(presence_key(id), 0)));
                }
                assert!(guards(IMPORT.to_owned(), 0));
                if let Some((term, fence)) = right {
                    assert_eq!(txn.compares[0], Compare { key: LEADER.to_owned(), revision: term });
                    assert!(guards(FENCE.to_owned(), fence));
                }
                assert_eq!(txn.ops.len(), taken * writes);
                rest = &rest[taken..];
            }
        }
    }
}
