//! Typing lines in a host where people watch, and checking what comes back.

use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fleet_testbed::{Host, Output};

/// A session in a host that shows what it types and what comes back.
#[derive(Clone, Copy)]
pub(super) struct Session<'a> {
    /// Where it types.
    pub(super) host: &'a Host,
    /// What stands before `$`: the host, where there are several.
    pub(super) prompt: &'a str,
}

impl Session<'_> {
    /// Shows a line as if typed.
    pub(super) fn show(&self, line: &str) {
        if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) {
            println!("\x1b[1m{}$ {line}\x1b[0m", self.prompt);
        } else {
            println!("{}$ {line}", self.prompt);
        }
    }

    /// Types a line and returns what it gave, whatever the exit code.
    pub(super) fn type_line(&self, line: &str) -> Result<Output> {
        self.show(line);
        let deadline = Duration::from_secs(120);
        let output = self.host.command(["/bin/sh", "-c", line]).deadline(deadline).run()?;
        print!("{}{}", output.stdout, output.stderr);
        println!();
        Ok(output)
    }

    /// Types a line that must succeed, and checks what it gave.
    pub(super) fn check(&self, line: &str, check: impl FnOnce(&Output) -> Result<()>) -> Result<()> {
        let checked = || -> Result<()> {
            let output = self.type_line(line)?;
            ensure!(output.success(), "it ended with code {}", output.code());
            check(&output)
        };
        checked().with_context(|| format!("`{line}` did not give what it should"))
    }

    /// Types a line that must end with this exit code.
    pub(super) fn ends(&self, line: &str, code: i32) -> Result<()> {
        let output = self.type_line(line)?;
        ensure!(output.code() == code, "`{line}` ended with code {}, not {code}", output.code());
        Ok(())
    }

    /// Types a line that must succeed and say `text`, on whichever stream.
    pub(super) fn says(&self, line: &str, text: &str) -> Result<()> {
        self.check(line, |output| contains(&format!("{}{}", output.stdout, output.stderr), text))
    }
}

/// Checks that a text has a part.
pub(super) fn contains(text: &str, part: &str) -> Result<()> {
    ensure!(text.contains(part), "there is no {part:?} in it");
    Ok(())
}

/// Checks a table: its header, and that it has exactly these rows, columns in order.
pub(super) fn table(text: &str, header: &[&str], rows: &[&[&str]]) -> Result<()> {
    let mut lines =
        text.lines().map(|line| line.split('\t').filter(|cell| !cell.is_empty()).collect::<Vec<_>>());
    let first = lines.next().unwrap_or_default();
    ensure!(first == header, "the header is {first:?}, not {header:?}");
    let found: Vec<_> = lines.collect();
    ensure!(found == rows, "the rows are {found:?}, not {rows:?}");
    Ok(())
}
