//! What fleetd counts, and the text in which Prometheus reads it (`/metrics`, exposition format 0.0.4).
//!
//! Names, labels, help texts and buckets of `fleet_engine_…` and `fleet_registry_…` are those of fleet 1.0, since dashboards know them;
//! those of `process_…` are what every Prometheus client calls them. While nobody asks, an event costs an atomic addition, and nothing
//! else is done: the rest is counted from the view when somebody does.

use std::fmt::{Display, Write as _};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The content type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// Upper bounds of the buckets of durations, seconds: the default of Prometheus, as in fleet 1.0.
const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// How long something took, each time.
#[derive(Debug, Default)]
struct Durations {
    /// One for each bound: what took no longer than it, and longer than the one before; the last what took longer than all.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// Microseconds.
    sum: AtomicU64,
}

impl Durations {
    fn observe(&self, took: Duration) {
        let bucket = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len());
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    fn write(&self, text: &mut Text, name: &str, label: Option<(&str, &str)>) {
        let label = label.map(|(key, value)| format!("{key}=\"{value}\",")).unwrap_or_default();
        let mut count = 0;
        for (bucket, bound) in
            self.buckets.iter().zip(BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]))
        {
            count += bucket.load(Relaxed);
            text.line(&format!("{name}_bucket{{{label}le=\"{bound}\"}}"), count);
        }
        let label = label.trim_end_matches(',');
        let label = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
        #[allow(clippy::cast_precision_loss, reason = "a sum of durations need not be exact")]
        text.line(&format!("{name}_sum{label}"), self.sum.load(Relaxed) as f64 / 1e6);
        text.line(&format!("{name}_count{label}"), count);
    }
}

/// What an engine does to a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Places it.
    Schedule,
    /// Takes it off its machine.
    Unschedule,
}

/// What is done with the registry on behalf of the API and the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A record is read.
    Get,
    /// Records are written, in one transaction.
    Set,
}

/// The counts of a server.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Seconds since 1970; 0 while another server leads.
    leader_since: AtomicU64,
    rounds: Durations,
    round_failures: AtomicU64,
    tasks: [AtomicU64; 2],
    task_failures: [AtomicU64; 2],
    operations: [Durations; 2],
    operation_failures: [AtomicU64; 2],
}

const TASKS: [&str; 2] = ["attemptscheduleunit", "unscheduleunit"];
const OPERATIONS: [&str; 2] = ["get", "set"];

impl Metrics {
    /// The engine of this server leads since then, seconds since 1970; 0: it does not.
    pub fn leads_since(&self, seconds: u64) {
        self.leader_since.store(seconds, Relaxed);
    }

    /// The engine looked at what changed, and decided.
    pub fn round(&self, took: Duration) {
        self.rounds.observe(took);
    }

    /// What the engine decided could not be written.
    pub fn round_failed(&self) {
        self.round_failures.fetch_add(1, Relaxed);
    }

    /// A decision was committed, or not.
    pub fn task(&self, task: Task, done: bool) {
        let counts = if done { &self.tasks } else { &self.task_failures };
        counts[task as usize].fetch_add(1, Relaxed);
    }

    /// The registry answered, or failed.
    pub fn operation(&self, operation: Operation, took: Duration, done: bool) {
        if done {
            self.operations[operation as usize].observe(took);
        } else {
            self.operation_failures[operation as usize].fetch_add(1, Relaxed);
        }
    }

    /// Writes the metrics that fleet 1.0 had. As there, a label that never occurred is not shown.
    pub fn write(&self, text: &mut Text) {
        text.metric(
            "fleet_engine_leader_start_time",
            "Start time of becoming an engine leader since epoch in seconds.",
            "gauge",
        );
        text.line("fleet_engine_leader_start_time", self.leader_since.load(Relaxed));
        let rounds = self.rounds.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum::<u64>();
        text.metric("fleet_engine_reconcile_count_total", "Counter of reconcile rounds.", "counter");
        text.line("fleet_engine_reconcile_count_total", rounds);
        text.metric(
            "fleet_engine_reconcile_duration_second",
            "Histogram of time (in seconds) each schedule round takes.",
            "histogram",
        );
        self.rounds.write(text, "fleet_engine_reconcile_duration_second", None);
        text.counters(
            "fleet_engine_reconcile_failure_count_total",
            "Counter of scheduling failures.",
            &["schedule"],
            std::slice::from_ref(&self.round_failures),
        );
        text.counters(
            "fleet_engine_task_count_total",
            "Counter of engine schedule tasks.",
            &TASKS,
            &self.tasks,
        );
        text.counters(
            "fleet_engine_task_failure_count_total",
            "Counter of engine schedule task failures.",
            &TASKS,
            &self.task_failures,
        );
        let counts = self.operations.each_ref().map(|durations| {
            AtomicU64::new(durations.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum())
        });
        text.counters(
            "fleet_registry_operation_count_total",
            "Counter of registry operations.",
            &OPERATIONS,
            &counts,
        );
        text.counters(
            "fleet_registry_operation_failed_count_total",
            "Counter of failed registry operations.",
            &OPERATIONS,
            &self.operation_failures,
        );
        if counts.iter().any(|count| count.load(Relaxed) > 0) {
            let name = "fleet_registry_operation_duration_second";
            text.metric(name, "Histogram of time (in seconds) each registry operation takes.", "histogram");
            for ((durations, count), operation) in self.operations.iter().zip(&counts).zip(OPERATIONS) {
                if count.load(Relaxed) > 0 {
                    durations.write(text, name, Some(("ops", operation)));
                }
            }
        }
    }
}

/// The text that is being written.
#[derive(Debug, Default)]
pub struct Text(String);

impl Text {
    /// Begins a metric.
    pub fn metric(&mut self, name: &str, help: &str, kind: &str) {
        // Writing into a String never fails; so below.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// A value; `name` with its labels.
    pub fn line(&mut self, name: &str, value: impl Display) {
        let _ = writeln!(self.0, "{name} {value}");
    }

    /// A metric with one value.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.metric(name, help, "gauge");
        self.line(name, value);
    }

    /// A metric with a value for each word of a label.
    pub fn gauges<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        values: impl IntoIterator<Item = (&'a str, usize)>,
    ) {
        self.metric(name, help, "gauge");
        for (word, value) in values {
            self.line(&format!("{name}{{{label}=\"{}\"}}", escaped(word)), value);
        }
    }

    fn counters(&mut self, name: &str, help: &str, types: &[&str], counts: &[AtomicU64]) {
        let counts = types.iter().zip(counts).map(|(kind, count)| (*kind, count.load(Relaxed)));
        let seen: Vec<_> = counts.filter(|(_, count)| *count > 0).collect();
        if seen.is_empty() {
            return;
        }
        self.metric(name, help, "counter");
        for (kind, count) in seen {
            self.line(&format!("{name}{{type=\"{kind}\"}}"), count);
        }
    }

    /// What every program tells about itself: its version, and what the kernel says of its process. What /proc does not tell is left out.
    pub fn process(&mut self) {
        self.metric("fleet_build_info", "The version of fleetd.", "gauge");
        self.line(&format!("fleet_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1);
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let usage = Usage::of(
            &read("/proc/self/stat"),
            &read("/proc/self/status"),
            &read("/proc/self/limits"),
            &read("/proc/stat"),
        );
        if let Some(seconds) = usage.cpu {
            let name = "process_cpu_seconds_total";
            self.metric(name, "Total user and system CPU time spent in seconds.", "counter");
            self.line(name, seconds);
        }
        let open = std::fs::read_dir("/proc/self/fd").ok().map(|fds| fds.count() as f64);
        for (name, help, value) in [
            ("process_max_fds", "Maximum number of open file descriptors.", usage.max_fds),
            ("process_open_fds", "Number of open file descriptors.", open),
            ("process_resident_memory_bytes", "Resident memory size in bytes.", usage.resident),
            (
                "process_start_time_seconds",
                "Start time of the process since unix epoch in seconds.",
                usage.started,
            ),
            ("process_virtual_memory_bytes", "Virtual memory size in bytes.", usage.virtual_memory),
        ] {
            if let Some(value) = value {
                self.gauge(name, help, value);
            }
        }
    }

    /// The whole text.
    pub fn finish(self) -> String {
        self.0
    }
}

/// A label's value, with what would end it escaped.
fn escaped(word: &str) -> String {
    word.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

/// What the kernel says of a process, proc(5).
#[derive(Debug, Default, PartialEq)]
struct Usage {
    cpu: Option<f64>,
    resident: Option<f64>,
    virtual_memory: Option<f64>,
    started: Option<f64>,
    max_fds: Option<f64>,
}

impl Usage {
    /// From the texts of /proc/self/stat, /proc/self/status, /proc/self/limits and /proc/stat. Linux counts ticks of 10 ms for every program, whatever
    /// its own clock is.
    fn of(stat: &str, status: &str, limits: &str, boot: &str) -> Usage {
        const TICKS: f64 = 100.0;
        // The name of the program, in parentheses, may contain anything.
        let fields: Vec<&str> =
            stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
        // Numbered as in proc(5), from 3: the first after the name.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let after = |text: &str, start: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(start))?;
            line.split_ascii_whitespace().next()?.parse::<f64>().ok()
        };
        Usage {
            cpu: field(14).zip(field(15)).map(|(user, system)| (user + system) / TICKS),
            resident: after(status, "VmRSS:").map(|kilobytes| kilobytes * 1024.0),
            virtual_memory: after(status, "VmSize:").map(|kilobytes| kilobytes * 1024.0),
            started: after(boot, "btime ").zip(field(22)).map(|(boot, ticks)| boot + ticks / TICKS),
            max_fds: after(limits, "Max open files"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_that_of_prometheus() {
        let metrics = Metrics::default();
        metrics.leads_since(1_795_000_000);
        metrics.round(Duration::from_millis(7));
        metrics.round(Duration::from_secs(60));
        metrics.task(Task::Schedule, true);
        metrics.task(Task::Unschedule, false);
        metrics.operation(Operation::Set, Duration::from_millis(1), true);
        let mut text = Text::default();
        metrics.write(&mut text);
        let text = text.finish();
        for line in [
            "# TYPE fleet_engine_leader_start_time gauge\nfleet_engine_leader_start_time 1795000000\n",
            "# TYPE fleet_engine_reconcile_count_total counter\nfleet_engine_reconcile_count_total 2\n",
            "fleet_engine_reconcile_duration_second_bucket{le=\"0.005\"} 0\n",
            "fleet_engine_reconcile_duration_second_bucket{le=\"0.01\"} 1\n",
            "fleet_engine_reconcile_duration_second_bucket{le=\"10\"} 1\n",
            "fleet_engine_reconcile_duration_second_bucket{le=\"+Inf\"} 2\n",
            "fleet_engine_reconcile_duration_second_sum 60.007\nfleet_engine_reconcile_duration_second_count 2\n",
            "fleet_engine_task_count_total{type=\"attemptscheduleunit\"} 1\n",
            "fleet_engine_task_failure_count_total{type=\"unscheduleunit\"} 1\n",
            "fleet_registry_operation_count_total{type=\"set\"} 1\n",
            "fleet_registry_operation_duration_second_bucket{ops=\"set\",le=\"0.005\"} 1\n",
            "fleet_registry_operation_duration_second_count{ops=\"set\"} 1\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        for absent in ["unscheduleunit\"} 0", "type=\"get\"", "reconcile_failure"] {
            assert!(!text.contains(absent), "{absent}\n{text}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escaped("a\"\\\n"), "a\\\"\\\\\\n");
    }

    #[test]
    fn proc_is_read() {
        let stat = "17 (a) b) S 1 17 17 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 3 0 2500 4096000 10 18446744073709551615";
        let status = "Name:\ta) b\nVmSize:\t    4000 kB\nVmRSS:\t      40 kB\n";
        let limits = "Limit      Soft Limit   Hard Limit  Units\nMax open files            1024                 524288               files\n";
        let usage = Usage::of(stat, status, limits, "cpu 1 2\nbtime 1795000000\n");
        assert_eq!(usage.cpu, Some(2.0));
        assert_eq!(usage.started, Some(1_795_000_025.0));
        assert_eq!(usage.virtual_memory, Some(4_096_000.0));
        assert_eq!(usage.resident, Some(40_960.0));
        assert_eq!(usage.max_fds, Some(1024.0));
        assert_eq!(Usage::of("", "", "", ""), Usage::default());
    }
}
