//! Status, journal and events: answers that come from a machine, or that go on.

use super::{Answer, Api, Body, failure, full, route};
use crate::server::{Answer as MachineAnswer, hub::Subject};
use bytes::Bytes;
use fleet_api::events::Event;
use fleet_cluster::{model::MachineId, view::View};
use fleet_link::{Ask, Chunk};
use fleet_registry::Store;
use fleet_unit::UnitName;
use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::{HeaderMap, Response, StatusCode, body::Frame, header};
use std::{collections::BTreeSet, convert::Infallible, time::Duration};
use tokio::time::timeout;

/// How long a machine may take to answer, or to begin to.
const MACHINE_DEADLINE: Duration = Duration::from_secs(20);
/// The longest status text, bytes.
const MAX_STATUS: usize = 4 << 20;
/// The most of what journalctl complains of that is passed on, bytes.
const MAX_COMPLAINT: usize = 4 << 10;
/// A comment is sent on event streams this often, so that both ends notice a dead connection.
const HEARTBEAT: Duration = Duration::from_secs(15);

const EXIT_CODE: header::HeaderName = header::HeaderName::from_static("fleet-exit-code");
const ERROR: header::HeaderName = header::HeaderName::from_static("fleet-error");
const MACHINE: header::HeaderName = header::HeaderName::from_static("fleet-machine");

type Query = [(String, String)];

impl<S: Store> Api<S> {
    pub(super) async fn status(&self, name: &str, query: &Query) -> Answer {
        let (machine, unit) = match choose(&self.server.hub().view(), name, query) {
            Ok(chosen) => chosen,
            Err((status, message)) => return failure(status, &message),
        };
        let mut answer = match self.server.ask(&machine, Ask::Status(unit)).await {
            Ok(answer) => answer,
            Err(error) => return failure(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let collect = async {
            while let Some(chunk) = answer.recv().await {
                match chunk {
                    Chunk::Out(bytes) if out.len() + bytes.len() <= MAX_STATUS => {
                        out.extend_from_slice(&bytes)
                    }
                    Chunk::Err(bytes) if err.len() + bytes.len() <= MAX_STATUS => {
                        err.extend_from_slice(&bytes)
                    }
                    Chunk::Out(_) | Chunk::Err(_) => return Err("its answer is too long".to_owned()),
                    Chunk::Exit(code) => return Ok(code),
                    Chunk::Failed(reason) => return Err(reason),
                }
            }
            Err("the answer was cut off".to_owned())
        };
        let code = match timeout(MACHINE_DEADLINE, collect).await {
            Ok(Ok(code)) => code,
            Ok(Err(reason)) => return machine_failure(&machine, &reason),
            Err(_) => return machine_failure(&machine, "no answer in time"),
        };
        if out.is_empty() {
            out = err;
        }
        let mut answer = text(full(out));
        answer.headers_mut().insert(EXIT_CODE, code.into());
        insert_machine(&mut answer, &machine);
        answer
    }

    pub(super) async fn journal(&self, name: &str, query: &Query) -> Answer {
        let (machine, unit) = match choose(&self.server.hub().view(), name, query) {
            Ok(chosen) => chosen,
            Err((status, message)) => return failure(status, &message),
        };
        let Ok(lines) = route::first(query, "lines").unwrap_or("10").parse() else {
            return failure(StatusCode::BAD_REQUEST, "lines must be a number of lines");
        };
        let follow = route::first(query, "follow").is_some_and(|value| !matches!(value, "0" | "false"));
        let output = route::first(query, "output").filter(|output| !output.is_empty()).unwrap_or("short");
        if !output.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') || output.len() > 64 {
            return failure(StatusCode::BAD_REQUEST, &format!("Unknown output format '{output}'."));
        }
        let ask = Ask::Journal { unit, lines, follow, output: output.to_owned() };
        let mut answer = match self.server.ask(&machine, ask).await {
            Ok(answer) => answer,
            Err(error) => return failure(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
        };
        // Whether it works at all is known with the first piece; a journal that is followed may have none for long.
        let mut complaint = Vec::new();
        let first = async {
            loop {
                match answer.recv().await {
                    Some(Chunk::Err(bytes)) if complaint.len() < MAX_COMPLAINT => {
                        complaint.extend_from_slice(&bytes)
                    }
                    other => return other,
                }
            }
        };
        let patience = if follow { Duration::from_millis(300) } else { MACHINE_DEADLINE };
        let first = match timeout(patience, first).await {
            Ok(Some(Chunk::Exit(code))) if code != 0 => {
                let message = String::from_utf8_lossy(&complaint).trim_end().to_owned();
                let mut answer = failure(StatusCode::BAD_REQUEST, &message);
                answer.headers_mut().insert(EXIT_CODE, code.into());
                return answer;
            }
            Ok(Some(Chunk::Failed(reason))) => return machine_failure(&machine, &reason),
            Ok(None) => return machine_failure(&machine, "the answer was cut off"),
            Ok(Some(chunk)) => Some(chunk),
            Err(_) if follow => None,
            Err(_) => return machine_failure(&machine, "no answer in time"),
        };
        let frames = frames(first, complaint, answer, machine.clone());
        let frames = frames.take_until(self.cancel.clone().cancelled_owned());
        let mut answer = text(StreamBody::new(frames).boxed_unsync());
        insert_machine(&mut answer, &machine);
        let trailers = header::HeaderValue::from_static("fleet-exit-code, fleet-error");
        answer.headers_mut().insert(header::TRAILER, trailers);
        answer
    }

    pub(super) fn events(&self, query: &Query, headers: &HeaderMap) -> Answer {
        let last_id = headers.get("last-event-id").and_then(|value| value.to_str().ok());
        let since = match route::first(query, "since").or(last_id).map(str::parse) {
            None => None,
            Some(Ok(revision)) => Some(revision),
            Some(Err(_)) => return failure(StatusCode::BAD_REQUEST, "since must be a revision"),
        };
        let mut units = BTreeSet::new();
        for (_, name) in query.iter().filter(|(key, _)| key == "unitName") {
            match UnitName::parse(name) {
                Ok(name) => units.insert(name),
                Err(error) => return failure(StatusCode::BAD_REQUEST, &error.to_string()),
            };
        }
        let flag = |key| route::first(query, key).is_some_and(|value| !matches!(value, "0" | "false"));
        let lines = self.event_lines(units, flag("machines"), flag("snapshot"), since);
        let frames = lines.map(|text| Ok::<_, Infallible>(Frame::data(Bytes::from(text))));
        let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-cache"));
        answer
    }

    /// The text of an event stream. What is sent of a subject is its state at that moment, so a slow reader gets fewer
    /// events, never older ones.
    fn event_lines(
        &self,
        units: BTreeSet<UnitName>,
        machines: bool,
        snapshot: bool,
        since: Option<u64>,
    ) -> impl Stream<Item = String> + Send + 'static {
        let hub = self.server.hub().clone();
        let applied = hub.applied();
        let now = *applied.borrow();
        // Before the view is read: what changes meanwhile is told again.
        let here = hub.now();
        let wanted = move |subject: &Subject| match subject {
            _ if units.is_empty() => true,
            Subject::Unit(name) => units.contains(name),
            Subject::Machine(_) | Subject::Notice(_) => machines,
        };
        let first = if snapshot {
            let mut subjects = BTreeSet::new();
            subjects.extend(hub.notices().into_iter().map(|notice| Subject::Notice(notice.id)));
            let view = hub.view();
            subjects.extend(view.units().map(|(name, _)| Subject::Unit(name.clone())));
            subjects.extend(view.reports().map(|(name, _, _)| Subject::Unit(name.clone())));
            subjects.extend(view.machines().map(|(id, _)| Subject::Machine(id.clone())));
            drop(view);
            let mut text: String =
                subjects.iter().filter(|s| wanted(s)).map(|s| line(now, &hub.event(s))).collect();
            text += &line(now, &Event::Ready);
            text
        } else {
            // So that the client knows at once that it is connected.
            ": connected\n\n".to_owned()
        };
        let cursor = match since {
            Some(revision) if !snapshot => hub.after(revision),
            _ => Some(here),
        };
        let state = (hub, applied, cursor, wanted);
        let rest = stream::unfold(state, |(hub, mut applied, mut cursor, wanted)| async move {
            loop {
                let revision = *applied.borrow_and_update();
                let here = hub.now();
                let text = match cursor.and_then(|cursor| hub.changed_since(cursor)) {
                    None => {
                        cursor = Some(here);
                        line(revision, &Event::Reset)
                    }
                    Some(changed) => {
                        cursor = Some(changed.cursor);
                        let subjects = changed.subjects.iter().filter(|s| wanted(s));
                        subjects.map(|s| line(changed.revision, &hub.event(s))).collect()
                    }
                };
                if !text.is_empty() {
                    return Some((text, (hub, applied, cursor, wanted)));
                }
                match timeout(HEARTBEAT, applied.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return None,
                    Err(_) => return Some((": still here\n\n".to_owned(), (hub, applied, cursor, wanted))),
                }
            }
        });
        stream::iter([first]).chain(rest).take_until(self.cancel.clone().cancelled_owned())
    }
}

fn line(revision: u64, event: &Event) -> String {
    let kind = match event {
        Event::Unit(_) => "unit",
        Event::UnitGone { .. } => "unitGone",
        Event::Machine(_) => "machine",
        Event::MachineGone { .. } => "machineGone",
        Event::Notice(_) => "notice",
        Event::NoticeGone { .. } => "noticeGone",
        Event::Ready => "ready",
        Event::Reset => "reset",
    };
    // Plain values of strings, numbers and booleans: writing them as JSON can't fail.
    let data = serde_json::to_string(event).unwrap_or_default();
    format!("id: {revision}\nevent: {kind}\ndata: {data}\n\n")
}

/// The body of a journal: its lines, and at the end how it ended. What journalctl complains of is told there, too: between
/// the lines it would be taken for one.
fn frames(
    first: Option<Chunk>,
    complaint: Vec<u8>,
    rest: MachineAnswer,
    machine: MachineId,
) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static {
    let state = (first, complaint, Some(rest));
    stream::unfold(state, move |(mut first, mut complaint, rest)| {
        let machine = machine.clone();
        async move {
            let mut rest = rest?;
            loop {
                let chunk = match first.take() {
                    Some(chunk) => Some(chunk),
                    None => rest.recv().await,
                };
                let end = match chunk {
                    Some(Chunk::Out(bytes)) => {
                        return Some((Ok(Frame::data(bytes)), (first, complaint, Some(rest))));
                    }
                    Some(Chunk::Err(bytes)) => {
                        let room = bytes.len().min(MAX_COMPLAINT.saturating_sub(complaint.len()));
                        complaint.extend_from_slice(&bytes[..room]);
                        continue;
                    }
                    Some(Chunk::Exit(0)) => trailers(Some(0), None),
                    Some(Chunk::Exit(code)) => {
                        let complaint = String::from_utf8_lossy(&complaint);
                        let complaint = complaint.trim_end();
                        let error =
                            (!complaint.is_empty()).then(|| format!("machine {machine}: {complaint}"));
                        trailers(Some(code), error)
                    }
                    Some(Chunk::Failed(reason)) => {
                        trailers(None, Some(format!("machine {machine}: {reason}")))
                    }
                    None => trailers(None, Some(format!("the connection to machine {machine} was lost"))),
                };
                return Some((Ok(Frame::trailers(end)), (None, Vec::new(), None)));
            }
        }
    })
}

/// How a journal ended.
fn trailers(code: Option<i32>, error: Option<String>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.extend(code.map(|code| (EXIT_CODE, code.into())));
    // Values of headers hold no control characters.
    let error = error.map(|text| text.replace(|c: char| c.is_control(), " "));
    let error = error.and_then(|text| header::HeaderValue::from_bytes(text.as_bytes()).ok());
    trailers.extend(error.map(|error| (ERROR, error)));
    trailers
}

fn text(body: Body) -> Answer {
    let mut answer = Response::new(body);
    let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    answer
}

fn insert_machine(answer: &mut Answer, machine: &MachineId) {
    if let Ok(value) = header::HeaderValue::from_str(machine.as_str()) {
        answer.headers_mut().insert(MACHINE, value);
    }
}

fn machine_failure(machine: &MachineId, reason: &str) -> Answer {
    failure(StatusCode::SERVICE_UNAVAILABLE, &format!("machine {machine}: {reason}"))
}

/// The machine to ask about a unit: the one the query names, the one it is placed on, or the only one that has it.
fn choose(view: &View, name: &str, query: &Query) -> Result<(MachineId, UnitName), (StatusCode, String)> {
    let missing = || (StatusCode::NOT_FOUND, "unit does not exist".to_owned());
    let name = UnitName::parse(name).map_err(|_| missing())?;
    let (first, second) = {
        let mut there = view.reports_of(&name).map(|(machine, _)| machine.clone());
        (there.next(), there.next())
    };
    if view.unit(&name).is_none() && first.is_none() {
        return Err(missing());
    }
    if let Some(machine) = route::first(query, "machine").filter(|machine| !machine.is_empty()) {
        let machine =
            MachineId::parse(machine).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
        let placed = view.place(&name).is_some_and(|(place, _)| *place == machine);
        if !placed && view.reports_of(&name).all(|(other, _)| *other != machine) {
            return Err((StatusCode::CONFLICT, format!("unit {name} is not on machine {machine}")));
        }
        return Ok((machine, name));
    }
    let place = view.place(&name).map(|(machine, _)| machine.clone());
    match (place, first, second) {
        (Some(machine), _, _) | (None, Some(machine), None) => Ok((machine, name)),
        (None, Some(_), Some(_)) => {
            Err((StatusCode::CONFLICT, format!("unit {name} is on several machines: say which")))
        }
        (None, None, _) => Err((StatusCode::CONFLICT, format!("unit {name} is on no machine"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines, the exit code and the error of a journal that is answered so.
    async fn body(chunks: Vec<Chunk>) -> (String, Option<String>, Option<String>) {
        let (send, receiver) = tokio::sync::mpsc::channel(16);
        for chunk in chunks {
            send.send(chunk).await.unwrap();
        }
        drop(send);
        let machine = MachineId::parse("4a1e0c2fb7d94e6c8f3a51d2c07e9b11").unwrap();
        let first = Some(Chunk::Out(Bytes::from_static(b"first\n")));
        let body = StreamBody::new(frames(first, Vec::new(), MachineAnswer::Here(receiver), machine));
        let body = BodyExt::collect(body).await.unwrap();
        let trailer = |name| {
            let value = body.trailers()?.get(name)?;
            Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let (code, error) = (trailer(EXIT_CODE), trailer(ERROR));
        (String::from_utf8(body.to_bytes().to_vec()).unwrap(), code, error)
    }

    #[tokio::test]
    async fn a_journal_says_how_it_ended() {
        let machine = "machine 4a1e0c2fb7d94e6c8f3a51d2c07e9b11";
        let out = |text: &'static str| Chunk::Out(Bytes::from_static(text.as_bytes()));
        let err = |text: &'static str| Chunk::Err(Bytes::from_static(text.as_bytes()));
        let text = |text: &str| text.to_owned();
        assert_eq!(
            body(vec![err("Hint: …\n"), out("two\n"), Chunk::Exit(0)]).await,
            (text("first\ntwo\n"), Some(text("0")), None)
        );
        assert_eq!(
            body(vec![err("no\nmore\n"), Chunk::Exit(1)]).await,
            (text("first\n"), Some(text("1")), Some(format!("{machine}: no more")))
        );
        assert_eq!(
            body(vec![Chunk::Failed(text("went awäy"))]).await,
            (text("first\n"), None, Some(format!("{machine}: went awäy")))
        );
        assert_eq!(
            body(vec![]).await,
            (text("first\n"), None, Some(format!("the connection to {machine} was lost")))
        );
    }
}
