//! The log of fleetd: to the journal when systemd started it, else as lines on standard error.
//!
//! Both show the same text: the message, then `key=value` of the event and of the spans around it, nearest first.
//! In the journal each value is a field too, so that `journalctl FLEET_UNIT=hello.service` finds everything about
//! a unit; FLEET_ is put before the names because plain UNIT and the like belong to systemd
//! (systemd.journal-fields(7)). tracing-journald was not taken: it leaves the values out of the message, so that
//! plain `journalctl` would not say which unit a message is about.
use crate::config::Environment;
use std::{
    fmt::{self, Write as _},
    io::{self, IsTerminal, Write as _},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{
    EnvFilter, Registry,
    layer::{Context, Layer, SubscriberExt},
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

/// A filter in tracing's form (`debug`, `info,fleet_cluster=trace`) that is used instead of the verbosity.
pub const FILTER_VARIABLE: &str = "FLEET_LOG";

/// Where journald takes messages, systemd-journald.service(8).
const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
/// Longer messages are cut, in bytes; a datagram must hold all of one.
const MAX_MESSAGE: usize = 16 << 10;
/// Longer values are cut, in bytes.
const MAX_VALUE: usize = 2 << 10;
/// The crates whose debugging messages `verbosity=1` shows.
const OURS: [&str; 7] =
    ["fleetd", "fleet_unit", "fleet_cluster", "fleet_registry", "fleet_api", "fleet_link", "fleet_systemd"];

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The variable holds no filter.
    #[error("{FILTER_VARIABLE}: {0:?} is no filter; use error, warn, info, debug or trace")]
    Filter(String),
    /// It was started before.
    #[error("logging was started already")]
    Started,
}

/// Changes the log while fleetd runs.
#[derive(Clone, Debug)]
pub struct Control {
    filter: reload::Handle<EnvFilter, Registry>,
    fixed: bool,
}

impl Control {
    /// Takes a new verbosity, unless the environment has set a filter.
    pub fn set_verbosity(&self, verbosity: u8) {
        if !self.fixed {
            // It fails only when the subscriber is gone, and then nobody reads the log.
            let _ = self.filter.reload(EnvFilter::new(directives(verbosity)));
        }
    }
}

/// Starts the log of this process.
pub fn start(verbosity: u8, environment: &Environment) -> Result<Control, LoggingError> {
    let (filter, fixed) = match environment.get(FILTER_VARIABLE).filter(|text| !text.is_empty()) {
        Some(text) => (EnvFilter::try_new(text).map_err(|_| LoggingError::Filter(text.clone()))?, true),
        None => (EnvFilter::new(directives(verbosity)), false),
    };
    let stderr = io::stderr();
    let stream = rustix::fs::fstat(&stderr).ok().map(|stat| (stat.st_dev, stat.st_ino));
    let output = if stream.is_some_and(|stream| is_journal(environment, stream)) {
        Journal::connect(Path::new(JOURNAL_SOCKET))
            .map(Output::Journal)
            .unwrap_or(Output::Lines { color: false })
    } else {
        Output::Lines { color: color(environment, stderr.is_terminal()) }
    };
    let (filter, handle) = reload::Layer::new(filter);
    let subscriber = tracing_subscriber::registry().with(filter).with(Log { output });
    subscriber.try_init().map_err(|_| LoggingError::Started)?;
    Ok(Control { filter: handle, fixed })
}

/// What a verbosity shows.
fn directives(verbosity: u8) -> String {
    let ours = |level: &str| OURS.map(|name| format!(",{name}={level}")).concat();
    match verbosity {
        0 => format!("warn{}", ours("info")),
        1 => format!("info{}", ours("debug")),
        _ => "debug".to_owned(),
    }
}

/// Whether a stream, by device and inode, is the one to the journal that systemd made for us: JOURNAL_STREAM of
/// systemd.exec(5). A shell below us may have put standard error elsewhere.
fn is_journal(environment: &Environment, (device, inode): (u64, u64)) -> bool {
    environment.get("JOURNAL_STREAM").is_some_and(|text| *text == format!("{device}:{inode}"))
}

/// Colours only where somebody looks at them and has not asked for none (no-color.org).
fn color(environment: &Environment, terminal: bool) -> bool {
    terminal && environment.get("NO_COLOR").is_none_or(String::is_empty)
}

/// Values in their order, each with its name.
#[derive(Default)]
struct Values {
    message: String,
    named: Vec<(&'static str, String)>,
}

impl Values {
    fn add(&mut self, field: &Field, value: String) {
        let value = cut(value, MAX_VALUE);
        match field.name() {
            "message" => self.message = value,
            name => match self.named.iter_mut().find(|(known, _)| *known == name) {
                Some((_, old)) => *old = value,
                None => self.named.push((name, value)),
            },
        }
    }
}

impl Visit for Values {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }
}

/// Shortens a text to so many bytes, and shows that it did.
fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let end = (0..=max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// The message and all values on one line, without anything that a terminal would act on.
fn line(values: &Values) -> String {
    let mut text = String::new();
    escape(&mut text, &values.message);
    for (name, value) in &values.named {
        text.push(' ');
        text.push_str(name);
        text.push('=');
        if value.is_empty() || value.contains(|c: char| c.is_whitespace() || c == '"' || c.is_control()) {
            let _ = write!(text, "{value:?}");
        } else {
            text.push_str(value);
        }
    }
    cut(text, MAX_MESSAGE)
}

fn escape(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() && c != '\t' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

/// Makes text of events and hands it to an output.
struct Log {
    output: Output,
}

enum Output {
    Journal(Journal),
    Lines { color: bool },
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        let mut values = Values::default();
        attributes.record(&mut values);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(values);
        }
    }

    fn on_record(&self, id: &span::Id, record: &span::Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(values) = span.extensions_mut().get_mut::<Values>()
        {
            record.record(values);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut values = Values::default();
        event.record(&mut values);
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(outer) = span.extensions().get::<Values>() {
                for (name, value) in &outer.named {
                    if !values.named.iter().any(|(known, _)| known == name) {
                        values.named.push((name, value.clone()));
                    }
                }
            }
        }
        let level = *event.metadata().level();
        match &self.output {
            Output::Journal(journal) => journal.send(level, event.metadata().target(), &values),
            Output::Lines { color } => {
                // Nobody is left to be told when standard error is gone.
                let _ = io::stderr().lock().write_all(stderr_line(level, *color, &values).as_bytes());
            }
        }
    }
}

/// `INFO message key=value`, as the original's lines began.
fn stderr_line(level: Level, color: bool, values: &Values) -> String {
    let text = line(values);
    if !color {
        return format!("{level} {text}\n");
    }
    let code = match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        _ => 2,
    };
    format!("\x1b[{code}m{level}\x1b[0m {text}\n")
}

/// journald's own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL).
struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    /// Messages that journald did not take since the last that it did.
    lost: AtomicU64,
}

impl Journal {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        // A journald that hangs must not hang us: rather lose messages, and say so.
        socket.set_write_timeout(Some(Duration::from_millis(100)))?;
        Ok(Journal { socket, path: path.to_owned(), lost: AtomicU64::new(0) })
    }

    fn send(&self, level: Level, target: &str, values: &Values) {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            let message = format!("{lost} messages were lost because journald did not take them");
            let notice = Values { message, named: Vec::new() };
            if self.socket.send(&datagram(Level::WARN, "fleetd", &notice)).is_ok() {
                self.lost.fetch_sub(lost, Ordering::Relaxed);
            }
        }
        if self.socket.send(&datagram(level, target, values)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
            // journald may have been restarted: its socket is another one then.
            let _ = self.socket.connect(&self.path);
        }
    }
}

/// One message. Error is 3, warning 4, information 6 and debugging 7, as syslog(3) numbers them.
fn datagram(level: Level, target: &str, values: &Values) -> Vec<u8> {
    let priority = match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    };
    let mut out = Vec::new();
    put(&mut out, "PRIORITY", priority);
    put(&mut out, "SYSLOG_IDENTIFIER", "fleetd");
    put(&mut out, "TARGET", target);
    put(&mut out, "MESSAGE", &line(values));
    for (name, value) in &values.named {
        put(&mut out, &field_name(name), value);
        if out.len() > 3 * MAX_MESSAGE {
            break;
        }
    }
    out
}

/// journald takes names of capitals, digits and underscores, at most 64 bytes.
fn field_name(name: &str) -> String {
    let upper = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    "FLEET_".chars().chain(upper).take(64).collect()
}

fn put(out: &mut Vec<u8>, name: &str, value: &str) {
    out.extend(name.as_bytes());
    if value.contains('\n') {
        out.push(b'\n');
        out.extend((value.len() as u64).to_le_bytes());
    } else {
        out.push(b'=');
    }
    out.extend(value.as_bytes());
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::subscriber::with_default;

    /// What arrives at a journald, for what is logged in `body`, as text.
    fn journal(body: impl FnOnce()) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let server = UnixDatagram::bind(&path).unwrap();
        let output = Output::Journal(Journal::connect(&path).unwrap());
        with_default(tracing_subscriber::registry().with(Log { output }), body);
        server.set_nonblocking(true).unwrap();
        let mut buffer = vec![0; 1 << 20];
        let mut got = Vec::new();
        while let Ok(length) = server.recv(&mut buffer) {
            got.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        got
    }

    #[test]
    fn the_journal_gets_a_readable_message_and_fields() {
        let got = journal(|| {
            let span =
                tracing::info_span!("start", machine = "4a1e", unit = "outer", job = tracing::field::Empty);
            let _entered = span.enter();
            span.record("job", 7);
            tracing::warn!(unit = %"hello.service", reason = "not found", "can't start");
            tracing::debug!("two\nlines");
        });
        assert_eq!(
            got,
            [
                "PRIORITY=4\nSYSLOG_IDENTIFIER=fleetd\nTARGET=fleetd::logging::tests\n\
                 MESSAGE=can't start unit=hello.service reason=\"not found\" machine=4a1e job=7\n\
                 FLEET_UNIT=hello.service\nFLEET_REASON=not found\nFLEET_MACHINE=4a1e\nFLEET_JOB=7\n",
                "PRIORITY=7\nSYSLOG_IDENTIFIER=fleetd\nTARGET=fleetd::logging::tests\n\
                 MESSAGE=two\\nlines machine=4a1e unit=outer job=7\n\
                 FLEET_MACHINE=4a1e\nFLEET_UNIT=outer\nFLEET_JOB=7\n",
            ]
        );
    }

    #[test]
    fn a_value_of_several_lines_cannot_forge_a_field() {
        let got = journal(|| tracing::info!(reason = "a\nPRIORITY=0", "x"));
        assert!(got[0].contains("MESSAGE=x reason=\"a\\nPRIORITY=0\"\n"), "{}", got[0]);
        let length = "a\nPRIORITY=0".len() as u8;
        let encoded = format!("FLEET_REASON\n{}\0\0\0\0\0\0\0a\nPRIORITY=0\n", char::from(length));
        assert!(got[0].ends_with(&encoded), "{:?}", got[0]);
    }

    #[test]
    fn long_messages_are_cut_so_that_they_arrive() {
        let long = "ä".repeat(1 << 20);
        let got = journal(|| {
            tracing::info!(a = %long, b = %long, "{long}");
        });
        assert_eq!(got.len(), 1);
        assert!(got[0].len() < 4 * MAX_MESSAGE);
    }

    #[test]
    fn lost_messages_are_counted() {
        let (socket, other) = UnixDatagram::pair().unwrap();
        drop(other);
        let journal = Journal { socket, path: "/nowhere".into(), lost: AtomicU64::new(0) };
        journal.send(Level::INFO, "x", &Values::default());
        assert_eq!(journal.lost.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn lines_on_standard_error() {
        let values = Values {
            message: "placed\x1b[31m".into(),
            named: vec![("unit", "a.service".into()), ("empty", String::new())],
        };
        assert_eq!(
            stderr_line(Level::INFO, false, &values),
            "INFO placed\\u{1b}[31m unit=a.service empty=\"\"\n"
        );
        assert_eq!(
            stderr_line(Level::ERROR, true, &Values { message: "no".into(), named: vec![] }),
            "\x1b[31mERROR\x1b[0m no\n"
        );
    }

    #[test]
    fn where_the_log_goes() {
        let environment = |pairs: &[(&str, &str)]| -> Environment {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        assert!(is_journal(&environment(&[("JOURNAL_STREAM", "9:1234")]), (9, 1234)));
        assert!(!is_journal(&environment(&[("JOURNAL_STREAM", "9:1234")]), (9, 1235)));
        assert!(!is_journal(&environment(&[]), (9, 1234)));
        assert!(color(&environment(&[("NO_COLOR", "")]), true));
        assert!(!color(&environment(&[("NO_COLOR", "1")]), true));
        assert!(!color(&environment(&[]), false));
    }

    #[test]
    fn verbosities_and_filters() {
        for verbosity in [0, 1, 2, 255] {
            EnvFilter::try_new(directives(verbosity)).unwrap();
        }
        let shows = |verbosity: u8, level: &str, target: &str| {
            let text = directives(verbosity);
            let own = text.split(',').find_map(|part| part.strip_prefix(&format!("{target}=")));
            own.unwrap_or(text.split(',').next().unwrap()) == level
        };
        assert!(shows(0, "info", "fleetd") && shows(0, "warn", "zbus"));
        assert!(shows(1, "debug", "fleet_cluster") && shows(1, "info", "zbus"));
        assert!(shows(2, "debug", "zbus"));
        let bad = [(FILTER_VARIABLE.to_owned(), "fleetd=loud".to_owned())].into();
        assert!(
            start(0, &bad).unwrap_err().to_string().starts_with("FLEET_LOG: \"fleetd=loud\" is no filter")
        );
    }
}
