//! Which job ended how: pairs the answer to StartUnit (a job's number) with the signal JobRemoved.
//!
//! The signal comes over another connection and may be here before the answer. So whoever is about to make a
//! call announces it, and while calls are announced all results are kept for a while.
use crate::JobResult;
use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tokio::sync::oneshot;

/// Results kept while calls are under way. When more than this many jobs of the machine end during one call, a
/// waiter finds out by its slow re-check instead.
const KEPT: usize = 4096;

#[derive(Clone, Default)]
pub(super) struct Jobs(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    /// Calls announced and not yet answered.
    calls: usize,
    /// What ended lately, oldest first; empty while no call is announced.
    ended: VecDeque<Ended>,
    /// How many have ended in all.
    count: u64,
    waiting: HashMap<u32, Vec<oneshot::Sender<JobResult>>>,
}

struct Ended {
    id: u32,
    unit: String,
    result: JobResult,
    /// As which of all it ended.
    number: u64,
}

impl Jobs {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces a call that may start a job.
    pub(super) fn announce(&self) -> Announced {
        let mut table = self.table();
        table.calls += 1;
        Announced { jobs: self.clone(), since: table.count }
    }

    /// A job of a unit ended, with systemd's word for how.
    pub(super) fn ended(&self, id: u32, unit: &str, word: &str) {
        let result = match word {
            "done" => JobResult::Done,
            "canceled" => JobResult::Canceled,
            other => JobResult::Failed(other.to_owned()),
        };
        let mut table = self.table();
        for waiter in table.waiting.remove(&id).into_iter().flatten() {
            // One that is gone meanwhile needs no answer.
            let _ = waiter.send(result.clone());
        }
        table.count += 1;
        if table.calls > 0 {
            if table.ended.len() == KEPT {
                table.ended.pop_front();
            }
            let number = table.count;
            table.ended.push_back(Ended { id, unit: unit.to_owned(), result, number });
        }
    }
}

/// A call under way; dropping it ends the announcement.
pub(super) struct Announced {
    jobs: Jobs,
    /// How many had ended before.
    since: u64,
}

impl Announced {
    /// The call was answered with this job: its end.
    pub(super) fn job(&self, id: u32) -> Ending {
        let (sender, result) = oneshot::channel();
        let mut table = self.jobs.table();
        match table.ended.iter().find(|ended| ended.id == id) {
            Some(ended) => {
                // The receiver is right here.
                let _ = sender.send(ended.result.clone());
            }
            None => table.waiting.entry(id).or_default().push(sender),
        }
        drop(table);
        Ending { jobs: self.jobs.clone(), id, result }
    }

    /// How the last job of this unit ended that ended since the announcement.
    pub(super) fn ended(&self, unit: &str) -> Option<JobResult> {
        let table = self.jobs.table();
        let mut since = table.ended.iter().rev().take_while(|ended| ended.number > self.since);
        since.find(|ended| ended.unit == unit).map(|ended| ended.result.clone())
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        let mut table = self.jobs.table();
        table.calls -= 1;
        if table.calls == 0 {
            table.ended.clear();
        }
    }
}

/// Resolves when the job has ended.
pub(super) struct Ending {
    jobs: Jobs,
    id: u32,
    result: oneshot::Receiver<JobResult>,
}

impl Ending {
    /// The result, if it is known by now.
    pub(super) fn now(&mut self) -> Option<JobResult> {
        self.result.try_recv().ok()
    }
}

impl Future for Ending {
    type Output = JobResult;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<JobResult> {
        match Pin::new(&mut self.result).poll(context) {
            Poll::Ready(Ok(result)) => Poll::Ready(result),
            // The sender lives in the table until it is used, so this stays pending.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.result.close();
        let mut table = self.jobs.table();
        if let Some(waiters) = table.waiting.get_mut(&self.id) {
            waiters.retain(|waiter| !waiter.is_closed());
            if waiters.is_empty() {
                table.waiting.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn is_empty(jobs: &Jobs) -> bool {
        let table = jobs.table();
        table.calls == 0 && table.ended.is_empty() && table.waiting.is_empty()
    }

    #[test]
    fn the_signal_after_the_answer() {
        let jobs = Jobs::default();
        let mut ending = jobs.announce().job(7);
        assert_eq!((&mut ending).now_or_never(), None);
        jobs.ended(8, "a.service", "done");
        assert_eq!((&mut ending).now_or_never(), None, "another job");
        jobs.ended(7, "a.service", "timeout");
        assert_eq!((&mut ending).now_or_never(), Some(JobResult::Failed("timeout".into())));
        drop(ending);
        assert!(is_empty(&jobs));
    }

    #[test]
    fn the_signal_before_the_answer() {
        let jobs = Jobs::default();
        let call = jobs.announce();
        jobs.ended(7, "a.service", "canceled");
        let mut ending = call.job(7);
        assert_eq!(ending.now(), Some(JobResult::Canceled));
        drop((ending, call));
        assert!(is_empty(&jobs));
    }

    #[test]
    fn two_calls_that_got_the_same_job() {
        let jobs = Jobs::default();
        let (first, second) = (jobs.announce(), jobs.announce());
        let one = first.job(7);
        jobs.ended(7, "a.service", "done");
        let other = second.job(7);
        drop((first, second));
        assert_eq!(one.now_or_never(), Some(JobResult::Done));
        assert_eq!(other.now_or_never(), Some(JobResult::Done));
        assert!(is_empty(&jobs));
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_nothing_and_no_other_alone() {
        let jobs = Jobs::default();
        let (first, second) = (jobs.announce().job(7), jobs.announce().job(7));
        drop(first);
        jobs.ended(7, "a.service", "done");
        assert_eq!(second.now_or_never(), Some(JobResult::Done));
        drop(jobs.announce());
        drop(jobs.announce().job(9));
        assert!(is_empty(&jobs));
    }

    #[test]
    fn ends_by_the_name_of_the_unit() {
        let jobs = Jobs::default();
        let before = jobs.announce();
        jobs.ended(1, "a.service", "failed");
        let call = jobs.announce();
        assert_eq!(call.ended("a.service"), None, "that was before");
        assert_eq!(before.ended("a.service"), Some(JobResult::Failed("failed".into())));
        jobs.ended(2, "b.service", "done");
        jobs.ended(3, "a.service", "canceled");
        jobs.ended(4, "a.service", "done");
        assert_eq!(call.ended("a.service"), Some(JobResult::Done));
        assert_eq!(call.ended("c.service"), None);
        drop((before, call));
        assert!(is_empty(&jobs));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let jobs = Jobs::default();
        let call = jobs.announce();
        for id in 0..=KEPT as u32 {
            jobs.ended(id, "a.service", "done");
        }
        assert_eq!(jobs.table().ended.len(), KEPT);
        assert_eq!(call.job(KEPT as u32).now_or_never(), Some(JobResult::Done));
    }
}
