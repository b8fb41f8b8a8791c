//! Who belongs to the cluster: its CA, join tokens, and the machines that joined. All of it lives in the registry; none of it is
//! part of the view, since no placement depends on it.
//!
//! | key | record |
//! |---|---|
//! | `ca` | [`CaRecord`]: the CA's certificate and key |
//! | `token/ID` | [`TokenRecord`]: what is needed to check a token, not enough to use it |
//! | `member/ID` | [`MemberRecord`]: the key with which a machine joined |
//! | `removed/ID` | [`RemovedRecord`]: a machine that was removed and has not let go of its units yet (see `dismiss`) |
//!
//! The CA's key is as safe as the registry: the embedded one is a file that only root (or the user fleet) can read. Whoever reads the
//! registry of a cluster could change all of it anyway.

use super::{Server, hub::lock, now_seconds, write::ATTEMPTS};
use fleet_cluster::model::MachineId;
use fleet_link::ca::{Authority, CaError, KeyId, MACHINE_VALIDITY};
use fleet_link::serve::{Joining, Member, Membership, Refusal};
use fleet_link::token::{Terms, Token, TokenError, TokenId, TokenRecord};
use fleet_registry::records::{PresenceRecord, machine_key, presence_key, put_presence, states_key};
use fleet_registry::{Compare, Entry, Event, LeaseId, Op, Snapshot, Store, StoreError, Txn};
use fleet_unit::OnIsolation;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::time::SystemTime;
use tracing::{info, warn};
use zeroize::Zeroizing;

pub(super) const CA: &str = "ca";
const TOKENS: &str = "token/";
const MEMBERS: &str = "member/";
const REMOVED: &str = "removed/";
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct CaRecord {
    format: u32,
    certificate: String,
    key: Zeroizing<String>,
}

/// A machine that joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemberRecord {
    format: u32,
    /// The key it proved to have.
    pub key: KeyId,
    /// When, seconds since 1970.
    pub joined: u64,
}

/// A machine that was removed from the cluster and has not let go of its units yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RemovedRecord {
    format: u32,
    /// The key it had as a member, by which it is known should it come once more.
    key: KeyId,
    joined: u64,
    /// When it was removed, seconds since 1970.
    removed: u64,
}

/// A machine that joined, as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedMember {
    /// Its ID.
    pub machine: MachineId,
    /// When it joined, seconds since 1970.
    pub joined: u64,
    /// Whether it was removed and has not let go of its units yet.
    pub removed: bool,
}

/// Why something about membership could not be done.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The registry did not answer, or not take it.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A key or certificate could not be made or read.
    #[error("the cluster's CA: {0}")]
    Ca(#[from] CaError),
    /// A record that can't be read.
    #[error("registry record {key}: {reason}")]
    #[allow(missing_docs)]
    Record { key: String, reason: String },
    /// There is no such token or machine.
    #[error("{0} does not exist")]
    Unknown(String),
    /// There is one of this name.
    #[error("{0} exists already")]
    Exists(String),
    /// Others kept writing at the same time.
    #[error("{0} is being changed by others; try again")]
    Contended(String),
}

fn token_key(id: &TokenId) -> String {
    format!("{TOKENS}{id}")
}

pub(super) fn member_key(id: &MachineId) -> String {
    format!("{MEMBERS}{id}")
}

pub(super) fn removed_key(id: &MachineId) -> String {
    format!("{REMOVED}{id}")
}

/// The machine whose removal a key of the registry tells of.
pub(super) fn removed_machine(key: &str) -> Option<MachineId> {
    MachineId::parse(key.strip_prefix(REMOVED)?).ok()
}

pub(super) fn read<T: DeserializeOwned>(entry: &Entry) -> Result<T, MembershipError> {
    serde_json::from_slice(&entry.value)
        .map_err(|error| MembershipError::Record { key: entry.key.to_string(), reason: error.to_string() })
}

pub(super) fn put<T: Serialize>(key: String, record: &T) -> Result<Op, MembershipError> {
    match serde_json::to_vec(record) {
        Ok(value) => Ok(Op::Put { key, value, lease: None }),
        Err(error) => Err(MembershipError::Record { key, reason: error.to_string() }),
    }
}

/// Whether a record can be read, if it is one of these.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_member_record(entry: &Entry) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    fn of<T: DeserializeOwned>(entry: &Entry) -> Result<T, String> {
        let not = |error| format!("not a record: {error}");
        let Format { format } = serde_json::from_slice(&entry.value).map_err(not)?;
        if format != FORMAT {
            return Err(format!(
                "format {format} is unknown here (known: {FORMAT}); is it of a newer fleetd?"
            ));
        }
        serde_json::from_slice(&entry.value).map_err(not)
    }
    let machine = |id: &str| MachineId::parse(id).map(drop).map_err(|error| error.to_string());
    match entry.key.split_once('/') {
        None if &*entry.key == CA => {
            let record: CaRecord = of(entry)?;
            Authority::from_pem(&record.certificate, &record.key).map(drop).map_err(|error| error.to_string())
        }
        Some(("token", id)) => {
            let record: TokenRecord = of(entry)?;
            if record.id.to_string() == id { Ok(()) } else { Err("it is of another token".to_owned()) }
        }
        Some(("member", id)) => machine(id).and_then(|()| of::<MemberRecord>(entry).map(drop)),
        Some(("removed", id)) => machine(id).and_then(|()| of::<RemovedRecord>(entry).map(drop)),
        _ => Ok(()),
    }
}

fn revision_of(entry: Option<&Entry>) -> u64 {
    entry.map_or(0, |entry| entry.revision)
}

impl<S: Store> Server<S> {
    /// The cluster's CA; made when there is none.
    pub async fn authority(&self) -> Result<Authority, MembershipError> {
        for _ in 0..ATTEMPTS {
            if let Some(entry) = self.store.get(CA).await? {
                let record: CaRecord = read(&entry)?;
                return Ok(Authority::from_pem(&record.certificate, &record.key)?);
            }
            let authority = Authority::create(SystemTime::now())?;
            let record =
                CaRecord { format: FORMAT, certificate: authority.root().to_pem(), key: authority.key_pem() };
            let txn = Txn {
                compares: vec![Compare { key: CA.to_owned(), revision: 0 }],
                ops: vec![put(CA.to_owned(), &record)?],
            };
            match self.store.commit(txn).await {
                Ok(_) => {
                    info!("made the CA of this cluster, {}", authority.root().fingerprint());
                    return Ok(authority);
                }
                // Another server was faster: its CA is the cluster's.
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(MembershipError::Contended("the cluster's CA".to_owned()))
    }

    /// Makes a join token. Its secret is known to the caller only.
    pub async fn create_token(&self, terms: Terms) -> Result<(Token, TokenRecord), MembershipError> {
        let authority = self.authority().await?;
        let (token, record) = Token::create(authority.root().fingerprint(), &terms, SystemTime::now())?;
        let key = token_key(&token.id);
        let txn =
            Txn { compares: vec![Compare { key: key.clone(), revision: 0 }], ops: vec![put(key, &record)?] };
        self.store.commit(txn).await?;
        info!("made join token {}", token.id);
        Ok((token, record))
    }

    /// All join tokens that are not over.
    pub async fn tokens(&self) -> Result<Vec<TokenRecord>, MembershipError> {
        let now = SystemTime::now();
        let records = self
            .store
            .range(TOKENS)
            .await?
            .entries
            .iter()
            .map(read::<TokenRecord>)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(records.into_iter().filter(|record| !record.revoked && !record.is_over(now)).collect())
    }

    /// Takes a join token back.
    pub async fn revoke_token(&self, id: &str) -> Result<(), MembershipError> {
        let key = format!("{TOKENS}{id}");
        let Some(entry) = self.store.get(&key).await? else {
            return Err(MembershipError::Unknown(format!("join token {id}")));
        };
        let txn = Txn {
            compares: vec![Compare { key: key.clone(), revision: entry.revision }],
            ops: vec![Op::Delete { key }],
        };
        match self.store.commit(txn).await {
            Ok(_) => Ok(()),
            Err(StoreError::Conflict(_)) => Err(MembershipError::Contended(format!("join token {id}"))),
            Err(error) => Err(error.into()),
        }
    }

    /// All machines that joined, by ID; also those that were removed and have not let go of their units yet, unless their certificates
    /// have expired meanwhile, so that they can't come back.
    pub async fn members(&self) -> Result<Vec<ListedMember>, MembershipError> {
        let mut listed = Vec::new();
        for entry in &self.store.range(MEMBERS).await?.entries {
            let Some(machine) = entry.key.strip_prefix(MEMBERS).and_then(|id| MachineId::parse(id).ok())
            else {
                continue;
            };
            let record: MemberRecord = read(entry)?;
            listed.push(ListedMember { machine, joined: record.joined, removed: false });
        }
        for entry in &self.store.range(REMOVED).await?.entries {
            let Some(machine) = removed_machine(&entry.key) else { continue };
            let record: RemovedRecord = read(entry)?;
            if now_seconds().saturating_sub(record.removed) < MACHINE_VALIDITY.as_secs() {
                listed.push(ListedMember { machine, joined: record.joined, removed: true });
            }
        }
        listed.sort_by(|a, b| a.machine.cmp(&b.machine));
        Ok(listed)
    }

    /// Puts a machine out of the cluster: its credentials are worth nothing any more, and it is told to let go of its units, now or when
    /// it comes once more (see `dismiss`). Then they are placed elsewhere.
    pub async fn remove_machine(&self, id: &MachineId) -> Result<(), MembershipError> {
        let Some(entry) = self.store.get(&member_key(id)).await? else {
            return Err(MembershipError::Unknown(format!("machine {id}, as one that joined,")));
        };
        let member: MemberRecord = read(&entry)?;
        let removed =
            RemovedRecord { format: FORMAT, key: member.key, joined: member.joined, removed: now_seconds() };
        let mut txn = Txn {
            compares: vec![Compare { key: member_key(id), revision: entry.revision }],
            ops: vec![
                Op::Delete { key: member_key(id) },
                Op::Delete { key: machine_key(id) },
                put(removed_key(id), &removed)?,
            ],
        };
        let farewell = self.add_farewell(&mut txn, id).await?;
        match self.store.commit(txn).await {
            Ok(revision) => {
                if let Some(lease) = farewell {
                    self.end_lease(lease).await?;
                }
                self.hub.reached(revision).await;
            }
            // Something of the machine was written meanwhile, or its presence ran out.
            Err(StoreError::Conflict(_) | StoreError::LeaseEnded) => {
                return Err(MembershipError::Contended(format!("machine {id}")));
            }
            Err(error) => return Err(error.into()),
        }
        info!(machine = %id, "removed machine {id} from the cluster");
        Ok(())
    }

    /// Notes that a machine was removed, through whichever server that was: lets its session know, or the task that ends its presence.
    pub(super) fn note_removal(&self, event: &Event) {
        if let (Some(id), true) = (removed_machine(&event.key), event.entry.is_some()) {
            self.tell_removed(&id);
            if self.config.shared_registry {
                self.peers.note_removed(id);
            }
        }
    }

    /// The same for all that the registry has, when it was listed anew and events may have been missed.
    pub(super) fn note_removals(&self, snapshot: &Snapshot) {
        snapshot
            .entries
            .iter()
            .filter_map(|entry| removed_machine(&entry.key))
            .for_each(|id| self.tell_removed(&id));
    }

    /// Whether a machine that joined was not removed since.
    pub(super) async fn is_member(&self, id: &MachineId) -> Result<bool, MembershipError> {
        Ok(self.store.get(&member_key(id)).await?.is_some())
    }

    /// Adds to a transaction what ends a machine's presence as when it leaves: first it is said, then the presence ends with the lease that
    /// is returned, which is to be revoked when that is committed. `None`: there is no presence, or it is not to be ended.
    ///
    /// It is the lease of the machine's session, if that goes on somewhere after all: under another one the session would go on renewing its
    /// own, and tell the machine that it is there.
    pub(super) async fn add_farewell(
        &self,
        txn: &mut Txn,
        id: &MachineId,
    ) -> Result<Option<LeaseId>, MembershipError> {
        // Which servers are there, and what may run on the machine, must not be what was so long ago.
        let now = self.store.barrier().await?;
        self.hub.reached(now).await;
        let Some(presence) = self.store.get(&presence_key(id)).await? else { return Ok(None) };
        let record: PresenceRecord = read(&presence)?;
        if !self.may_end_presence(id, record.server.as_ref()) {
            return Ok(None);
        }
        let lease = match record.lease {
            Some(lease) => lease,
            // Written by an older version.
            None => self.store.grant(self.config.agent_ttl).await?,
        };
        let record = PresenceRecord { leaving: true, ..record };
        txn.compares.push(Compare { key: presence_key(id), revision: presence.revision });
        txn.ops.push(put_presence(id, &record, lease));
        txn.ops.push(Op::Delete { key: states_key(id) });
        Ok(Some(lease))
    }

    /// Ends a lease, if it has not ended by itself.
    pub(super) async fn end_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        match self.store.revoke(lease).await {
            Err(StoreError::LeaseEnded) => Ok(()),
            ended => ended,
        }
    }

    /// Whether the presence of a machine that is removed ends with that, and does not run out. Not while it has a session, in which it
    /// lets go of its units first. Nor when it may run a unit that must not run twice: that stops before the presence has run out.
    /// `server` has written the presence.
    fn may_end_presence(&self, id: &MachineId, server: Option<&MachineId>) -> bool {
        // Another server that is there may have its session.
        let elsewhere = self.config.shared_registry
            && server.is_none_or(|it| *it != self.config.machine && self.peers.servers().contains_key(it));
        if elsewhere || self.is_connected(id) {
            return false;
        }
        let view = self.hub.view();
        if view.leaving_from(id).next().is_some() {
            return false;
        }
        let mut units = view.scheduled_on(id).chain(view.reported_on(id)).filter_map(|name| view.unit(name));
        !units.any(|unit| unit.requirements.on_isolation == OnIsolation::Stop)
    }

    /// Whether a machine was removed and has not let go of its units yet.
    pub(super) async fn is_removed(&self, id: &MachineId) -> Result<bool, StoreError> {
        Ok(self.store.get(&removed_key(id)).await?.is_some())
    }

    /// Forgets a machine that was removed: it has let go of its units.
    pub(super) async fn forget_removed(&self, id: &MachineId) -> Result<(), StoreError> {
        self.store.commit(Txn::of(Op::Delete { key: removed_key(id) })).await.map(drop)
    }

    /// Whether a machine has a session: with this server, or, as the registry has it, with another one that is there.
    pub fn is_connected(&self, id: &MachineId) -> bool {
        if lock(&self.sessions).contains_key(id) {
            return true;
        }
        let there = self.peers.session_of(id).filter(|server| *server != self.config.machine);
        there.is_some_and(|server| self.peers.servers().contains_key(&server))
    }

    async fn try_join(&self, joining: &Joining) -> Result<(), JoinError> {
        for _ in 0..ATTEMPTS {
            let token = self.store.get(&token_key(&joining.token)).await.map_err(MembershipError::from)?;
            let member =
                self.store.get(&member_key(&joining.machine)).await.map_err(MembershipError::from)?;
            let record = token.as_ref().map(read::<TokenRecord>).transpose()?;
            let known = member.as_ref().map(read::<MemberRecord>).transpose()?;
            let Some(record) = record else { return Err(Refusal::Token(TokenError::Wrong).into()) };
            // A machine whose answer got lost comes again with the same key: the token's use was counted already.
            let again = known.as_ref().is_some_and(|known| known.key == joining.key);
            match record.check(&joining.secret, SystemTime::now()) {
                Err(TokenError::UsedUp | TokenError::Expired) if again => {}
                other => other.map_err(Refusal::from)?,
            }
            if again {
                return Ok(());
            }
            if known.is_some() || joining.machine == self.config.machine {
                return Err(Refusal::OtherKey(joining.machine.clone()).into());
            }
            let fresh = MemberRecord { format: FORMAT, key: joining.key, joined: now_seconds() };
            let (token_key, member_key) = (token_key(&joining.token), member_key(&joining.machine));
            let txn = Txn {
                compares: vec![
                    Compare { key: token_key.clone(), revision: revision_of(token.as_ref()) },
                    Compare { key: member_key.clone(), revision: revision_of(member.as_ref()) },
                ],
                ops: vec![
                    put(token_key, &record.used())?,
                    put(member_key, &fresh)?,
                    // What it ran before it was removed is its session's business now.
                    Op::Delete { key: removed_key(&joining.machine) },
                ],
            };
            match self.store.commit(txn).await {
                Ok(_) => {
                    info!(machine = %joining.machine, "machine {} joined from {}", joining.machine, joining.peer);
                    return Ok(());
                }
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(MembershipError::from(error).into()),
            }
        }
        Err(Refusal::NotNow("too many machines join at the same time".to_owned()).into())
    }

    async fn check_member(&self, member: &Member) -> Result<(), JoinError> {
        let entry = self.store.get(&member_key(&member.machine)).await.map_err(MembershipError::from)?;
        match entry.as_ref().map(read::<MemberRecord>).transpose()? {
            Some(record) if record.key == member.key => Ok(()),
            Some(_) => Err(Refusal::OtherKey(member.machine.clone()).into()),
            None => Err(Refusal::Unknown(member.machine.clone()).into()),
        }
    }
}

impl<S: Store> Server<S> {
    async fn was_member(&self, member: &Member) -> Result<bool, MembershipError> {
        let entry = self.store.get(&removed_key(&member.machine)).await?;
        let record = entry.as_ref().map(read::<RemovedRecord>).transpose()?;
        Ok(record.is_some_and(|record| record.key == member.key))
    }
}

#[derive(Debug, thiserror::Error)]
enum JoinError {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Failed(#[from] MembershipError),
}

impl JoinError {
    /// What the machine hears: a failure of ours is no refusal, and its details are for our log.
    fn into_refusal(self) -> Refusal {
        match self {
            JoinError::Refused(refusal) => refusal,
            JoinError::Failed(error) => {
                warn!("checking a machine's membership: {error}");
                Refusal::NotNow("its registry does not answer".to_owned())
            }
        }
    }
}

impl<S: Store> Membership for Server<S> {
    async fn join(&self, joining: Joining) -> Result<(), Refusal> {
        self.try_join(&joining).await.map_err(JoinError::into_refusal)
    }

    async fn renew(&self, member: &Member) -> Result<(), Refusal> {
        self.check_member(member).await.map_err(JoinError::into_refusal)
    }

    /// Admits members, and once more who was removed: to be told so.
    async fn admit(&self, member: &Member) -> Result<(), Refusal> {
        match self.check_member(member).await {
            Err(refused @ JoinError::Refused(Refusal::Unknown(_))) => match self.was_member(member).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(refused.into_refusal()),
                Err(error) => Err(JoinError::Failed(error).into_refusal()),
            },
            checked => checked.map_err(JoinError::into_refusal),
        }
    }
}
