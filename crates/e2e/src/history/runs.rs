//! Units that write down when they ran, and what they wrote.

use super::{History, Millis, Run};
use anyhow::{Context, Result, bail};

/// The directory on each host's disk in which units write, a file each.
pub const LOG: &str = "/var/log/runs";

/// The text of a unit file whose unit writes down when it ran, with more lines for `[Service]` and `[X-Fleet]`.
///
/// The start is written before its main process begins and the stop after all its processes have ended, so that runs on different hosts
/// overlap on paper whenever they did in truth.
pub fn recorded(marker: &str, exec: &str, service: &str, fleet: &str) -> String {
    let now = "read now rest < /proc/uptime";
    let mut text = format!(
        "[Service]\n\
         ExecStartPre=/bin/sh -c 'mkdir -p {LOG}; {now}; echo start $$now {marker} >> {LOG}/%n'\n\
         ExecStart={exec}\n\
         ExecStopPost=/bin/sh -c '{now}; echo stop $$now $$SERVICE_RESULT $$EXIT_CODE $$EXIT_STATUS >> {LOG}/%n'\n"
    );
    text += service;
    if !fleet.is_empty() {
        text = format!("{text}\n[X-Fleet]\n{fleet}");
    }
    text
}

impl History {
    /// Takes in what a unit wrote on a host.
    pub(super) fn take_runs(&mut self, host: usize, unit: &str, log: &str) -> Result<()> {
        let mut last: Option<Run> = None;
        for line in log.lines() {
            let mut words = line.splitn(3, ' ');
            let (what, at, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
            let at = at.and_then(millis).with_context(|| format!("{unit} on host {host}: line {line:?}"))?;
            match what {
                Some("start") => self.runs.extend(last.replace(Run {
                    unit: unit.to_owned(),
                    host,
                    marker: rest.to_owned(),
                    start: at,
                    stop: None,
                    how: String::new(),
                })),
                Some("stop") => match &mut last {
                    Some(run) if run.stop.is_none() => {
                        (run.stop, run.how) = (Some(at), rest.trim_end().to_owned());
                    }
                    // A start that failed before it was written down.
                    _ => {}
                },
                _ => bail!("{unit} on host {host}: line {line:?}"),
            }
        }
        self.runs.extend(last);
        Ok(())
    }

    /// Takes in when units ended on a host by what systemd said. It counts where the unit itself could not write its end down:
    /// the guard kills what would do that, too.
    pub(super) fn take_ends(&mut self, host: usize, ends: &[(String, Millis)]) {
        let starts: Vec<_> = self
            .runs
            .iter()
            .filter(|run| run.host == host)
            .map(|run| (run.unit.clone(), run.start))
            .collect();
        for run in self.runs.iter_mut().filter(|run| run.host == host && run.stop.is_none()) {
            let of_it = |(unit, at): &&(String, Millis)| *unit == run.unit && *at > run.start;
            let next = starts.iter().filter(of_it).map(|(_, at)| *at).min();
            let end = ends.iter().filter(of_it).map(|(_, at)| *at).min();
            if let Some(end) = end.filter(|end| next.is_none_or(|next| *end <= next)) {
                (run.stop, run.how) = (Some(end), "by the journal".to_owned());
            }
        }
    }
}

/// Seconds with two places, as in `/proc/uptime`.
pub(super) fn millis(text: &str) -> Option<Millis> {
    let (seconds, hundredths) = text.split_once('.')?;
    Some(seconds.parse::<Millis>().ok()? * 1000 + hundredths.parse::<Millis>().ok()? * 10)
}
