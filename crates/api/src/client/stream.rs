//! Answers that do not end by themselves: the event stream and a followed journal.
use super::Error;
use super::call::{Target, broke_off};
use super::transport::Connection;
use crate::events::Event;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::sync::{Arc, atomic::AtomicU64, atomic::Ordering};
use std::{collections::VecDeque, time::Duration};

/// How long an event stream may be silent: the server sends a comment every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

/// The longest event, bytes: a Global unit on ten thousand machines stays well below.
const LONGEST_EVENT: usize = 16 << 20;

/// The body of an answer, piece by piece.
pub(super) struct Pieces {
    body: Incoming,
    target: Target,
    /// From the head of the answer, or its trailer.
    exit_code: Option<i32>,
    /// Carries the body: has to live as long.
    _connection: Connection,
}

impl Pieces {
    pub(super) fn new(
        body: Incoming,
        target: Target,
        exit_code: Option<i32>,
        connection: Connection,
    ) -> Self {
        Pieces { body, target, exit_code, _connection: connection }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| self.target.no_answer(format!("connection lost: {error}")))?;
            match frame.into_data() {
                Ok(data) => return Ok(Some(data)),
                Err(frame) => {
                    if let Some(code) = frame.trailers_ref().and_then(super::exit_code) {
                        self.exit_code = Some(code);
                    }
                    if let Some(message) = frame.trailers_ref().and_then(broke_off) {
                        return Err(Error::Refused { code: 503, message, exit_code: self.exit_code });
                    }
                }
            }
        }
        Ok(None)
    }
}

/// The journal of a unit, as it comes.
pub struct JournalStream(pub(super) Pieces);

impl JournalStream {
    /// The next piece; `None` at the end. An error if it broke off: the machine or the server is gone, or journalctl failed.
    /// Safe to cancel.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let piece = self.0.next().await?;
        if piece.is_none() && self.0.exit_code.is_none() {
            return Err(self.0.target.no_answer("the server has ended it".to_owned()));
        }
        Ok(piece)
    }

    /// The error that it is when nothing comes for so long.
    pub fn silent(&self, time: Duration) -> Error {
        self.0.target.no_answer(format!("nothing came for {} s", time.as_secs()))
    }

    /// The error that it is when what comes makes no sense.
    pub fn malformed(&self, reason: String) -> Error {
        self.0.target.malformed(reason)
    }

    /// The exit code of journalctl, known at the latest after the end.
    pub fn exit_code(&self) -> Option<i32> {
        self.0.exit_code
    }
}

/// What happens in the cluster, as it happens.
pub struct EventStream {
    pieces: Pieces,
    parser: Parser,
    /// The newest revision that the client was told of.
    known: Arc<AtomicU64>,
}

impl EventStream {
    pub(super) fn new(pieces: Pieces, known: Arc<AtomicU64>) -> Self {
        EventStream { pieces, parser: Parser::default(), known }
    }

    /// The next event with its ID (the revision to go on from); `None` when the server ended the
    /// stream. An error when nothing came for 45 s, not even a heartbeat. Safe to cancel.
    pub async fn next(&mut self) -> Result<Option<(String, Event)>, Error> {
        loop {
            while let Some(message) = self.parser.take() {
                self.known.fetch_max(message.id.parse().unwrap_or(0), Ordering::Relaxed);
                match serde_json::from_str(&message.data) {
                    Ok(event) => return Ok(Some((message.id, event))),
                    // A newer server may tell of things that this client does not know.
                    Err(_) if !KINDS.contains(&message.kind.as_str()) => {}
                    Err(error) => return Err(self.malformed(format!("event {:?}: {error}", message.kind))),
                }
            }
            match tokio::time::timeout(SILENCE, self.pieces.next()).await {
                Err(_) => {
                    let reason = format!("nothing came for {} s", SILENCE.as_secs());
                    return Err(self.pieces.target.no_answer(reason));
                }
                Ok(piece) => match piece? {
                    None => return Ok(None),
                    Some(bytes) => self.parser.push(&bytes).map_err(|reason| self.malformed(reason))?,
                },
            }
        }
    }

    fn malformed(&self, reason: String) -> Error {
        self.pieces.target.malformed(reason)
    }
}

/// The kinds of [`Event`], as its `kind` and the `event:` field have them.
const KINDS: [&str; 8] =
    ["unit", "unitGone", "machine", "machineGone", "notice", "noticeGone", "ready", "reset"];

/// One message of a stream of server-sent events.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Message {
    id: String,
    kind: String,
    data: String,
}

/// Reads server-sent events (WHATWG HTML, section 9.2.6) from pieces of any size.
#[derive(Default)]
struct Parser {
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// The ID stays until another comes.
    id: String,
    kind: String,
    data: String,
    ready: VecDeque<Message>,
}

impl Parser {
    fn take(&mut self) -> Option<Message> {
        self.ready.pop_front()
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while let Some(end) = bytes.iter().position(|&b| b == b'\n') {
            self.line.extend_from_slice(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.line(line.strip_suffix(b"\r").unwrap_or(&line))?;
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() + self.data.len() > LONGEST_EVENT {
            return Err(format!("an event is longer than {} MiB", LONGEST_EVENT >> 20));
        }
        Ok(())
    }

    fn line(&mut self, line: &[u8]) -> Result<(), String> {
        let line = std::str::from_utf8(line).map_err(|_| "an event is not UTF-8".to_owned())?;
        if line.is_empty() {
            let kind = std::mem::take(&mut self.kind);
            let data = std::mem::take(&mut self.data);
            if !data.is_empty() {
                self.ready.push_back(Message { id: self.id.clone(), kind, data });
            }
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.id = value.to_owned(),
            "event" => self.kind = value.to_owned(),
            "data" => {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            // Comments (an empty field name), `retry`, and what is not known.
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = ": heartbeat\n\nid: 7\nevent: machineGone\ndata: {\"kind\":\"machineGone\",\
                          \"id\":\"a\"}\n\nid: 8\r\nevent: ready\r\ndata: {\"kind\":\r\ndata: \"ready\"}\r\n\r\nid: 9\n";

    fn messages(pieces: &[&[u8]]) -> Vec<Message> {
        let mut parser = Parser::default();
        for piece in pieces {
            parser.push(piece).unwrap();
        }
        std::iter::from_fn(|| parser.take()).collect()
    }

    #[test]
    fn messages_are_read_however_they_are_cut() {
        let whole = messages(&[STREAM.as_bytes()]);
        assert_eq!(
            whole,
            [
                Message {
                    id: "7".into(),
                    kind: "machineGone".into(),
                    data: r#"{"kind":"machineGone","id":"a"}"#.into()
                },
                Message { id: "8".into(), kind: "ready".into(), data: "{\"kind\":\n\"ready\"}".into() },
            ]
        );
        for size in 1..20 {
            let pieces: Vec<_> = STREAM.as_bytes().chunks(size).collect();
            assert_eq!(messages(&pieces), whole, "pieces of {size}");
        }
    }

    #[test]
    fn endless_lines_and_rubbish_are_refused() {
        let mut parser = Parser::default();
        let piece = vec![b'x'; 1 << 20];
        assert!((0..20).any(|_| parser.push(&piece).is_err()));
        assert!(Parser::default().push(b"data: \xff\n").is_err());
    }

    #[test]
    fn the_kinds_are_those_of_events() {
        let events = [
            Event::Unit(Default::default()),
            Event::UnitGone { name: String::new() },
            Event::Machine(Default::default()),
            Event::MachineGone { id: String::new() },
            Event::Notice(Default::default()),
            Event::NoticeGone { id: String::new() },
            Event::Ready,
            Event::Reset,
        ];
        let kinds =
            events.map(|event| serde_json::to_value(event).unwrap()["kind"].as_str().unwrap().to_owned());
        assert_eq!(kinds, KINDS);
    }
}
