//! The one table of cases in which fleet answers otherwise than the original, each with its reason and with what it answers
//! instead: `golden/deviations.txt`. A reason is the first column of a row in docs/COMPATIBILITY.md.

use crate::transcript::{Answer, Case, parse};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;

/// A case that deviates.
#[derive(Debug)]
pub(crate) struct Deviation {
    /// The row of docs/COMPATIBILITY.md.
    pub(crate) reason: String,
    /// The command again, so that a number that has slipped is noticed.
    command: String,
    /// What fleet answers.
    pub(crate) answer: Answer,
}

/// The table, by transcript and number of the command.
pub(crate) fn read(text: &str) -> Result<BTreeMap<(String, usize), Deviation>> {
    let mut table = BTreeMap::new();
    for entry in text.split("\n=== ").skip(1) {
        let (title, rest) = entry.split_once('\n').context("an entry without lines")?;
        let (transcript, number) =
            title.split_once(' ').with_context(|| format!("{title:?} names no case"))?;
        let (reason, rest) = rest.split_once('\n').with_context(|| format!("{title}: no reason"))?;
        let reason =
            reason.strip_prefix("reason: ").with_context(|| format!("{title}: {reason:?} is no reason"))?;
        let [case]: [Case; 1] = parse(rest)
            .with_context(|| title.to_owned())?
            .try_into()
            .map_err(|_| anyhow::anyhow!("{title}: not one case"))?;
        let deviation = Deviation { reason: reason.to_owned(), command: case.command, answer: case.recorded };
        if table.insert((transcript.to_owned(), number.parse()?), deviation).is_some() {
            bail!("{title} is there twice");
        }
    }
    Ok(table)
}

impl Deviation {
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

/// An entry of the table.
pub(crate) fn entry(transcript: &str, case: &Case, reason: &str, answer: &Answer) -> String {
    format!("\n=== {transcript} {}\nreason: {reason}\n$ {}\n{}", case.number, case.command, answer.show())
}
