//! How a command tells of units that did not get where they should.
use crate::context::{Context, words};
use crate::wait::tracker::{Goal, Verdict};
use crate::wait::{Outcome, explain};
use fleet_api::client::JournalQuery;
use std::time::Duration;

/// How many lines of its journal are shown of a unit that failed.
const LINES: i64 = 10;

/// The most of them that is read, bytes.
const MOST: usize = 64 << 10;

/// How long the journal may take to come.
const JOURNAL: Duration = Duration::from_secs(5);

/// How many names a message lists.
const NAMES: usize = 5;

/// The exit code after Ctrl-C, as shells have it.
const INTERRUPTED: i32 = 130;

/// Tells on stderr of all that went wrong, and gives the exit code. `timed_out` makes the original's
/// line of the text of a timeout; `verb` and `units` say what the cluster goes on with after Ctrl-C.
pub(crate) async fn trouble(
    context: &Context,
    goal: Goal,
    outcome: &Outcome,
    timed_out: impl Fn(&str) -> String,
    verb: &str,
    units: &[String],
) -> i32 {
    if outcome.interrupted {
        eprintln!("Interrupted. The cluster goes on with it: {verb} {}.", some_of(units));
        return INTERRUPTED;
    }
    if let Some((name, _)) = outcome.late.first() {
        let text = format!("timed out waiting for unit {name} to report state {}", goal.state());
        eprintln!("Error waiting for units: {text}");
        eprintln!("{}", timed_out(&text));
        for (name, waiting) in &outcome.late {
            eprintln!("Unit {name}: {}", explain(context, waiting).await);
        }
    }
    for (name, verdict) in &outcome.failed {
        failure(context, name, verdict).await;
    }
    if let Some(error) = &outcome.lost {
        eprintln!("Error waiting for units: lost contact with fleetd: {}", error.reason());
        context.hint(error);
    }
    if outcome.is_good() { 0 } else { 1 }
}

/// Tells of one unit that failed: why, what systemd says, and what it logged last.
pub(crate) async fn failure(context: &Context, name: &str, verdict: &Verdict) {
    let Verdict::Failed { why, machine_id, state } = verdict else { return };
    let place = match machine_id.as_str() {
        "" => String::new(),
        id => format!(" on {}", context.legend(id).await),
    };
    eprintln!("Unit {name} failed{place}: {why}");
    let Some(state) = state else { return };
    eprintln!(
        "  systemd: {}, {} ({})",
        state.systemd_load_state, state.systemd_active_state, state.systemd_sub_state
    );
    let lines = last_lines(context, name).await;
    if !lines.is_empty() {
        eprintln!("  The last lines of its journal:");
        lines.lines().for_each(|line| eprintln!("    {line}"));
    }
}

/// The end of a unit's journal; nothing where it cannot be had, since this is only an addition.
async fn last_lines(context: &Context, name: &str) -> String {
    let query = JournalQuery { lines: LINES, follow: false, output: "short".to_owned(), machine: None };
    let mut bytes = Vec::new();
    let read = async {
        let mut journal = context.client.journal(name, &query).await?;
        while let Some(piece) = journal.next().await? {
            bytes.extend_from_slice(&piece);
            if bytes.len() > MOST {
                break;
            }
        }
        Ok::<(), fleet_api::client::Error>(())
    };
    // What has come until an error or the end of time is shown.
    let _ = tokio::time::timeout(JOURNAL, read).await;
    bytes.truncate(MOST);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The first few names, and how many more there are.
fn some_of(units: &[String]) -> String {
    let shown = units.iter().take(NAMES).cloned().collect::<Vec<_>>().join(" ");
    match units.len().saturating_sub(NAMES) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// A file that cannot be opened, in the original's words.
pub(crate) fn open_error(path: &str, error: &std::io::Error) -> String {
    format!("open {path}: {}", words(error))
}
