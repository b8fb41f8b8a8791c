//! Gathers the names of units that may have changed into [`Notice`]s.
//!
//! Signals come in floods: a batch of starts, a reload. They end here in a set of names, so that whoever is slow
//! to take notices costs no memory and gets each name once. A change after a quiet time is passed on at once, so
//! that a single command is answered quickly; in a flood there are about 20 notices a second.
use crate::Notice;
use fleet_unit::UnitName;
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

/// The least time between two notices.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long the first change after a quiet time waits for others that come with it.
const TOGETHER: Duration = Duration::from_millis(5);

#[derive(Default)]
pub(super) struct Changes {
    state: Mutex<Gathered>,
    some: Notify,
}

#[derive(Default)]
struct Gathered {
    /// The units fleet looks after, and whether each was failed when last heard of.
    units: HashMap<UnitName, bool>,
    changed: BTreeSet<UnitName>,
    all: bool,
}

impl Changes {
    fn state(&self) -> MutexGuard<'_, Gathered> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on changes of this unit are passed on.
    pub(super) fn follow(&self, unit: &UnitName) {
        self.state().units.entry(unit.clone()).or_default();
    }

    /// Changes of this unit are of no interest any more.
    pub(super) fn forget(&self, unit: &UnitName) {
        let mut state = self.state();
        state.units.remove(unit);
        state.changed.remove(unit);
    }

    /// Follows the unit and notes whether it was just seen failed.
    pub(super) fn saw(&self, unit: &UnitName, failed: bool) {
        self.state().units.insert(unit.clone(), failed);
    }

    /// Whether the unit was failed when last heard of.
    pub(super) fn was_failed(&self, unit: &UnitName) -> bool {
        self.state().units.get(unit).copied().unwrap_or_default()
    }

    /// Something of the unit of this name changed; `failed` says whether it is failed now, if that is known. A unit
    /// that is not followed costs one look-up.
    pub(super) fn changed(&self, name: &str, failed: impl FnOnce() -> Option<bool>) {
        let mut state = self.state();
        let Some(unit) = state.units.get_key_value(name).map(|(unit, _)| unit.clone()) else { return };
        if let Some(failed) = failed() {
            state.units.insert(unit.clone(), failed);
        }
        if state.changed.insert(unit) {
            self.some.notify_one();
        }
    }

    /// Everything may have changed.
    pub(super) fn all_changed(&self) {
        self.state().all = true;
        self.some.notify_one();
    }

    fn take(&self) -> Option<Notice> {
        let mut state = self.state();
        let changed = std::mem::take(&mut state.changed);
        if std::mem::take(&mut state.all) {
            Some(Notice::All)
        } else {
            (!changed.is_empty()).then_some(Notice::Units(changed))
        }
    }

    /// Passes notices on until the receiver is dropped.
    pub(super) async fn pass_on(&self, notices: mpsc::Sender<Notice>) {
        let mut last: Option<Instant> = None;
        loop {
            tokio::select! {
                () = self.some.notified() => {}
                () = notices.closed() => return,
            }
            let soon = Instant::now() + TOGETHER;
            tokio::time::sleep_until(last.map_or(soon, |last| soon.max(last + INTERVAL))).await;
            // Room first: what comes while the receiver is busy joins the same notice.
            let Ok(room) = notices.reserve().await else { return };
            if let Some(notice) = self.take() {
                room.send(notice);
                last = Some(Instant::now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn name(text: &str) -> UnitName {
        UnitName::parse(text).unwrap()
    }

    fn names(texts: &[&str]) -> Notice {
        Notice::Units(texts.iter().map(|text| name(text)).collect())
    }

    fn start(units: &[&str]) -> (Arc<Changes>, mpsc::Receiver<Notice>) {
        let changes = Arc::new(Changes::default());
        for unit in units {
            changes.follow(&name(unit));
        }
        let (sender, notices) = mpsc::channel(1);
        let task = changes.clone();
        tokio::spawn(async move { task.pass_on(sender).await });
        (changes, notices)
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_at_once_then_gathered() {
        let (changes, mut notices) = start(&["a.service", "b.service", "c.service"]);
        let begin = Instant::now();
        changes.changed("a.service", || None);
        changes.changed("foreign.service", || None);
        assert_eq!(notices.recv().await, Some(names(&["a.service"])));
        assert_eq!(begin.elapsed(), TOGETHER);
        let begin = Instant::now();
        changes.changed("c.service", || None);
        changes.changed("b.service", || None);
        changes.changed("c.service", || None);
        assert_eq!(notices.recv().await, Some(names(&["b.service", "c.service"])));
        assert_eq!(begin.elapsed(), INTERVAL);
        tokio::time::sleep(INTERVAL * 3).await;
        let begin = Instant::now();
        changes.changed("a.service", || None);
        assert_eq!(notices.recv().await, Some(names(&["a.service"])));
        assert_eq!(begin.elapsed(), TOGETHER);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_taker_gets_each_name_once() {
        let (changes, mut notices) = start(&["a.service", "b.service"]);
        for _ in 0..100 {
            changes.changed("a.service", || None);
            tokio::time::sleep(INTERVAL).await;
            changes.changed("b.service", || None);
        }
        // One in the channel; the rest in one set.
        assert_eq!(notices.recv().await, Some(names(&["a.service"])));
        assert_eq!(notices.recv().await, Some(names(&["a.service", "b.service"])));
        tokio::time::sleep(INTERVAL * 3).await;
        assert!(notices.try_recv().is_err());
    }

    #[test]
    fn failures_are_remembered_until_better_is_heard() {
        let (changes, unit) = (Changes::default(), name("a.service"));
        changes.changed("a.service", || panic!("not followed, so of no interest"));
        changes.follow(&unit);
        changes.changed("a.service", || Some(true));
        changes.changed("a.service", || None);
        changes.follow(&unit);
        assert!(changes.was_failed(&unit));
        changes.changed("a.service", || Some(false));
        assert!(!changes.was_failed(&unit));
    }

    #[tokio::test(start_paused = true)]
    async fn all_covers_the_rest_and_the_forgotten_are_silent() {
        let (changes, mut notices) = start(&["a.service", "b.service"]);
        changes.changed("a.service", || None);
        changes.all_changed();
        assert_eq!(notices.recv().await, Some(Notice::All));
        changes.changed("b.service", || None);
        changes.forget(&name("b.service"));
        changes.changed("b.service", || None);
        tokio::time::sleep(INTERVAL * 3).await;
        assert!(notices.try_recv().is_err());
    }
}
