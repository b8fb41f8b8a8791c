//! What the engine of the leader lets everybody know, and how the other servers learn of it.
//!
//! It is in no registry: it would be written anew with each unit that is placed. A server that does not lead follows the one that does
//! ([`fleet_link::peer`]) and is told what changes, so every server says the same, and while nothing changes nothing is said. For as long as the
//! leader can't be reached nothing is known of it.

use super::{Server, hub::Subject};
use fleet_api::types::Notice;
use fleet_cluster::engine::Delay;
use fleet_cluster::model::MachineId;
use fleet_link::peer::{self, News, PeerDialer, PeerRefusal};
use fleet_registry::Store;
use fleet_unit::UnitName;
use futures_util::stream::{self, BoxStream, StreamExt};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tracing::{debug, info};

/// How long to wait before following the leader again.
const RETRY: Duration = Duration::from_secs(1);

/// What an engine lets know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Said {
    /// Units that fit somewhere and that it does not place there yet.
    pub(super) delays: BTreeMap<UnitName, Delay>,
    /// By their IDs.
    pub(super) notices: BTreeMap<String, Notice>,
}

impl Said {
    /// What is to be told anew after it was otherwise.
    pub(super) fn differs_from(&self, before: &Said) -> BTreeSet<Subject> {
        let units = changed(&before.delays, &self.delays).cloned().map(Subject::Unit);
        let notices = changed(&before.notices, &self.notices).cloned().map(Subject::Notice);
        units.chain(notices).collect()
    }

    /// What is news to who knows what was before; everything to who knows nothing.
    fn news_since(&self, before: Option<&Said>) -> News {
        let nothing = Said::default();
        let known = before.unwrap_or(&nothing);
        let delays = changed(&known.delays, &self.delays);
        let (there, over): (Vec<_>, Vec<_>) =
            changed(&known.notices, &self.notices).partition(|id| self.notices.contains_key(*id));
        let notice = |notice: &Notice| peer::Notice {
            id: notice.id.clone(),
            since: notice.since,
            text: notice.text.clone(),
        };
        News {
            anew: before.is_none(),
            notices: there.into_iter().filter_map(|id| self.notices.get(id)).map(notice).collect(),
            over: over.into_iter().cloned().collect(),
            delays: delays.map(|name| (name.clone(), self.delays.get(name).copied())).collect(),
        }
    }

    /// Takes news in.
    fn learn(&mut self, news: News) {
        if news.anew {
            *self = Said::default();
        }
        for id in news.over {
            self.notices.remove(&id);
        }
        for peer::Notice { id, since, text } in news.notices {
            self.notices.insert(id.clone(), Notice { id, since, text });
        }
        for (name, delay) in news.delays {
            match delay {
                Some(delay) => self.delays.insert(name, delay),
                None => self.delays.remove(&name),
            };
        }
    }
}

/// The keys whose values are not the same.
fn changed<'a, K: Ord, V: PartialEq>(
    before: &'a BTreeMap<K, V>,
    now: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    let gone = before.keys().filter(|key| !now.contains_key(*key));
    gone.chain(now.iter().filter(|(key, value)| before.get(*key) != Some(*value)).map(|(key, _)| key))
}

impl<S: Store> Server<S> {
    /// Follows what the leader lets know, whenever another server leads, until cancelled.
    pub(super) async fn follow_leader(&self) -> anyhow::Result<()> {
        // The way to others is found in good times: when the registry is away it is too late.
        while let Err(error) = self.dialer().await {
            debug!("no way to other servers yet: {error}");
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(RETRY) => {}
            }
        }
        let mut leader = self.peers.leader();
        loop {
            let other = async {
                let known = leader.wait_for(|leader| {
                    leader.as_ref().is_some_and(|leader| leader.record.server != self.config.machine)
                });
                // The sender lives as long as the server.
                known.await.ok().and_then(|leader| leader.clone())
            };
            let other = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                other = other => other,
            };
            let Some(other) = other else { return Ok(()) };
            let replaced = async {
                let _ = leader.wait_for(|leader| leader.as_ref() != Some(&other)).await;
            };
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                () = replaced => {}
                why = self.hear_from(&other.record.server) => {
                    debug!("not told what server {}, which leads, lets know: {why}", other.record.server);
                }
            }
            self.hub.hear(Said::default());
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Takes in what a server lets know for as long as it does; gives why it does not (any more).
    async fn hear_from(&self, leader: &MachineId) -> String {
        let followed = async {
            let address = self.peers.servers().get(leader).and_then(|record| record.dialed());
            let address = address.ok_or("it listens on no port")?;
            let dialer: PeerDialer = self.dialer().await.map_err(|error| error.to_string())?;
            let followed = dialer.follow(&address).await.map_err(|error| error.to_string())?;
            Ok::<_, String>((address, followed))
        };
        let (address, mut followed) = match followed.await {
            Ok(followed) => followed,
            Err(why) => return why,
        };
        info!("following server {leader} at {address}, which leads");
        let mut said = Said::default();
        loop {
            match followed.next().await {
                Ok(news) => {
                    said.learn(news);
                    self.hub.hear(said.clone());
                }
                Err(error) => return error.to_string(),
            }
        }
    }

    /// What this server lets know, for another one, for as long as it leads.
    pub(super) fn let_know(&self) -> Result<BoxStream<'static, News>, PeerRefusal> {
        if !self.leads() {
            return Err(PeerRefusal::NotHere("it does not lead".to_owned()));
        }
        let news = stream::unfold((self.clone(), None), |(server, known)| async move {
            let said = server.hub.said_since(known.as_ref()).await;
            let news = said.news_since(known.as_ref());
            // Who does not lead any more lets nothing know, and says so.
            server.leads().then_some((news, (server, Some(said))))
        });
        Ok(news.boxed())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said() -> impl Strategy<Value = Said> {
        let delay = prop_oneof![Just(Delay::Grace), Just(Delay::Isolation), Just(Delay::MassLoss)];
        let delays = prop::collection::btree_map((0u8..6).prop_map(name), delay, 0..6);
        let notice = |(id, text): (u8, u8)| {
            let id = format!("n{id}");
            (id.clone(), Notice { id, since: 1, text: text.to_string() })
        };
        let notices = prop::collection::vec((0u8..3, 0u8..2).prop_map(notice), 0..3);
        (delays, notices)
            .prop_map(|(delays, notices)| Said { delays, notices: notices.into_iter().collect() })
    }

    fn name(n: u8) -> UnitName {
        UnitName::parse(&format!("u{n}.service")).unwrap()
    }

    proptest! {
        #[test]
        fn who_is_told_the_news_knows_what_was_said(all in prop::collection::vec(said(), 1..8)) {
            let mut known: Option<Said> = None;
            // What another leader said before.
            let mut told = Said { delays: [(name(9), Delay::Grace)].into(), ..Said::default() };
            for said in all {
                let news = said.news_since(known.as_ref());
                let before = known.replace(said.clone()).unwrap_or_default();
                let nothing = News { anew: news.anew, ..News::default() };
                prop_assert_eq!(news == nothing, said.differs_from(&before).is_empty());
                told.learn(news);
                prop_assert_eq!(&told, &said);
            }
        }
    }
}
