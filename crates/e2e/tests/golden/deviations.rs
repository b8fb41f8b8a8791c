//! The one table of cases in which fleet answers otherwise than the original, each with its reason and with what it answers
//! instead: `golden/deviations.txt`. A reason is the first column of a row in docs/COMPATIBILITY.md. An entry whose title ends with
//! layouts, `(embedded, etcd)`, is of clusters in those; the others are of all.

use crate::transcript::{Answer, Case, parse};
use anyhow::{Context, Result, bail};
use fleet_e2e::Layout;
use std::collections::BTreeMap;

/// A case that deviates.
#[derive(Debug)]
pub(crate) struct Deviation {
    /// The row of docs/COMPATIBILITY.md.
    pub(crate) reason: String,
    /// In which layouts; none for all.
    layouts: Vec<Layout>,
    /// The command again, so that a number that has slipped is noticed.
    command: String,
    /// What fleet answers.
    pub(crate) answer: Answer,
}

/// The deviations of each case, by transcript and number of the command: several when layouts differ.
pub(crate) type Table = BTreeMap<(String, usize), Vec<Deviation>>;

/// Reads the table.
pub(crate) fn read(text: &str) -> Result<Table> {
    let mut table = Table::new();
    for entry in text.split("\n=== ").skip(1) {
        let (title, rest) = entry.split_once('\n').context("an entry without lines")?;
        let (case, layouts) = match title.strip_suffix(')').and_then(|title| title.split_once(" (")) {
            Some((case, layouts)) => (case, layouts.split(", ").map(str::parse).collect::<Result<Vec<_>>>()?),
            None => (title, Vec::new()),
        };
        let (transcript, number) =
            case.split_once(' ').with_context(|| format!("{title:?} names no case"))?;
        let (reason, rest) = rest.split_once('\n').with_context(|| format!("{title}: no reason"))?;
        let reason =
            reason.strip_prefix("reason: ").with_context(|| format!("{title}: {reason:?} is no reason"))?;
        let [case]: [Case; 1] = parse(rest)
            .with_context(|| title.to_owned())?
            .try_into()
            .map_err(|_| anyhow::anyhow!("{title}: not one case"))?;
        let deviation =
            Deviation { reason: reason.to_owned(), layouts, command: case.command, answer: case.recorded };
        let others = table.entry((transcript.to_owned(), number.parse()?)).or_default();
        if Layout::ALL.iter().any(|it| deviation.holds(*it) && others.iter().any(|other| other.holds(*it))) {
            bail!("{title} is there twice");
        }
        others.push(deviation);
    }
    Ok(table)
}

impl Deviation {
    /// Whether it is one in this layout.
    pub(crate) fn holds(&self, layout: Layout) -> bool {
        self.layouts.is_empty() || self.layouts.contains(&layout)
    }

    /// Fails unless it is of this case.
    pub(crate) fn check(&self, case: &Case) -> Result<()> {
        if self.command != case.command {
            bail!(
                "the deviation of case {} is of `{}`, not of `{}`",
                case.number,
                self.command,
                case.command
            );
        }
        Ok(())
    }
}

/// An entry of the table for what was answered in a layout, where `deviation` or nothing had been expected.
pub(crate) fn entry(
    transcript: &str,
    case: &Case,
    deviation: Option<&Deviation>,
    layout: Layout,
    answer: &Answer,
) -> String {
    let (reason, layouts) = match deviation {
        Some(deviation) => (deviation.reason.as_str(), deviation.layouts.clone()),
        None => ("?", vec![layout]),
    };
    let layouts: Vec<String> = layouts.iter().map(Layout::to_string).collect();
    let layouts = if layouts.is_empty() { String::new() } else { format!(" ({})", layouts.join(", ")) };
    format!(
        "\n=== {transcript} {}{layouts}\nreason: {reason}\n$ {}\n{}",
        case.number,
        case.command,
        answer.show()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deviation_may_be_of_some_layouts() {
        let entry = |title: &str, exit| format!("\n=== {title}\nreason: r\n$ a\n--- exit {exit}\n");
        let table = read(&(entry("t 1 (embedded, etcd)", 1) + &entry("t 1 (classic)", 2) + &entry("t 2", 3)))
            .unwrap();
        let exit = |number, layout| {
            let found = table[&("t".to_owned(), number)].iter().find(|it| it.holds(layout));
            found.map(|it| it.answer.exit.to_string())
        };
        assert_eq!(exit(1, Layout::Etcd).as_deref(), Some("--- exit 1"));
        assert_eq!(exit(1, Layout::Classic).as_deref(), Some("--- exit 2"));
        assert_eq!(exit(2, Layout::Classic).as_deref(), Some("--- exit 3"));
        for twice in ["t 1", "t 1 (etcd)"] {
            assert!(read(&(entry("t 1 (embedded, etcd)", 1) + &entry(twice, 2))).is_err());
        }
        assert!(read(&entry("t 1 (elsewhere)", 1)).is_err());
    }
}
