//! Several sources of lines made one, by time: the order in which what has arrived is shown. Pure: time comes in.
//!
//! Lines of one source keep their order, whatever their stamps say (clocks are set back). Without follow, a source that has
//! sent nothing yet is waited for until it does or ends, so the result is by time throughout. With follow it
//! is waited for only [`QUIET`]: who is silent has nothing to say. And after [`BACKLOG`], when only new lines come, none
//! waits longer than [`LONGEST`] for others: a machine whose clock is behind, and who talks without end, holds nobody up.
use std::time::Duration;

/// How long a silent source holds up others.
pub(crate) const QUIET: Duration = Duration::from_millis(200);
/// How long a line waits for older ones of others, once the backlog is through.
pub(crate) const LONGEST: Duration = Duration::from_secs(1);
/// For how long after the beginning old lines are expected.
pub(crate) const BACKLOG: Duration = Duration::from_secs(10);

/// What is at hand of each source. Points in time are spans since the beginning.
#[derive(Debug)]
pub(crate) struct Merge<T> {
    sources: Vec<Source<T>>,
    follow: bool,
}

#[derive(Debug)]
struct Source<T> {
    head: Option<Head<T>>,
    open: bool,
    /// Since when it has no line for us.
    silent: Duration,
}

#[derive(Debug)]
struct Head<T> {
    /// Its time in the log.
    stamp: u64,
    arrived: Duration,
    line: T,
}

impl<T> Merge<T> {
    /// So many sources.
    pub(crate) fn new(sources: usize, follow: bool) -> Self {
        let source = || Source { head: None, open: true, silent: Duration::ZERO };
        Merge { sources: std::iter::repeat_with(source).take(sources).collect(), follow }
    }

    /// Whether a source can take a line: it may send one, and none is at hand.
    pub(crate) fn wants(&self, source: usize) -> bool {
        self.sources.get(source).is_some_and(|source| source.open && source.head.is_none())
    }

    /// A line of a source that [wants](Self::wants) one, with its time in the log, and when it arrived.
    pub(crate) fn offer(&mut self, source: usize, stamp: u64, arrived: Duration, line: T) {
        if let Some(source) = self.sources.get_mut(source) {
            source.head = Some(Head { stamp, arrived, line });
        }
    }

    /// Nothing more comes from a source.
    pub(crate) fn end(&mut self, source: usize) {
        if let Some(source) = self.sources.get_mut(source) {
            source.open = false;
        }
    }

    /// Whether all is over.
    pub(crate) fn is_over(&self) -> bool {
        self.sources.iter().all(|source| !source.open && source.head.is_none())
    }

    /// The next line to show, if it is time for one, and its source. Take in all that has arrived before.
    pub(crate) fn next(&mut self, now: Duration) -> Option<(usize, T)> {
        let heads = || self.sources.iter().enumerate().filter_map(|(at, it)| Some((at, it.head.as_ref()?)));
        let aged = heads()
            .filter(|(_, head)| self.too_long(head).is_some_and(|end| end <= now))
            .min_by_key(|(at, head)| (head.arrived, *at));
        let at = match aged {
            Some((at, _)) => at,
            None if self
                .sources
                .iter()
                .any(|source| self.waited_for(source).is_some_and(|end| end > now)) =>
            {
                return None;
            }
            None => heads().min_by_key(|(at, head)| (head.stamp, *at))?.0,
        };
        let source = self.sources.get_mut(at)?;
        let head = source.head.take()?;
        source.silent = now;
        Some((at, head.line))
    }

    /// When [`next`](Self::next) may have a line, if nothing arrives till then; `None`: not before something arrives.
    pub(crate) fn due(&self) -> Option<Duration> {
        let heads = || self.sources.iter().filter_map(|source| source.head.as_ref());
        heads().next()?;
        let quiet = self.sources.iter().filter_map(|source| self.waited_for(source)).max()?;
        let aged = heads().filter_map(|head| self.too_long(head)).min();
        Some(aged.map_or(quiet, |aged| aged.min(quiet))).filter(|due| *due < Duration::MAX)
    }

    /// Until when a source that has nothing at hand is waited for.
    fn waited_for(&self, source: &Source<T>) -> Option<Duration> {
        let silent = source.open && source.head.is_none();
        silent.then(|| if self.follow { source.silent.saturating_add(QUIET) } else { Duration::MAX })
    }

    /// When a line has waited too long.
    fn too_long(&self, head: &Head<T>) -> Option<Duration> {
        self.follow.then(|| head.arrived.saturating_add(LONGEST).max(BACKLOG))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn without_follow_everyone_is_waited_for() {
        let mut merge = Merge::new(2, false);
        merge.offer(0, 5, ms(0), "five");
        assert_eq!((merge.next(ms(1_000_000)), merge.due()), (None, None));
        merge.offer(1, 3, ms(2), "three");
        assert_eq!(merge.next(ms(2)), Some((1, "three")));
        assert_eq!(merge.next(ms(3)), None);
        merge.end(1);
        assert_eq!(merge.next(ms(3)), Some((0, "five")));
        assert!(!merge.is_over());
        merge.end(0);
        assert!(merge.is_over());
    }

    #[test]
    fn who_is_silent_is_not_waited_for_long() {
        let mut merge = Merge::new(2, true);
        merge.offer(0, 5, ms(10), "five");
        assert_eq!((merge.next(ms(10)), merge.due()), (None, Some(QUIET)));
        assert_eq!(merge.next(QUIET), Some((0, "five")));
        // Silent still: what comes now is shown at once.
        merge.offer(0, 6, ms(300), "six");
        assert_eq!(merge.next(ms(300)), Some((0, "six")));
        // Both have something: the older one first, and after it the other when its source is silent.
        merge.offer(0, 9, ms(400), "nine");
        merge.offer(1, 8, ms(400), "eight");
        assert_eq!(merge.next(ms(400)), Some((1, "eight")));
        assert_eq!((merge.next(ms(400)), merge.due()), (None, Some(ms(400) + QUIET)));
        assert_eq!(merge.next(ms(400) + QUIET), Some((0, "nine")));
        assert_eq!(merge.due(), None);
    }

    #[test]
    fn a_clock_that_is_behind_holds_nobody_up() {
        let mut merge = Merge::new(2, true);
        let start = BACKLOG + ms(5);
        merge.offer(0, 1_000_000, start, 0);
        let mut now = start;
        let shown = loop {
            if merge.wants(1) {
                merge.offer(1, 1, now, 1);
            }
            let Some((source, _)) = merge.next(now) else { panic!("somebody has a line") };
            if source == 0 {
                break now;
            }
            now += 10 * MS;
        };
        assert_eq!(shown, start + LONGEST);
    }

    /// Lines of sources as they arrive: the stamp, and how long after the one before.
    fn sources() -> impl Strategy<Value = Vec<Vec<(u64, u64)>>> {
        prop::collection::vec(prop::collection::vec((0u64..50, 0u64..600), 0..12), 1..5)
    }

    /// Runs a merge to its end; the lines shown, as (source, number), each with the time.
    fn run(sources: &[Vec<(u64, u64)>], follow: bool) -> Vec<(usize, usize, Duration)> {
        let arrivals: Vec<Vec<Duration>> = sources
            .iter()
            .map(|lines| {
                let mut at = 0;
                lines
                    .iter()
                    .map(|(_, after)| {
                        at += after;
                        ms(at)
                    })
                    .collect()
            })
            .collect();
        let mut merge = Merge::new(sources.len(), follow);
        let (mut taken, mut shown, mut now) = (vec![0; sources.len()], Vec::new(), Duration::ZERO);
        loop {
            for (source, lines) in sources.iter().enumerate() {
                if !merge.wants(source) {
                    continue;
                }
                match arrivals[source].get(taken[source]) {
                    Some(arrived) if *arrived <= now => {
                        merge.offer(source, lines[taken[source]].0, *arrived, taken[source]);
                        taken[source] += 1;
                    }
                    Some(_) => {}
                    None => merge.end(source),
                }
            }
            if let Some((source, line)) = merge.next(now) {
                shown.push((source, line, now));
            } else if merge.is_over() {
                return shown;
            } else {
                let coming = (0..sources.len()).filter(|source| merge.wants(*source));
                let coming = coming.filter_map(|source| arrivals[source].get(taken[source]).copied());
                let then = coming.chain(merge.due()).min().expect("something is to come");
                assert!(then > now, "a turn for nothing");
                now = then;
            }
        }
    }

    proptest! {
        /// Nothing is lost or told twice, and each source keeps its order.
        #[test]
        fn complete_and_in_order(sources in sources(), follow in any::<bool>()) {
            let shown = run(&sources, follow);
            for (source, lines) in sources.iter().enumerate() {
                let own: Vec<usize> = shown.iter().filter(|it| it.0 == source).map(|it| it.1).collect();
                prop_assert_eq!(own, (0..lines.len()).collect::<Vec<_>>());
            }
        }

        /// Where each source is by time, all is, whenever the lines arrived.
        #[test]
        fn sorted(mut sources in sources()) {
            for lines in &mut sources {
                let mut stamps: Vec<u64> = lines.iter().map(|line| line.0).collect();
                stamps.sort_unstable();
                lines.iter_mut().zip(stamps).for_each(|(line, stamp)| line.0 = stamp);
            }
            let stamps: Vec<u64> = run(&sources, false).iter().map(|it| sources[it.0][it.1].0).collect();
            prop_assert!(stamps.is_sorted(), "{:?}", stamps);
        }

        /// With follow, whenever lines are there, one is shown within QUIET: either at once, or when the silent ones were
        /// waited for.
        #[test]
        fn no_line_waits_for_silence(sources in sources()) {
            let shown = run(&sources, true);
            let mut arrived: Vec<(Duration, usize, usize)> = Vec::new();
            for (source, lines) in sources.iter().enumerate() {
                let mut at = 0;
                arrived.extend(lines.iter().enumerate().map(|(n, (_, after))| { at += after; (ms(at), source, n) }));
            }
            for (at, source, number) in arrived {
                let out = shown.iter().find(|it| (it.0, it.1) == (source, number)).expect("complete").2;
                let mut last = at;
                for (_, _, time) in shown.iter().filter(|it| it.2 >= at && it.2 <= out) {
                    prop_assert!(*time - last <= QUIET, "nothing was shown from {:?} to {:?}", last, time);
                    last = *time;
                }
            }
        }
    }
}
