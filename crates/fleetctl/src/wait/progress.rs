//! The line on stderr that says what a command waits for. On a terminal it is refreshed and goes
//! away; elsewhere it is said once for each thing that will not come by itself.
use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};

/// The columns where the terminal does not tell how wide it is.
const USUAL_WIDTH: usize = 80;

/// The line.
pub(crate) struct Progress {
    terminal: bool,
    shown: String,
    told: BTreeSet<String>,
}

impl Progress {
    /// Nothing is shown yet.
    pub(crate) fn new() -> Self {
        Progress { terminal: std::io::stderr().is_terminal(), shown: String::new(), told: BTreeSet::new() }
    }

    /// Shows this line in place of the one before. `lasting` tells that it is worth a line in a log.
    pub(crate) fn show(&mut self, line: &str, lasting: bool) {
        if !self.terminal {
            if lasting && self.told.insert(line.to_owned()) && self.told.len() == 1 {
                eprintln!("{line}");
            }
            return;
        }
        let columns = rustix::termios::tcgetwinsize(std::io::stderr())
            .map(|size| usize::from(size.ws_col))
            .ok()
            .filter(|&columns| columns > 0)
            .unwrap_or(USUAL_WIDTH);
        let line = shorten(line, columns.saturating_sub(1));
        if line != self.shown {
            self.write(&format!("\r\x1b[K{line}"));
            self.shown = line;
        }
    }

    /// Takes the line away, so that others can be printed.
    pub(crate) fn clear(&mut self) {
        if !self.shown.is_empty() {
            self.shown.clear();
            self.write("\r\x1b[K");
        }
    }

    fn write(&self, text: &str) {
        // A terminal that is gone has nobody to tell.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// At most so many characters, none of which steers the terminal.
fn shorten(line: &str, columns: usize) -> String {
    let clean = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    if line.chars().count() <= columns {
        return clean.collect();
    }
    let mut short: String = clean.take(columns.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_the_terminal() {
        assert_eq!(shorten("abc\x1b[2J", 20), "abc [2J");
        assert_eq!(shorten("abcdef", 6), "abcdef");
        assert_eq!(shorten("abcdef", 4), "abc…");
    }
}
