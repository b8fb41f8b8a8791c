//! The messages of servers among themselves as the crate's types; see [`super`].

use super::{WireError, decode_ask, decode_piece, encode_ask, encode_piece, line, unit, wrong};
use super::{clean, generated as pb};
use crate::peer::{News, Notice, Standing};
use crate::{Ask, Chunk};
use fleet_cluster::{engine::Delay, model::MachineId};
use std::time::Duration;

/// How many delays one message holds.
const MOST_DELAYS: usize = 2000;
const MAX_NOTICES: usize = 1000;
const MAX_TEXT: usize = 4096;
const MAX_ID: usize = 255;

pub(crate) fn encode_peer_ask(machine: &MachineId, ask: Ask) -> pb::PeerAsk {
    let request = pb::Request { number: 0, credit: 0, ask: Some(encode_ask(ask)) };
    pb::PeerAsk { machine: machine.as_str().to_owned(), request: Some(request) }
}

pub(crate) fn decode_peer_ask(message: pb::PeerAsk) -> Result<(MachineId, Ask), WireError> {
    let machine = MachineId::parse(&message.machine).or_else(|error| wrong("machine", error))?;
    let request = message.request.ok_or(()).or_else(|()| wrong("request", "missing"))?;
    Ok((machine, decode_ask(request.ask)?))
}

pub(crate) fn encode_answer(piece: Chunk) -> pb::Answer {
    pb::Answer { number: 0, piece: Some(encode_piece(Some(piece))) }
}

/// A piece; `None`: the answer was cut off.
pub(crate) fn decode_answer(message: pb::Answer) -> Result<Option<Chunk>, WireError> {
    decode_piece(message.piece)
}

/// News in parts that are small enough to be sent: what is told anew is complete with the last of them.
pub(crate) fn news_in_parts(mut news: News) -> Vec<News> {
    let mut delays = std::mem::take(&mut news.delays);
    let mut parts = vec![news];
    while !delays.is_empty() {
        let rest = delays.split_off(delays.len().min(MOST_DELAYS));
        match &mut parts[..] {
            [only] if only.delays.is_empty() => only.delays = delays,
            _ => parts.push(News { delays, ..News::default() }),
        }
        delays = rest;
    }
    parts
}

pub(crate) fn encode_news(news: News) -> pb::News {
    let notice =
        |notice: Notice| pb::Notice { id: clean(&notice.id), since: notice.since, text: clean(&notice.text) };
    pb::News {
        anew: news.anew,
        notices: news.notices.into_iter().map(notice).collect(),
        over: news.over,
        delays: news
            .delays
            .into_iter()
            .map(|(unit, why)| pb::Delayed {
                unit: unit.as_str().to_owned(),
                why: match why {
                    None => pb::Delay::None,
                    Some(Delay::Grace) => pb::Delay::Grace,
                    Some(Delay::Isolation) => pb::Delay::Isolation,
                    Some(Delay::MassLoss) => pb::Delay::MassLoss,
                }
                .into(),
            })
            .collect(),
    }
}

pub(crate) fn decode_news(news: pb::News) -> Result<News, WireError> {
    if news.notices.len() > MAX_NOTICES || news.over.len() > MAX_NOTICES {
        return wrong("notices", format!("more than {MAX_NOTICES}"));
    }
    let mut notices = Vec::with_capacity(news.notices.len());
    for pb::Notice { id, since, text } in news.notices {
        line("notices.id", &id, MAX_ID)?;
        line("notices.text", &text, MAX_TEXT)?;
        notices.push(Notice { id, since, text });
    }
    let mut delays = Vec::with_capacity(news.delays.len());
    for delayed in news.delays {
        let name = unit("delays.unit".to_owned(), &delayed.unit)?;
        let why = match pb::Delay::try_from(delayed.why) {
            Ok(pb::Delay::Grace) => Some(Delay::Grace),
            Ok(pb::Delay::Isolation) => Some(Delay::Isolation),
            Ok(pb::Delay::MassLoss) => Some(Delay::MassLoss),
            // One that a newer leader knows is not told: there are no words for it here.
            Ok(pb::Delay::None) | Err(_) => None,
        };
        delays.push((name, why));
    }
    Ok(News { anew: news.anew, notices, over: news.over, delays })
}

pub(crate) fn encode_standing(standing: Standing) -> pb::Standing {
    let reached_ms = standing.reached.map(|ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX));
    pb::Standing { revision: standing.revision, reached_ms }
}

pub(crate) fn decode_standing(message: pb::Standing) -> Standing {
    Standing { revision: message.revision, reached: message.reached_ms.map(Duration::from_millis) }
}
