//! What a transcript says: commands, what came before each, and what the original answered.
//!
//! The form is that of the recordings, line by line: `## HEADING`, `# REMARK`, `--- file NAME` with its text, `$ COMMAND` and
//! what belongs to it (`--- stdin`, `--- stdout`, `--- stderr`, `--- response`, `--- exit N`, `--- still running after N s, killed`).
//! Two kinds of line are ours: `--- setup`, a script that makes what the recording took for granted, and `--- environment NAME=VALUE`.

use anyhow::{Context, Result, bail};

/// Where a command was typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Machine gold-1, gold-2 or gold-3.
    Machine(usize),
    /// A machine that is not in the cluster.
    Outside,
}

/// What happens before a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A file in the working directory, or at an absolute path.
    File {
        /// Its name.
        name: String,
        /// Its text.
        text: String,
    },
    /// A shell script.
    Setup {
        /// Where.
        place: Place,
        /// Its lines.
        script: String,
    },
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// With this exit code.
    Code(i32),
    /// Not within so many seconds.
    Running(u64),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "--- exit {code}"),
            Exit::Running(seconds) => write!(f, "--- still running after {seconds} s, killed"),
        }
    }
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Standard output; for `curl -i` the response.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
    /// The end.
    pub(crate) exit: Exit,
}

impl Answer {
    /// The answer as the lines of a transcript.
    pub(crate) fn show(&self) -> String {
        let mut shown = String::new();
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.is_empty() {
                shown += &format!("--- {name}\n{text}\n");
            }
        }
        format!("{shown}{}\n", self.exit)
    }
}

/// One recorded command.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    /// Which command of its transcript, from 1.
    pub(crate) number: usize,
    /// The heading above it.
    pub(crate) heading: String,
    /// What happens before.
    pub(crate) before: Vec<Step>,
    /// The command line.
    pub(crate) command: String,
    /// Where.
    pub(crate) place: Place,
    /// Variables set for it.
    pub(crate) environment: Vec<String>,
    /// What it reads; nothing when none.
    pub(crate) stdin: String,
    /// What the original answered.
    pub(crate) recorded: Answer,
}

/// Reads a transcript.
pub(crate) fn parse(text: &str) -> Result<Vec<Case>> {
    let mut lines = Lines { lines: text.lines().collect(), at: 0 };
    let (mut cases, mut heading, mut before) = (Vec::new(), String::new(), Vec::new());
    let mut environment = Vec::new();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix("## ") {
            heading = text.to_owned();
        } else if let Some(name) = line.strip_prefix("--- file ") {
            let mut text = lines.block(&["$ ", "--- ", "## "]).trim_end_matches('\n').to_owned();
            if !text.is_empty() {
                text.push('\n');
            }
            if lines.take("--- (no newline") {
                text.pop();
            }
            before.push(Step::File { name: name.to_owned(), text });
        } else if let ("--- setup", place) = place(line) {
            before.push(Step::Setup { place, script: lines.block(&["$ ", "--- ", "## "]) });
        } else if let Some(variable) = line.strip_prefix("--- environment ") {
            environment.push(variable.to_owned());
        } else if let Some(command) = line.strip_prefix("$ ") {
            let (command, place) = place(command);
            let mut case = Case {
                number: cases.len() + 1,
                heading: heading.clone(),
                before: std::mem::take(&mut before),
                command: command.to_owned(),
                place,
                environment: std::mem::take(&mut environment),
                stdin: String::new(),
                recorded: Answer { stdout: String::new(), stderr: String::new(), exit: Exit::Code(0) },
            };
            answer(&mut lines, &mut case).with_context(|| format!("line {}: $ {command}", lines.at))?;
            cases.push(case);
        } else if !line.is_empty() && !line.starts_with("# ") {
            bail!("line {}: {line:?} belongs to nothing", lines.at);
        }
    }
    if !before.is_empty() {
        bail!("something is prepared at the end, and no command follows");
    }
    Ok(cases)
}

fn place(command: &str) -> (&str, Place) {
    for (mark, place) in [
        (" (on gold-2)", Place::Machine(1)),
        (" (on gold-3)", Place::Machine(2)),
        (" (outside the cluster)", Place::Outside),
    ] {
        if let Some(command) = command.strip_suffix(mark) {
            return (command, place);
        }
    }
    (command, Place::Machine(0))
}

fn answer(lines: &mut Lines<'_>, case: &mut Case) -> Result<()> {
    while let Some(line) = lines.peek() {
        let Some(what) = line.strip_prefix("--- ") else {
            if line.is_empty() || line.starts_with("time: ") {
                lines.at += 1;
                continue;
            }
            break;
        };
        let ends: &[&str] = if what == "response" { &["$ ", "--- ", "## "] } else { &["--- ", "time: "] };
        match what {
            "stdin" => {
                lines.at += 1;
                case.stdin = lines.block(ends);
            }
            "stdout" | "response" => {
                lines.at += 1;
                let text = lines.block(ends);
                // After a response there is an empty line that is not of it.
                case.recorded.stdout =
                    if what == "response" { text.trim_end_matches('\n').to_owned() } else { text };
            }
            "stderr" => {
                lines.at += 1;
                case.recorded.stderr = lines.block(&["--- ", "time: ", "$ "]);
            }
            _ if what.starts_with("(no newline") => lines.at += 1,
            _ if what.starts_with("exit ") => {
                lines.at += 1;
                case.recorded.exit = Exit::Code(what[5..].parse()?);
            }
            _ if what.starts_with("still running after ") => {
                lines.at += 1;
                let seconds = what.split(' ').nth(3).context("no time")?;
                case.recorded.exit = Exit::Running(seconds.parse()?);
            }
            _ => break,
        }
    }
    Ok(())
}

struct Lines<'a> {
    lines: Vec<&'a str>,
    at: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<&'a str> {
        let line = self.peek()?;
        self.at += 1;
        Some(line)
    }

    fn peek(&self) -> Option<&'a str> {
        self.lines.get(self.at).copied()
    }

    fn take(&mut self, start: &str) -> bool {
        let there = self.peek().is_some_and(|line| line.starts_with(start));
        self.at += usize::from(there);
        there
    }

    /// The lines up to one that begins with one of these.
    fn block(&mut self, ends: &[&str]) -> String {
        let from = self.at;
        while self.peek().is_some_and(|line| !ends.iter().any(|end| line.starts_with(end))) {
            self.at += 1;
        }
        self.lines[from..self.at].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_is_read() {
        let cases = parse(
            "# title\n\n## first\n\n--- file a.service\n# remark\n[Service]\n\n$ fleetctl cat a (on gold-3)\n--- stdin\nyes\n--- stdout\n\
             # of the file\n\nb\n--- exit 3\ntime: 0.1 s\n\n--- setup\nrm a\n$ curl x\n--- response\nHTTP/1.1 200 OK\n\n{}\n\
             --- (no newline at the end of response)\n\n$ sleep 9\n--- still running after 4 s, killed\n",
        )
        .unwrap();
        assert_eq!(cases.len(), 3);
        assert_eq!(
            cases[0].before,
            [Step::File { name: "a.service".into(), text: "# remark\n[Service]\n".into() }]
        );
        assert_eq!((cases[0].command.as_str(), cases[0].place), ("fleetctl cat a", Place::Machine(2)));
        assert_eq!(cases[0].stdin, "yes");
        assert_eq!(cases[0].recorded.stdout, "# of the file\n\nb");
        assert_eq!(cases[0].recorded.exit, Exit::Code(3));
        assert_eq!(cases[1].before, [Step::Setup { place: Place::Machine(0), script: "rm a".into() }]);
        assert_eq!(cases[1].recorded.stdout, "HTTP/1.1 200 OK\n\n{}");
        assert_eq!(cases[2].recorded.exit, Exit::Running(4));
        assert!(parse("rubbish\n").is_err());
    }
}
