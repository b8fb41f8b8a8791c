//! The messages of the protocol, and what they have to look like.
//!
//! `generated` is made of proto/link.proto and says how bytes become fields; here fields become the types of the
//! crate, or an error that names the field. What was decoded is valid: names are names, texts are short and without control
//! characters that could harm a terminal, and no answer is longer than [`MAX_PIECE`]. Encoding shortens texts that would
//! be refused, so that an odd error message on a machine does not end its session.
//!
//! Versions: peers tell each other the protocol numbers they speak and use the highest both know ([`agree`]). A number more
//! is needed for what an older peer would misunderstand; fields it may ignore need none.

use crate::pending::Part;
use crate::{Ask, Chunk, Hello, Instruction, dial::Address};
use fleet_cluster::model::{DesiredState, Machine, MachineId, SystemdState, UnitReport, Wanted};
use fleet_unit::{Hash, UnitFile, UnitName};
use std::{fmt, time::Duration};

mod codec;
pub(crate) mod peer;
#[rustfmt::skip]
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub(crate) mod generated;
#[cfg(test)]
mod tests;

use generated as pb;

/// The newest protocol number this version of fleet speaks. 2: servers tell where all of them are; 3: agents say when
/// nothing of a unit runs any more.
pub const NEWEST_PROTOCOL: u32 = 3;
/// The oldest protocol number this version of fleet speaks: that of the version before.
pub const OLDEST_PROTOCOL: u32 = 1;

/// The largest message an agent sends, bytes.
pub(crate) const MAX_UP: usize = 256 << 10;
/// The largest message a server sends, bytes: a part of a snapshot and one unit file of the largest size more.
pub(crate) const MAX_DOWN: usize = PART_DOWN + MAX_FILE + (64 << 10);
/// How large a part of units or reports is to be, bytes.
pub(crate) const PART_UP: usize = 64 << 10;
pub(crate) const PART_DOWN: usize = 256 << 10;
/// The largest piece of an answer, bytes.
pub(crate) const MAX_PIECE: usize = 16 << 10;
/// The most units in one message of units that were released.
pub(crate) const MOST_RELEASED: usize = 500;
/// The most units on one machine.
pub(crate) const MAX_UNITS: usize = 50_000;

/// The largest unit file, bytes.
const MAX_FILE: usize = fleet_unit::file::MAX_SIZE;
const MAX_TEXT: usize = 4096;
const MAX_WORD: usize = 64;
const MAX_ADDRESS: usize = 255;
const MAX_METADATA: usize = 1024;
const MAX_SERVERS: usize = 1024;

/// A message that a peer of this version does not send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub(crate) struct WireError {
    /// Which field.
    field: String,
    problem: String,
}

fn wrong<T>(field: impl Into<String>, problem: impl fmt::Display) -> Result<T, WireError> {
    Err(WireError { field: field.into(), problem: problem.to_string() })
}

/// The protocol number to use with a peer that speaks `oldest` to `newest`.
pub(crate) fn agree(oldest: u32, newest: u32) -> Result<u32, String> {
    let common = newest.min(NEWEST_PROTOCOL);
    if common >= oldest.max(OLDEST_PROTOCOL) {
        return Ok(common);
    }
    Err(format!(
        "it speaks the session protocol {oldest} to {newest}, we speak {OLDEST_PROTOCOL} to {NEWEST_PROTOCOL}: \
         versions of fleet may differ by one at most"
    ))
}

/// What an agent sends.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Up {
    Hello {
        hello: Hello,
        oldest: u32,
        newest: u32,
    },
    Reports(Part<UnitReport>),
    /// At most [`MOST_RELEASED`].
    Released(Vec<(UnitName, u64)>),
    Beat {
        number: u64,
        leaving: bool,
    },
    /// A piece of the answer to a request; `None`: it was cut off.
    Answer {
        number: u64,
        piece: Option<Chunk>,
    },
    Probed(u64),
}

/// What a server sends.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Down {
    Welcome {
        protocol: u32,
    },
    Units(Part<Instruction>),
    Held {
        number: u64,
        ttl: Duration,
    },
    Request {
        number: u64,
        credit: u32,
        ask: Ask,
    },
    Credit {
        number: u64,
        pieces: u32,
    },
    Cancel(u64),
    Probe(u64),
    /// Only from protocol 2 on.
    Servers(Vec<Address>),
}

impl Up {
    pub(crate) fn encode(self) -> pb::FromAgent {
        use pb::from_agent::Body;
        let body = match self {
            Up::Hello { hello, oldest, newest } => Body::Hello(pb::Hello {
                oldest,
                newest,
                machine: hello.id.as_str().to_owned(),
                public_ip: hello.machine.public_ip,
                metadata: hello.machine.metadata,
                version: hello.machine.version,
            }),
            Up::Reports(part) => Body::Reports(pb::Reports {
                kind: kind(part.snapshot).into(),
                first: part.first,
                last: part.last,
                entries: part.entries.into_iter().map(report_entry).collect(),
            }),
            Up::Released(units) => {
                let unit = |(name, number): (UnitName, u64)| pb::ReleasedUnit {
                    name: name.as_str().to_owned(),
                    number,
                };
                Body::Released(pb::Released { units: units.into_iter().map(unit).collect() })
            }
            Up::Beat { number, leaving } => Body::Beat(pb::Beat { number, leaving }),
            Up::Answer { number, piece } => {
                Body::Answer(pb::Answer { number, piece: Some(encode_piece(piece)) })
            }
            Up::Probed(number) => Body::Probed(number),
        };
        pb::FromAgent { body: Some(body) }
    }

    pub(crate) fn decode(message: pb::FromAgent) -> Result<Up, WireError> {
        use pb::from_agent::Body;
        Ok(match message.body {
            None => return wrong("body", "of no known kind"),
            Some(Body::Hello(hello)) => decode_hello(hello)?,
            Some(Body::Reports(reports)) => {
                let snapshot = decode_kind("reports.kind", reports.kind)?;
                let mut entries = Vec::with_capacity(reports.entries.len());
                for (index, entry) in reports.entries.into_iter().enumerate() {
                    let field = |name: &str| format!("reports.entries[{index}].{name}");
                    let name = unit(field("name"), &entry.name)?;
                    let report = match entry.report {
                        Some(report) => {
                            Some(decode_report(report, &|name| field(&format!("report.{name}")))?)
                        }
                        None => None,
                    };
                    entries.push((name, report));
                }
                Up::Reports(part(snapshot, reports.first, reports.last, entries))
            }
            Some(Body::Released(released)) => {
                if released.units.len() > MOST_RELEASED {
                    return wrong("released.units", format!("more than {MOST_RELEASED}"));
                }
                let units = released.units.into_iter().enumerate().map(|(index, entry)| {
                    Ok((unit(format!("released.units[{index}].name"), &entry.name)?, entry.number))
                });
                Up::Released(units.collect::<Result<_, _>>()?)
            }
            Some(Body::Beat(beat)) => Up::Beat { number: beat.number, leaving: beat.leaving },
            Some(Body::Answer(answer)) => {
                Up::Answer { number: answer.number, piece: decode_piece(answer.piece)? }
            }
            Some(Body::Probed(number)) => Up::Probed(number),
        })
    }
}

impl Down {
    pub(crate) fn encode(self) -> pb::ToAgent {
        use pb::to_agent::Body;
        let body = match self {
            Down::Welcome { protocol } => Body::Welcome(pb::Welcome { protocol }),
            Down::Units(part) => Body::Units(pb::Units {
                kind: kind(part.snapshot).into(),
                first: part.first,
                last: part.last,
                entries: part
                    .entries
                    .into_iter()
                    .map(|(name, instruction)| {
                        let (wanted, leave, release) = match instruction {
                            None => (None, false, 0),
                            Some(Instruction::Leave) => (None, true, 0),
                            Some(Instruction::Release(number)) => (None, false, number),
                            Some(Instruction::Hold(wanted)) => (Some(wanted), false, 0),
                        };
                        let wanted = wanted.map(|wanted| pb::Wanted {
                            file: wanted.file.text().to_owned(),
                            state: encode_state(wanted.state).into(),
                        });
                        pb::UnitEntry { name: name.as_str().to_owned(), wanted, leave, release }
                    })
                    .collect(),
            }),
            Down::Held { number, ttl } => {
                Body::Held(pb::Held { number, for_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX) })
            }
            Down::Request { number, credit, ask } => {
                Body::Request(pb::Request { number, credit, ask: Some(encode_ask(ask)) })
            }
            Down::Credit { number, pieces } => Body::Credit(pb::Credit { number, pieces }),
            Down::Cancel(number) => Body::Cancel(number),
            Down::Probe(number) => Body::Probe(number),
            Down::Servers(servers) => {
                let addresses = servers.iter().take(MAX_SERVERS).map(ToString::to_string).collect();
                Body::Servers(pb::Servers { addresses })
            }
        };
        pb::ToAgent { body: Some(body) }
    }

    pub(crate) fn decode(message: pb::ToAgent) -> Result<Down, WireError> {
        use pb::to_agent::Body;
        Ok(match message.body {
            None => return wrong("body", "of no known kind"),
            Some(Body::Welcome(welcome)) => {
                if !(OLDEST_PROTOCOL..=NEWEST_PROTOCOL).contains(&welcome.protocol) {
                    return wrong("welcome.protocol", format!("{} is none of ours", welcome.protocol));
                }
                Down::Welcome { protocol: welcome.protocol }
            }
            Some(Body::Units(units)) => {
                let snapshot = decode_kind("units.kind", units.kind)?;
                let mut entries = Vec::with_capacity(units.entries.len());
                for (index, entry) in units.entries.into_iter().enumerate() {
                    let field = |name: &str| format!("units.entries[{index}].{name}");
                    let name = unit(field("name"), &entry.name)?;
                    if entry.release != 0 && (entry.wanted.is_some() || entry.leave) {
                        return wrong(field("release"), "of what is to be held, or left as it is");
                    }
                    let instruction = match entry.wanted {
                        Some(_) if entry.leave => {
                            return wrong(field("leave"), "with a file of what is to be left as it is");
                        }
                        Some(wanted) => Some(Instruction::Hold(Wanted {
                            file: UnitFile::parse(&wanted.file).or_else(|error| {
                                wrong(field("wanted.file"), format!("unit {name}: {error}"))
                            })?,
                            state: match decode_state(field("wanted.state"), wanted.state)? {
                                DesiredState::Inactive => {
                                    return wrong(field("wanted.state"), "inactive units are on no machine");
                                }
                                state => state,
                            },
                        })),
                        None if entry.release != 0 => Some(Instruction::Release(entry.release)),
                        None => entry.leave.then_some(Instruction::Leave),
                    };
                    entries.push((name, instruction));
                }
                Down::Units(part(snapshot, units.first, units.last, entries))
            }
            Some(Body::Held(held)) => {
                Down::Held { number: held.number, ttl: Duration::from_millis(held.for_ms) }
            }
            Some(Body::Request(request)) => Down::Request {
                number: request.number,
                credit: request.credit,
                ask: decode_ask(request.ask)?,
            },
            Some(Body::Credit(credit)) => Down::Credit { number: credit.number, pieces: credit.pieces },
            Some(Body::Cancel(number)) => Down::Cancel(number),
            Some(Body::Probe(number)) => Down::Probe(number),
            Some(Body::Servers(servers)) => {
                if servers.addresses.len() > MAX_SERVERS {
                    return wrong("servers.addresses", format!("more than {MAX_SERVERS}"));
                }
                let parse = |text: &String| text.parse().or_else(|error| wrong("servers.addresses", error));
                Down::Servers(servers.addresses.iter().map(parse).collect::<Result<_, _>>()?)
            }
        })
    }
}

/// About how many bytes a unit takes in a message.
pub(crate) fn instruction_size(name: &UnitName, instruction: Option<&Instruction>) -> usize {
    let text = match instruction {
        Some(Instruction::Hold(wanted)) => wanted.file.text().len(),
        Some(Instruction::Leave | Instruction::Release(_)) | None => 0,
    };
    name.as_str().len() + text + 32
}

/// About how many bytes a report takes in a message.
pub(crate) fn report_size(name: &UnitName, report: Option<&UnitReport>) -> usize {
    let texts = report.map_or(0, |report| {
        let state = &report.systemd;
        let problem = report.problem.as_ref().map_or(0, |problem| problem.len().min(MAX_TEXT));
        state.load.len() + state.active.len() + state.sub.len() + problem
    });
    name.as_str().len() + texts + 64
}

/// An answer's chunk in pieces that are small enough to be sent.
pub(crate) fn pieces(chunk: Chunk) -> impl Iterator<Item = Chunk> {
    let mut rest = Some(chunk);
    std::iter::from_fn(move || {
        let (mut bytes, make): (_, fn(bytes::Bytes) -> Chunk) = match rest.take()? {
            Chunk::Out(bytes) => (bytes, Chunk::Out),
            Chunk::Err(bytes) => (bytes, Chunk::Err),
            other => return Some(other),
        };
        if bytes.len() > MAX_PIECE {
            let piece = bytes.split_to(MAX_PIECE);
            rest = Some(make(bytes));
            return Some(make(piece));
        }
        Some(make(bytes))
    })
}

fn part<T>(snapshot: bool, first: bool, last: bool, entries: Vec<(UnitName, Option<T>)>) -> Part<T> {
    Part { snapshot, first, last, entries }
}

fn kind(snapshot: bool) -> pb::Kind {
    if snapshot { pb::Kind::Snapshot } else { pb::Kind::Changes }
}

fn decode_kind(field: &str, kind: i32) -> Result<bool, WireError> {
    match pb::Kind::try_from(kind) {
        Ok(pb::Kind::Snapshot) => Ok(true),
        Ok(pb::Kind::Changes) => Ok(false),
        Ok(pb::Kind::Unknown) | Err(_) => wrong(field, format!("unknown value {kind}")),
    }
}

fn encode_state(state: DesiredState) -> pb::State {
    match state {
        DesiredState::Inactive => pb::State::Inactive,
        DesiredState::Loaded => pb::State::Loaded,
        DesiredState::Launched => pb::State::Launched,
    }
}

fn decode_state(field: String, state: i32) -> Result<DesiredState, WireError> {
    match pb::State::try_from(state) {
        Ok(pb::State::Inactive) => Ok(DesiredState::Inactive),
        Ok(pb::State::Loaded) => Ok(DesiredState::Loaded),
        Ok(pb::State::Launched) => Ok(DesiredState::Launched),
        Ok(pb::State::Unknown) | Err(_) => wrong(field, format!("unknown value {state}")),
    }
}

fn report_entry((name, report): (UnitName, Option<UnitReport>)) -> pb::ReportEntry {
    pb::ReportEntry {
        name: name.as_str().to_owned(),
        report: report.map(|report| pb::Report {
            current: encode_state(report.current).into(),
            hash: report.hash.0.to_vec(),
            load: report.systemd.load,
            active: report.systemd.active,
            sub: report.systemd.sub,
            problem: report.problem.map(|problem| clean(&problem)),
        }),
    }
}

fn decode_hello(hello: pb::Hello) -> Result<Up, WireError> {
    let (oldest, newest) = (hello.oldest, hello.newest);
    let id = MachineId::parse(&hello.machine).or_else(|error| wrong("hello.machine", error))?;
    if hello.metadata.len() > MAX_METADATA {
        return wrong("hello.metadata", format!("more than {MAX_METADATA} entries"));
    }
    for (key, value) in &hello.metadata {
        line("hello.metadata", key, MAX_TEXT)?;
        line("hello.metadata", value, MAX_TEXT)?;
    }
    line("hello.public_ip", &hello.public_ip, MAX_ADDRESS)?;
    line("hello.version", &hello.version, MAX_WORD)?;
    // What operators say of a machine it does not say of itself.
    let (public_ip, metadata, version) = (hello.public_ip, hello.metadata, hello.version);
    let machine = Machine { public_ip, metadata, version, ..Machine::default() };
    Ok(Up::Hello { hello: Hello { id, machine }, oldest, newest })
}

fn decode_report(report: pb::Report, field: &dyn Fn(&str) -> String) -> Result<UnitReport, WireError> {
    let hash = <[u8; 20]>::try_from(report.hash.as_slice())
        .or_else(|_| wrong(field("hash"), format!("{} bytes instead of 20", report.hash.len())))?;
    if let Some(problem) = &report.problem {
        if problem.len() > MAX_TEXT {
            return wrong(field("problem"), format!("longer than {MAX_TEXT} bytes"));
        }
        if problem.chars().any(is_harmful) {
            return wrong(field("problem"), "has control characters");
        }
    }
    Ok(UnitReport {
        current: decode_state(field("current"), report.current)?,
        hash: Hash(hash),
        systemd: SystemdState {
            load: word(field("load"), report.load)?,
            active: word(field("active"), report.active)?,
            sub: word(field("sub"), report.sub)?,
        },
        problem: report.problem,
    })
}

fn encode_ask(ask: Ask) -> pb::request::Ask {
    match ask {
        Ask::Status(unit) => pb::request::Ask::Status(pb::Status { unit: unit.as_str().to_owned() }),
        Ask::Journal { unit, lines, follow, output } => {
            pb::request::Ask::Journal(pb::Journal { unit: unit.as_str().to_owned(), lines, follow, output })
        }
    }
}

fn decode_ask(ask: Option<pb::request::Ask>) -> Result<Ask, WireError> {
    Ok(match ask {
        None => return wrong("request.ask", "of no known kind"),
        Some(pb::request::Ask::Status(ask)) => {
            Ask::Status(unit("request.status.unit".to_owned(), &ask.unit)?)
        }
        Some(pb::request::Ask::Journal(ask)) => Ask::Journal {
            unit: unit("request.journal.unit".to_owned(), &ask.unit)?,
            lines: ask.lines,
            follow: ask.follow,
            // It becomes an argument of journalctl.
            output: word("request.journal.output".to_owned(), ask.output)?,
        },
    })
}

fn encode_piece(piece: Option<Chunk>) -> pb::answer::Piece {
    match piece {
        Some(Chunk::Out(bytes)) => pb::answer::Piece::Out(bytes),
        Some(Chunk::Err(bytes)) => pb::answer::Piece::Err(bytes),
        Some(Chunk::Exit(code)) => pb::answer::Piece::Exit(code),
        Some(Chunk::Failed(text)) => pb::answer::Piece::Failed(clean(&text)),
        None => pb::answer::Piece::Gone(pb::Gone {}),
    }
}

fn decode_piece(piece: Option<pb::answer::Piece>) -> Result<Option<Chunk>, WireError> {
    let chunk = match piece {
        None => return wrong("answer.piece", "of no known kind"),
        Some(pb::answer::Piece::Out(bytes)) => Chunk::Out(bytes),
        Some(pb::answer::Piece::Err(bytes)) => Chunk::Err(bytes),
        Some(pb::answer::Piece::Exit(code)) => Chunk::Exit(code),
        Some(pb::answer::Piece::Failed(text)) => {
            if text.len() > MAX_TEXT || text.chars().any(is_harmful) {
                return wrong("answer.failed", "too long, or with control characters");
            }
            Chunk::Failed(text)
        }
        Some(pb::answer::Piece::Gone(_)) => return Ok(None),
    };
    match &chunk {
        Chunk::Out(bytes) | Chunk::Err(bytes) if bytes.len() > MAX_PIECE => {
            wrong("answer.piece", format!("larger than {MAX_PIECE} bytes"))
        }
        _ => Ok(Some(chunk)),
    }
}

fn unit(field: String, name: &str) -> Result<UnitName, WireError> {
    UnitName::parse(name).or_else(|error| wrong(field, error))
}

/// A word as systemd uses them; may be empty.
fn word(field: String, text: String) -> Result<String, WireError> {
    let right = text.len() <= MAX_WORD && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if right { Ok(text) } else { wrong(field, "not a word of systemd") }
}

/// A short text on one line.
fn line(field: &str, text: &str, limit: usize) -> Result<(), WireError> {
    if text.len() > limit {
        return wrong(field, format!("longer than {limit} bytes"));
    }
    if text.chars().any(char::is_control) {
        return wrong(field, "has control characters");
    }
    Ok(())
}

/// Control characters other than those that text for people has.
fn is_harmful(c: char) -> bool {
    c.is_control() && c != '\n' && c != '\t'
}

/// A text for people as it may be sent.
fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(MAX_TEXT));
    for c in text.chars() {
        let c = if is_harmful(c) { char::REPLACEMENT_CHARACTER } else { c };
        if clean.len() + c.len_utf8() > MAX_TEXT {
            break;
        }
        clean.push(c);
    }
    clean
}

/// Not derived, since it has a token's secret.
impl fmt::Debug for pb::JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinRequest {{ token: {:?}, machine: {:?} }}", self.token, self.machine)
    }
}
