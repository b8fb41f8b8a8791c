//! What systemd would certainly refuse, whatever the machine, so that it can be said when a unit is
//! submitted instead of when a machine has it.
//!
//! The rules are those of systemd 252 for services (`config_parse_exec()` and `service_verify()`) that
//! later versions still have; the texts are systemd's. Where this reading is not certain (quotes,
//! escapes, specifiers, values that a later systemd may know) nothing is refused: systemd has the
//! last word on the machine.
//!
//! The text is read here as systemd reads it, which is not in every point how fleet reads options
//! (see [`crate::file`]).
use crate::{UnitFile, UnitName, UnitType};

/// One reason for which systemd would not load a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The line of the mistake, from 1; 0 when it is something missing.
    pub line: usize,
    /// systemd's text.
    pub reason: String,
}

/// All reasons for which systemd (252 and newer) would refuse this file.
pub fn rejections(name: &UnitName, file: &UnitFile) -> Vec<Rejection> {
    match name.kind() {
        UnitType::Service => service(file.text()),
        _ => Vec::new(),
    }
}

fn service(text: &str) -> Vec<Rejection> {
    let mut rejections = Vec::new();
    let mut service = Service::default();
    for assignment in assignments(text) {
        if let Err(rejection) = service.assign(&assignment) {
            rejections.push(rejection);
        }
    }
    // systemd verifies the whole only when it could read every line.
    if rejections.is_empty() {
        rejections.extend(service.verify());
    }
    rejections
}

/// What is known of a setting after all its assignments.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Known<T> {
    /// Never assigned.
    #[default]
    Default,
    Is(T),
    /// Assigned, but systemd's reading of it is not certain.
    Maybe,
}

/// The settings of a service that `service_verify()` looks at.
#[derive(Default)]
struct Service {
    /// Lines of the commands of `ExecStart=`, and for each whether systemd surely takes it.
    start: Vec<(usize, bool)>,
    has_stop: bool,
    has_success_action: bool,
    kind: Known<(&'static str, usize)>,
    restart: Known<(&'static str, usize)>,
    remain_after_exit: bool,
    has_bus_name: bool,
}

impl Service {
    fn assign(&mut self, assignment: &Assignment) -> Result<(), Rejection> {
        const TYPES: [&str; 7] = ["simple", "exec", "forking", "oneshot", "dbus", "notify", "idle"];
        const RESTARTS: [&str; 7] =
            ["no", "on-success", "on-failure", "on-abnormal", "on-watchdog", "on-abort", "always"];
        let Assignment { section, name, value, line } = assignment;
        let (line, set) = (*line, !value.is_empty());
        match (section.as_str(), name.as_str()) {
            // SuccessAction= belongs to [Unit]; that it is anywhere is enough to be careful.
            (_, "SuccessAction") => self.has_success_action |= set,
            ("Service", "ExecStart") if !set => self.start.clear(),
            ("Service", "ExecStart") => self.start.push((line, command(value, line)?)),
            ("Service", "ExecStop") => {
                self.has_stop = set;
                command(value, line)?;
            }
            (
                "Service",
                "ExecCondition" | "ExecStartPre" | "ExecStartPost" | "ExecReload" | "ExecStopPost",
            ) => {
                command(value, line)?;
            }
            ("Service", "Type") => self.kind = one_of(&TYPES, value, line),
            ("Service", "Restart") => self.restart = one_of(&RESTARTS, value, line),
            ("Service", "RemainAfterExit") => {
                const FALSE: [&str; 6] = ["0", "no", "n", "false", "f", "off"];
                self.remain_after_exit = !FALSE.iter().any(|f| value.eq_ignore_ascii_case(f));
            }
            ("Service", "BusName") => self.has_bus_name = set,
            _ => {}
        }
        Ok(())
    }

    /// The checks in systemd's order; like systemd it stops at the first that fails.
    fn verify(&self) -> Option<Rejection> {
        let reject =
            |line, reason: &str| Some(Rejection { line, reason: format!("Service has {reason}. Refusing.") });
        let no_start = self.start.is_empty();
        let (kind, kind_line) = match self.kind {
            Known::Is((kind, line)) => (Some(kind), line),
            Known::Maybe => (None, 0),
            // Chosen by systemd from the other settings.
            Known::Default if self.has_bus_name => (Some("dbus"), 0),
            Known::Default if no_start => (Some("oneshot"), 0),
            Known::Default => (Some("simple"), 0),
        };
        let is_other_than_oneshot = kind.is_some_and(|kind| kind != "oneshot");

        if no_start && !self.has_stop && !self.has_success_action {
            return reject(0, "no ExecStart=, ExecStop=, or SuccessAction=");
        }
        if no_start && is_other_than_oneshot {
            return reject(
                kind_line,
                "no ExecStart= setting, which is only allowed for Type=oneshot services",
            );
        }
        if no_start && !self.has_success_action && !self.remain_after_exit {
            return reject(
                0,
                "no ExecStart= and no SuccessAction= settings and does not have \
                 RemainAfterExit=yes set",
            );
        }
        let mut certain = self.start.iter().filter(|(_, certain)| *certain);
        if let (true, Some(_), Some(&(line, _))) = (is_other_than_oneshot, certain.next(), certain.next()) {
            return reject(
                line,
                "more than one ExecStart= setting, which is only allowed for Type=oneshot services",
            );
        }
        if let (Some("oneshot"), Known::Is(("always" | "on-success", line))) = (kind, self.restart) {
            return reject(
                line,
                "Restart= set to either always or on-success, which isn't allowed for \
                 Type=oneshot services",
            );
        }
        if kind == Some("dbus") && !self.has_bus_name {
            return Some(Rejection {
                line: kind_line,
                reason: "Service is of type D-Bus but no D-Bus service name has been specified. \
                         Refusing."
                    .to_owned(),
            });
        }
        None
    }
}

/// An enumerated setting. systemd warns of a value that it does not know and keeps the one before;
/// which ones it knows depends on its version.
fn one_of(known: &[&'static str], value: &str, line: usize) -> Known<(&'static str, usize)> {
    match known.iter().find(|k| **k == value) {
        Some(value) => Known::Is((value, line)),
        None => Known::Maybe,
    }
}

/// Looks at the first word of a command line: whether systemd surely makes a command of it.
fn command(value: &str, line: usize) -> Result<bool, Rejection> {
    let Some(word) = value.split_ascii_whitespace().next() else { return Ok(false) };
    // Later versions may know more prefixes than 252's, so any other sign is left to systemd.
    let path = word.trim_start_matches(['-', '@', ':', '+', '!']);
    let prefixes = &word[..word.len() - path.len()];
    let ignore_failure = prefixes.contains('-');
    if path.starts_with(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '/' | '.' | '_' | '$'))
        || path.contains(['"', '\'', '\\', '%'])
    {
        return Ok(false);
    }
    let reason = if path.is_empty() {
        format!("Empty path in command line: '{value}'")
    } else if path.ends_with('/') {
        format!("Executable path specifies a directory: {path}")
    } else if !path.starts_with('/') && (path.contains('/') || matches!(path, "." | "..")) {
        format!("Neither a valid executable name nor an absolute path: {path}")
    } else {
        // What else may be wrong (an open quote, an unknown specifier, a prefix twice) makes systemd
        // refuse the unit, but with `-` only the line.
        let plain = prefixes == "-" && !value.contains(['"', '\'', '\\', '%']);
        return Ok(!ignore_failure || plain);
    };
    // With `-` the line is ignored with a warning.
    if ignore_failure { Ok(false) } else { Err(Rejection { line, reason }) }
}

/// `Name=Value` as systemd reads it, on one line.
struct Assignment {
    section: String,
    name: String,
    value: String,
    line: usize,
}

/// All assignments in sections, as systemd's `config_parse()` finds them: comment lines are skipped
/// wherever they stand, and an odd number of backslashes at the very end of a line continues it.
fn assignments(text: &str) -> Vec<Assignment> {
    let mut found = Vec::new();
    let mut section = None;
    // The lines read so far of one that continues, and where the first of them is.
    let mut continued: Option<(String, usize)> = None;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (index, physical) in text.split('\n').enumerate() {
        for line in physical.strip_suffix('\r').unwrap_or(physical).split('\r') {
            let line = line.trim_start_matches(WHITESPACE);
            if line.starts_with(['#', ';']) {
                continue;
            }
            let backslashes = line.len() - line.trim_end_matches('\\').len();
            if backslashes % 2 == 1 {
                let (text, _) = continued.get_or_insert((String::new(), index + 1));
                text.extend([&line[..line.len() - 1], " "]);
                continue;
            }
            match continued.take() {
                Some((text, at)) => logical_line(&(text + line), at, &mut section, &mut found),
                None => logical_line(line, index + 1, &mut section, &mut found),
            }
        }
    }
    if let Some((text, at)) = continued {
        logical_line(&text, at, &mut section, &mut found);
    }
    found
}

/// A section header changes the section, an assignment within a section is added.
fn logical_line(line: &str, at: usize, section: &mut Option<String>, found: &mut Vec<Assignment>) {
    let line = line.trim_matches(WHITESPACE);
    if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        *section = Some(name.to_owned());
        return;
    }
    let (Some(section), Some((name, value))) = (section, line.split_once('=')) else { return };
    found.push(Assignment {
        section: section.clone(),
        name: name.trim_matches(WHITESPACE).to_owned(),
        value: value.trim_matches(WHITESPACE).to_owned(),
        line: at,
    });
}

const WHITESPACE: [char; 4] = [' ', '\t', '\n', '\r'];

#[cfg(test)]
#[path = "lint_tests.rs"]
mod tests;
