//! The store in etcd, through its API v3 (etcd 3.4 and newer). What knows etcd is in here, and nowhere else.
//!
//! - `config`: endpoints, TLS, user
//! - `layout`: which keys fleet has there
//! - `identity`: that it is still the same registry
//! - `connection`: one connection to one member
//! - `members`: which member is spoken to, and what becomes of a call that fails
//! - `status`: what etcd's errors mean
//! - `convert`: transactions and entries as messages
//! - `watch`: watches that outlive members
//! - `health`: how the members are
//!
//! # What it does when something fails
//!
//! A call has [`EtcdConfig::request_timeout`]. Reads and renewals are sent to another member when one fails, within that
//! time. A transaction that was sent is never repeated: when its answer does not come it is [`StoreError::Unknown`], unless
//! etcd said that it did nothing. A watch goes on at another member where it was, however long that takes; it ends when
//! changes it has not given were compacted, or when the registry is not the one that it was.
//!
//! # Who compacts
//!
//! etcd keeps every change until it is told not to, and by default nobody tells it: after some months it would be full, and refuse
//! all writes. So the leader does, through [`Store::tidy`], unless [`EtcdConfig::compaction`] says otherwise. Compaction is of the whole
//! etcd; who shares one with programs that read old revisions leaves it to etcd (`--auto-compaction-retention`).
mod config;
mod connection;
mod convert;
#[rustfmt::skip]
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
mod generated;
mod health;
mod identity;
mod layout;
mod members;
mod status;
mod watch;

#[cfg(test)]
mod tests;

use crate::store::*;
use config::Settings;
use convert::{of_etcd, to_etcd};
use generated as pb;
use members::{CallError, Effect, Members};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::task::JoinHandle;

pub use config::{EtcdConfig, EtcdConfigError};
pub use health::{EndpointHealth, MemberHealth};
pub use identity::Identity;
pub use members::Contact;
pub use watch::EtcdWatch;

/// How many entries are asked for first; then as many as fit well.
const PAGE: i64 = 500;
/// The most entries that are asked for at once.
const LARGEST_PAGE: i64 = 4000;
/// Pages below this size, bytes, may be larger.
const SMALL_PAGE: usize = 1 << 20;
/// How often a list is begun anew that was overtaken by compactions.
const LISTINGS: usize = 3;

/// The store in etcd. See [`Store`] for what it guarantees.
///
/// A store can be made, and handed out, while etcd is not there; [`EtcdStore::contact`] says how it is.
#[derive(Clone)]
pub struct EtcdStore(Arc<Handle>);

/// What ends with the last clone and watch.
struct Handle {
    members: Arc<Members>,
    keeper: JoinHandle<()>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Handle {
    /// The revision the cluster is at, not only what some member knows.
    async fn revision(&self) -> Result<Revision, StoreError> {
        let request = pb::RangeRequest {
            key: self.members.settings.layout.registry(),
            keys_only: true,
            ..pb::RangeRequest::default()
        };
        let answer = self.range(request).await?;
        Ok(of_etcd(answer.header.map_or(0, |h| h.revision)))
    }

    async fn range(&self, request: pb::RangeRequest) -> Result<pb::RangeResponse, CallError> {
        let timeout = self.members.settings.timeout;
        let answer = self.members.call(Effect::Repeatable, |member| {
            let request = member.request(request.clone(), Some(timeout));
            async move { member.kv().range(request).await }
        });
        let answer = answer.await?.into_inner();
        self.members.saw(answer.header.as_ref());
        Ok(answer)
    }

    async fn txn(&self, request: pb::TxnRequest, effect: Effect) -> Result<pb::TxnResponse, CallError> {
        let timeout = self.members.settings.timeout;
        let answer = self.members.call(effect, |member| {
            let request = member.request(request.clone(), Some(timeout));
            async move { member.kv().txn(request).await }
        });
        let answer = answer.await?.into_inner();
        self.members.saw(answer.header.as_ref());
        Ok(answer)
    }
}

impl EtcdStore {
    /// Makes a store and begins to look for a member. `last` is what was last known of the registry ([`Self::identity`]);
    /// without it, whatever registry is there is taken, and one is made where there is none. Has to be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// Only those of the configuration.
    pub fn new(config: EtcdConfig, last: Option<Identity>) -> Result<Self, EtcdConfigError> {
        let members = Arc::new(Members::new(Settings::new(config)?, last));
        let keeping = members.clone();
        let keeper = tokio::spawn(async move { keeping.keep().await });
        Ok(EtcdStore(Arc::new(Handle { members, keeper })))
    }

    /// As [`Self::new`], and waits until the store can be used, for as long as a call may take.
    ///
    /// # Errors
    /// Those of the configuration are [`StoreError::Unusable`].
    pub async fn connect(config: EtcdConfig, last: Option<Identity>) -> Result<Self, StoreError> {
        let store = Self::new(config, last).map_err(|error| StoreError::Unusable(error.to_string()))?;
        store.reach().await?;
        Ok(store)
    }

    /// Waits until the store can be used, for as long as a call may take.
    async fn reach(&self) -> Result<(), StoreError> {
        self.0.revision().await.map(drop)
    }

    /// Whether etcd can be reached, now and from now on.
    pub fn contact(&self) -> tokio::sync::watch::Receiver<Contact> {
        self.0.members.contact()
    }

    /// The registry as it was last seen: to be kept, and given to [`Self::new`] the next time. `None`: it was not seen yet.
    pub fn identity(&self) -> Option<Identity> {
        self.0.members.identity()
    }

    /// Takes the registry that is there now, after [`StoreError::Damaged`] because it is not the one that was
    /// expected; where there is none it is made. Watches have ended; list anew.
    ///
    /// # Errors
    /// When there still is none that can be used.
    pub async fn accept(&self) -> Result<Identity, StoreError> {
        let members = &self.0.members;
        match self.reach().await {
            Err(StoreError::Damaged(_)) => {
                let before = members.expect(None);
                if let Err(error) = self.reach().await {
                    // So that nothing else is taken for it later.
                    members.expect(before);
                    return Err(error);
                }
            }
            other => other?,
        }
        self.identity().ok_or_else(|| StoreError::Unavailable("the registry was not seen yet".into()))
    }

    /// How each member is. Takes no longer than a call may take.
    pub async fn health(&self) -> Vec<EndpointHealth> {
        health::ask(&self.0.members).await
    }

    /// The highest revision that was seen, of anything in etcd.
    pub fn seen(&self) -> Revision {
        *self.0.members.seen().borrow()
    }

    /// Forgets what was overwritten or deleted before `revision`. It is no error when that was done already.
    pub async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        let timeout = self.0.members.settings.timeout;
        let request = pb::CompactionRequest { revision: to_etcd(revision) };
        let answer = self.0.members.call(Effect::Repeatable, |member| {
            let request = member.request(request, Some(timeout));
            async move { member.kv().compact(request).await }
        });
        match answer.await {
            Ok(_) | Err(CallError::Compacted) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Compacts while it runs, for ever: changes are kept for `retention` at the least and twice that at the most, also those from before
    /// it ran. For one server at a time (more do no harm). Nothing is sent again while nothing changes.
    pub async fn keep_compacted(&self, retention: Duration) -> Infallible {
        let (mut before, mut done) = (self.seen(), 0);
        loop {
            tokio::time::sleep(retention).await;
            if before > done {
                match self.compact(before).await {
                    Ok(()) => done = before,
                    Err(error) => tracing::warn!(
                        "etcd's history can't be compacted: {error}. It grows until etcd is full, unless etcd does it by itself \
                         (--auto-compaction-retention); then etcd_compaction=off"
                    ),
                }
            }
            before = self.seen();
        }
    }
}

impl Store for EtcdStore {
    type Watch = EtcdWatch;

    async fn accept(&self) -> Result<(), StoreError> {
        EtcdStore::accept(self).await.map(drop)
    }

    async fn health(&self) -> Vec<Health> {
        EtcdStore::health(self).await.iter().map(EndpointHealth::summary).collect()
    }

    async fn tidy(&self) -> Infallible {
        match self.0.members.settings.compaction {
            Some(retention) => self.keep_compacted(retention).await,
            None => std::future::pending().await,
        }
    }

    async fn range(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        for _ in 0..LISTINGS {
            match self.list(prefix).await {
                Err(CallError::Compacted) => {}
                other => return Ok(other?),
            }
        }
        Err(StoreError::Unavailable("etcd is compacted faster than it can be listed".into()))
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let layout = &self.0.members.settings.layout;
        let request = pb::RangeRequest { key: layout.entry(key), ..pb::RangeRequest::default() };
        let answer = self.0.range(request).await?;
        Ok(answer.kvs.first().and_then(|kv| convert::entry(kv, layout)))
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        let request = convert::request(&txn, &self.0.members.settings.layout)?;
        let effect = if txn.ops.is_empty() { Effect::Repeatable } else { Effect::Once };
        let answer = self.0.txn(request, effect).await?;
        convert::answer(&txn, &answer)
    }

    // etcd can also be asked how far a watch is, but before 3.4.25 and 3.5.8 it answers ahead of changes that it has still to send.
    async fn barrier(&self) -> Result<Revision, StoreError> {
        let request = convert::barrier(&self.0.members.settings.layout);
        let answer = self.0.txn(request, Effect::Repeatable).await?;
        Ok(of_etcd(answer.header.map_or(0, |h| h.revision)))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let timeout = self.0.members.settings.timeout;
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let request = pb::LeaseGrantRequest { ttl: i64::try_from(seconds.max(1)).unwrap_or(i64::MAX) };
        // A lease whose answer was lost ends by itself, and has no keys.
        let answer = self.0.members.call(Effect::Repeatable, |member| {
            let request = member.request(request, Some(timeout));
            async move { member.lease().lease_grant(request).await }
        });
        let answer = answer.await?.into_inner();
        match answer.error.as_str() {
            "" => Ok(LeaseId(answer.id)),
            error => Err(StoreError::Unavailable(format!("etcd grants no lease: {}", status::clean(error)))),
        }
    }

    // A leader whose disk hangs, or that has lost the others a moment ago, goes on renewing leases from memory, while another may
    // lead already and end them. Only a read shows that it leads; whoever leads next counts each lease from then on.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        let timeout = self.0.members.settings.timeout;
        let record = &self.0.members.settings.layout.registry();
        let answer = self.0.members.call(Effect::Repeatable, |member| async move {
            let read =
                pb::RangeRequest { key: record.clone(), keys_only: true, ..pb::RangeRequest::default() };
            member.kv().range(member.request(read, Some(timeout))).await?;
            let renewal = futures_util::stream::iter([pb::LeaseKeepAliveRequest { id: lease.0 }]);
            let mut answers = member.lease().lease_keep_alive(member.request(renewal, Some(timeout))).await?;
            // Only an answer says that it was renewed.
            let answer = answers.get_mut().message().await?;
            answer.ok_or_else(|| tonic::Status::unavailable("no answer to a lease's renewal"))
        });
        if answer.await?.ttl > 0 { Ok(()) } else { Err(StoreError::LeaseEnded) }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        let timeout = self.0.members.settings.timeout;
        let request = pb::LeaseRevokeRequest { id: lease.0 };
        let answer = self.0.members.call(Effect::Once, |member| {
            let request = member.request(request, Some(timeout));
            async move { member.lease().lease_revoke(request).await }
        });
        answer.await.map(drop).map_err(StoreError::from)
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<EtcdWatch, StoreError> {
        Ok(EtcdWatch::new(self.0.clone(), self.0.members.settings.layout.entries(prefix), after))
    }
}

impl EtcdStore {
    /// All entries below a prefix, page by page at the revision of the first.
    async fn list(&self, prefix: &str) -> Result<Snapshot, CallError> {
        let layout = &self.0.members.settings.layout;
        let (mut key, range_end) = layout.entries(prefix);
        let (mut revision, mut limit, mut entries) = (0, PAGE, Vec::new());
        loop {
            let request = pb::RangeRequest {
                key: key.clone(),
                range_end: range_end.clone(),
                limit,
                revision,
                ..pb::RangeRequest::default()
            };
            let page = match self.0.range(request).await {
                // One entry always fits.
                Err(CallError::LargeAnswer) if limit > 1 => {
                    limit = (limit / 8).max(1);
                    continue;
                }
                page => page?,
            };
            if revision == 0 {
                revision = page.header.map_or(0, |h| h.revision);
            }
            entries.extend(page.kvs.iter().filter_map(|kv| convert::entry(kv, layout)));
            let Some(last) = page.kvs.last().filter(|_| page.more) else {
                return Ok(Snapshot { entries, revision: of_etcd(revision) });
            };
            // The smallest key after it
            key = [&last.key[..], &[0]].concat().into();
            if page.kvs.iter().map(|kv| kv.value.len()).sum::<usize>() < SMALL_PAGE {
                limit = (limit * 2).min(LARGEST_PAGE);
            }
        }
    }
}
