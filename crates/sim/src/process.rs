//! One process: a tokio runtime of its own, on one thread, with a clock that the world moves.
//!
//! Its clock may run fast or slow, it may be paused and go on believing that no time has passed, and it may be killed
//! wherever its tasks wait. Nothing in it ever waits for real time, and nothing in it is decided by chance: tasks run in the order in
//! which they were woken, and `select!` has to be `biased` everywhere.

use std::cell::{Cell, RefCell};
use std::{future::Future, sync::Once, time::Duration};
use tokio::{runtime, task::JoinHandle, time::Instant};

/// Time since the world began, as nobody in it knows it.
pub(crate) type Time = Duration;

thread_local! {
    /// Which process runs, and its time, for the log.
    static RUNNING: Cell<(usize, Time)> = const { Cell::new((usize::MAX, Time::ZERO)) };
}

thread_local! {
    /// The last panic on this thread: a task's runtime keeps it to itself.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Has panics noted from now on.
pub(crate) fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANIC.set(Some(panic.to_string()));
            usual(panic);
        }));
    });
}

/// The panic there was since this was asked last.
pub(crate) fn take_panic() -> Option<String> {
    PANIC.take()
}

/// Which host's process runs on this thread, and the time.
pub(crate) fn running() -> (usize, Time) {
    RUNNING.get()
}

/// For so long after something came to it a process is looked at in each step: it may wait for short times of its own.
const WARM: Duration = Duration::from_millis(50);

/// A process.
pub(crate) struct Process {
    runtime: runtime::Runtime,
    metrics: runtime::RuntimeMetrics,
    host: usize,
    /// Its clock when it began, and the time then.
    origin: Instant,
    began: Time,
    /// How fast its clock runs.
    rate: f64,
    /// When it ran last, and until when it is looked at in each step.
    ran: Time,
    warm: Time,
    paused: bool,
    /// Since when its machine is suspended.
    asleep: Option<Time>,
    main: Option<JoinHandle<()>>,
}

impl Process {
    /// A process that begins now, without a task.
    pub(crate) fn new(host: usize, now: Time, rate: f64) -> std::io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
        let origin = runtime.block_on(async { Instant::now() });
        let (ran, warm, metrics) = (now, now, runtime.metrics());
        Ok(Process {
            runtime,
            metrics,
            host,
            origin,
            began: now,
            rate,
            ran,
            warm,
            paused: false,
            asleep: None,
            main: None,
        })
    }

    /// Begins its main task: the process ends with it.
    pub(crate) fn start(&mut self, main: impl Future<Output = ()> + Send + 'static) {
        self.main = Some(self.runtime.spawn(main));
    }

    /// Adds a task.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// Does something within the process, at once.
    pub(crate) fn within<T>(&self, act: impl FnOnce() -> T) -> T {
        let _entered = self.runtime.enter();
        act()
    }

    /// Whether its main task has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.main.as_ref().is_some_and(JoinHandle::is_finished)
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused || self.asleep.is_some()
    }

    pub(crate) fn pause(&mut self) {
        self.paused = true;
    }

    /// Goes on: all that was due meanwhile is due now.
    pub(crate) fn resume(&mut self, now: Time) {
        if std::mem::take(&mut self.paused) && self.asleep.is_none() {
            let target = self.local(now);
            self.runtime.block_on(async {
                let missed = target.saturating_duration_since(Instant::now());
                tokio::time::advance(missed).await;
            });
        }
    }

    /// Its machine is suspended: its clock stands still.
    pub(crate) fn sleep(&mut self, now: Time) {
        self.asleep = self.asleep.or(Some(now));
    }

    /// Its machine goes on, and its clock as if nothing had been.
    pub(crate) fn wake(&mut self, now: Time) {
        if let Some(since) = self.asleep.take() {
            self.began += now.saturating_sub(since);
        }
    }

    /// Lets it run up to a time, if anything came to it since it ran last; otherwise only if that is `lag` ago, since only its own
    /// clock could make something happen in it, and who asks a process costs more than most processes do. `before`: the end of the step
    /// before, in which all that came to it came.
    pub(crate) fn run_to(&mut self, now: Time, before: Time, lag: Duration) {
        if self.is_paused() {
            return;
        }
        let called = self.metrics.global_queue_depth() > 0;
        if called {
            self.warm = now + WARM;
        }
        if !called && now > self.warm && now < self.ran + lag {
            return;
        }
        RUNNING.set((self.host, now));
        // It does not hear of what came before that came.
        let missed = Some(self.local(before)).filter(|_| called && self.ran < before);
        let target = self.local(now);
        self.runtime.block_on(async {
            if let Some(missed) = missed {
                let missed = missed.saturating_duration_since(Instant::now());
                if !missed.is_zero() {
                    tokio::time::advance(missed).await;
                }
            }
            tokio::time::sleep_until(target).await
        });
        self.ran = now;
        RUNNING.set((usize::MAX, now));
    }

    fn local(&self, now: Time) -> Instant {
        self.origin + now.saturating_sub(self.began).mul_f64(self.rate)
    }
}

/// Prints what fleetd logs, with simulated times and hosts, to standard output.
pub fn trace_logs() {
    struct Stamp;
    impl tracing_subscriber::fmt::time::FormatTime for Stamp {
        fn format_time(&self, out: &mut tracing_subscriber::fmt::format::Writer<'_>) -> std::fmt::Result {
            let (host, now) = running();
            write!(out, "{:>9.3}   log of host {host}:", now.as_secs_f64())
        }
    }
    // A second call changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_timer(Stamp)
        .with_ansi(false)
        .with_target(false)
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(std::io::stdout)
        .try_init();
}
