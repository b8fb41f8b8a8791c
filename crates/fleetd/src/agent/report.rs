//! What the agent tells the server: reports of its units, and answers to questions.

use super::*;
use fleet_link::{Ask, Chunk, FromAgent, Request};
use fleet_systemd::Output;

/// Questions answered at the same time; more wait in the session's queue.
const QUESTIONS: usize = 64;

impl<S: Systemd> Agent<S> {
    /// What is to be reported of a unit now.
    pub(super) fn current_report(&self, name: &UnitName) -> Option<UnitReport> {
        let slot = self.slots.get(name)?;
        let wanted = self.wanted.as_ref().and_then(|wanted| wanted.get(name));
        let problem = self.isolation.problem(name).or(slot.trouble.as_deref()).or(slot.problem.as_deref());
        if slot.trouble.is_some() && slot.observed.systemd.is_none() {
            // The trouble may be that systemd can't be asked: it is told with the last state there was.
            let last = Observed { systemd: slot.seen.clone(), ..slot.observed.clone() };
            return logic::report(wanted, &last, problem);
        }
        logic::report(wanted, &slot.observed, problem)
    }

    /// Reports what changed since the last report.
    pub(super) async fn report(&mut self, session: &Option<AgentEnd>) {
        let Some(end) = session else { return };
        let mut changes = BTreeMap::new();
        for name in std::mem::take(&mut self.touched) {
            let asked = self.slots.get(&name).is_some_and(|slot| slot.observed.systemd.is_none());
            let report = self.current_report(&name);
            let Some(slot) = self.slots.get_mut(&name) else { continue };
            // A state that is being asked for is no news; what was reported last stands until the answer is here.
            if asked && report.is_none() && slot.observed.text.is_some() {
                continue;
            }
            if report != slot.reported {
                slot.reported = report.clone();
                changes.insert(name.clone(), report);
            }
        }
        for name in changes.iter().filter(|(_, report)| report.is_none()).map(|(name, _)| name.clone()) {
            self.dirty.insert(name);
        }
        if !changes.is_empty() && end.send.send(FromAgent::Changes(changes)).await.is_err() {
            debug!("the server is gone; reporting again in the next session");
        }
    }

    /// Says of which units nothing runs any more, of those of which the server has to know.
    pub(super) async fn tell_released(&mut self, session: &Option<AgentEnd>) {
        let Some(end) = session else { return };
        // What is not here was stopped, as far as it was started; and what is not wanted is not started.
        let slots = &self.slots;
        let is_gone = |name: &UnitName| slots.get(name).is_none_or(|slot| !slot.is_here());
        let (gone, rest) =
            std::mem::take(&mut self.releasing).into_iter().partition(|(name, _)| is_gone(name));
        self.releasing = rest;
        let gone: BTreeMap<_, _> = gone;
        // In the next session the server asks again.
        if !gone.is_empty() && end.send.send(FromAgent::Released(gone)).await.is_err() {
            debug!("the server is gone; it asks again in the next session");
        }
    }

    /// Reports everything, at the beginning of a session.
    pub(super) async fn report_all(&mut self, end: &AgentEnd) {
        let mut all = BTreeMap::new();
        let names: Vec<_> = self.slots.keys().cloned().collect();
        for name in names {
            let report = self.current_report(&name);
            if let Some(slot) = self.slots.get_mut(&name) {
                slot.reported = report.clone();
            }
            all.extend(report.map(|report| (name, report)));
        }
        if end.send.send(FromAgent::Snapshot(all)).await.is_err() {
            debug!("the server is gone; reporting again in the next session");
        }
    }

    /// Answers a question in a task of its own.
    pub(super) fn answer(&mut self, request: Request) {
        while self.questions.try_join_next().is_some() {}
        if self.questions.len() >= QUESTIONS {
            let refusal =
                Chunk::Failed("too many requests for this machine at the same time; try again".to_owned());
            let _ = request.answer.try_send(refusal);
            return;
        }
        let mut output = match &request.ask {
            Ask::Status(unit) => self.systemd.status(unit),
            Ask::Journal { unit, lines, follow, output } => {
                self.systemd.journal(unit, *lines, *follow, output)
            }
        };
        self.questions.spawn(async move {
            loop {
                let piece = tokio::select! {
                    biased;
                    () = request.answer.closed() => return,
                    piece = output.recv() => piece,
                };
                let (chunk, last) = match piece {
                    Some(Output::Out(bytes)) => (Chunk::Out(bytes), false),
                    Some(Output::Err(bytes)) => (Chunk::Err(bytes), false),
                    Some(Output::Exit(code)) => (Chunk::Exit(code), true),
                    None => (Chunk::Failed("the command could not be run".to_owned()), true),
                };
                if request.answer.send(chunk).await.is_err() || last {
                    return;
                }
            }
        });
    }
}
