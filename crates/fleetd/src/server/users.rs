//! Users of the API over https: what they show for who they are, and what they may do.
//!
//! | key | record |
//! |---|---|
//! | `user/NAME` | [`UserRecord`]: role, expiry, the hash of a token, the ID of a certificate's key |
//!
//! The records are followed into memory like the view, so that every request, and every stream that is open, goes by what is
//! committed now: a certificate says who somebody is, never what they may do.

use super::membership::{MembershipError, put, read};
use super::{Server, write::ATTEMPTS};
use fleet_link::ca::{KeyId, PublicKey, UserCertificate};
use fleet_link::user::UserName;
use fleet_registry::{Compare, Entry, Event, Op, Store, StoreError, Txn};
use fleet_trust::token::{Kind, SecretHash, Token, TokenId, TokenSecret};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tracing::{error, info};
use zeroize::Zeroizing;

const USERS: &str = "user/";
const FORMAT: u32 = 1;

/// What a user may do. Each may do what the one before may, and more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads everything but secrets.
    Viewer,
    /// Also changes units and what is said of machines.
    Operator,
    /// Also says who belongs to the cluster: machines, tokens, users.
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 3] = [Role::Viewer, Role::Operator, Role::Admin];

    /// Reads a role's name.
    pub fn parse(text: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.to_string() == text)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        })
    }
}

/// A user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRecord {
    format: u32,
    /// What the user may do.
    pub role: Role,
    /// When the user was made, seconds since 1970.
    pub created: u64,
    /// From when the user may do nothing any more, seconds since 1970.
    pub expires: u64,
    /// The ID of the user's token.
    pub token: TokenId,
    /// The SHA-256 of the token's secret.
    secret_sha256: String,
    /// The key of the user's certificate, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
}

/// What somebody shows for who they are.
#[derive(Clone, Debug)]
pub enum Credential {
    /// A token.
    Token(TokenId, TokenSecret),
    /// A certificate of this cluster, whose key was proved in the handshake.
    Certificate(UserCertificate),
}

/// Why a credential is worth nothing. None of the texts quotes a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// There is no such token, or its secret is another: told apart by nobody.
    #[error("the user token is wrong: this cluster knows no such token (was its user removed?)")]
    WrongToken,
    /// Its time is over.
    #[error("the access of user {0} has expired; fleetctl user create {0} makes it anew")]
    Expired(UserName),
    /// The user is gone, or was made anew.
    #[error("the certificate of user {0} is not valid any more: the user was removed")]
    Removed(UserName),
}

/// What a credential is good for, now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Access {
    pub user: UserName,
    pub role: Role,
    /// Until when, unless something changes.
    pub until: SystemTime,
}

/// A user just made: the only time that the token is known.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct NewUser {
    pub record: UserRecord,
    pub token: Zeroizing<String>,
    /// PEM.
    pub certificate: Option<String>,
    /// The cluster's CA, PEM.
    pub ca: String,
}

#[derive(Debug, Default)]
struct Table {
    users: BTreeMap<UserName, UserRecord>,
    tokens: HashMap<TokenId, UserName>,
}

impl Table {
    fn set(&mut self, name: UserName, record: Option<UserRecord>) {
        if let Some(before) = self.users.remove(&name) {
            self.tokens.remove(&before.token);
        }
        if let Some(record) = record {
            self.tokens.insert(record.token, name.clone());
            self.users.insert(name, record);
        }
    }
}

/// The users of the cluster, as they are in the registry.
#[derive(Debug)]
pub struct Users {
    table: RwLock<Table>,
    changed: watch::Sender<()>,
}

impl Users {
    pub(super) fn new() -> Self {
        Users { table: RwLock::default(), changed: watch::Sender::new(()) }
    }

    /// Forgets everybody but those of a snapshot.
    pub(super) fn reset(&self, entries: &[Entry]) {
        let mut table = Table::default();
        for entry in entries {
            if let Some((name, record)) = user_of(&entry.key, Some(entry)) {
                table.set(name, record);
            }
        }
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
        self.changed.send_replace(());
    }

    /// Takes over a change, if it is one of a user.
    pub(super) fn apply(&self, event: &Event) {
        if let Some((name, record)) = user_of(&event.key, event.entry.as_ref()) {
            self.table.write().unwrap_or_else(PoisonError::into_inner).set(name, record);
            self.changed.send_replace(());
        }
    }

    /// What a credential is good for at this time.
    pub fn check(&self, credential: &Credential, now: SystemTime) -> Result<Access, Denied> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let (name, record) = match credential {
            Credential::Token(id, secret) => {
                let found = table.tokens.get(id).and_then(|name| Some((name, table.users.get(name)?)));
                found
                    .filter(|(_, record)| {
                        SecretHash::parse(&record.secret_sha256).is_some_and(|kept| kept.is_of(secret))
                    })
                    .ok_or(Denied::WrongToken)?
            }
            Credential::Certificate(says) => table
                .users
                .get_key_value(&says.user)
                .filter(|(_, record)| record.key == Some(says.key))
                .ok_or_else(|| Denied::Removed(says.user.clone()))?,
        };
        let mut until = UNIX_EPOCH + Duration::from_secs(record.expires);
        if let Credential::Certificate(says) = credential {
            until = until.min(says.not_after);
        }
        if now >= until {
            return Err(Denied::Expired(name.clone()));
        }
        Ok(Access { user: name.clone(), role: record.role, until })
    }

    /// Wakes when any user has changed.
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// All users, also those whose time is over, by name.
    pub fn list(&self) -> Vec<(UserName, UserRecord)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.users.iter().map(|(name, record)| (name.clone(), record.clone())).collect()
    }
}

/// Which user a key of the registry is about, and the record. Who has a record that can't be read has no access.
fn user_of(key: &str, entry: Option<&Entry>) -> Option<(UserName, Option<UserRecord>)> {
    let name = UserName::parse(key.strip_prefix(USERS)?).ok()?;
    let record = entry.and_then(|entry| match read::<UserRecord>(entry) {
        Ok(record) if record.format == FORMAT => Some(record),
        Ok(record) => {
            error!(
                "registry record {key}: format {} is unknown here; user {name} has no access",
                record.format
            );
            None
        }
        Err(error) => {
            error!("{error}; user {name} has no access");
            None
        }
    });
    Some((name, record))
}

/// Whether a record can be read, if it is a user's.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_user_record(entry: &Entry) -> Result<(), String> {
    let Some(name) = entry.key.strip_prefix(USERS) else { return Ok(()) };
    UserName::parse(name).map_err(|error| error.to_string())?;
    match read::<UserRecord>(entry) {
        Ok(record) if record.format == FORMAT => Ok(()),
        Ok(record) => Err(format!("format {} is unknown here (known: {FORMAT})", record.format)),
        Err(MembershipError::Record { reason, .. }) => Err(reason),
        Err(error) => Err(error.to_string()),
    }
}

fn user_key(name: &UserName) -> String {
    format!("{USERS}{name}")
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl<S: Store> Server<S> {
    /// The users of the cluster.
    pub fn users(&self) -> &Users {
        &self.users
    }

    /// Makes a user, with a token and, for a key, a certificate. One of the same name whose time is over makes room.
    pub async fn create_user(
        &self,
        name: &UserName,
        role: Role,
        ttl: Duration,
        key: Option<&PublicKey>,
    ) -> Result<NewUser, MembershipError> {
        let authority = self.authority().await?;
        let now = SystemTime::now();
        let token = Token::generate(authority.root().fingerprint())
            .map_err(|error| MembershipError::Ca(fleet_link::ca::CaError::Failed(error.to_string())))?;
        let certificate = key.map(|key| authority.sign_user(key, name, ttl, now)).transpose()?;
        let record = UserRecord {
            format: FORMAT,
            role,
            created: seconds(now),
            expires: seconds(now).saturating_add(ttl.as_secs()),
            token: token.id,
            secret_sha256: token.secret.hash().to_string(),
            key: key.map(PublicKey::id),
        };
        self.change_user(name, |known| match known {
            Some(known) if known.expires > seconds(now) => {
                Err(MembershipError::Exists(format!("user {name}")))
            }
            _ => Ok(Some(record.clone())),
        })
        .await?;
        info!("made user {name}, {role}");
        let (token, ca) = (token.to_text(Kind::User), authority.root().to_pem());
        Ok(NewUser { record, token, certificate, ca })
    }

    /// Gives a user another role, which counts from the next request on.
    pub async fn set_role(&self, name: &UserName, role: Role) -> Result<UserRecord, MembershipError> {
        let changed = self
            .change_user(name, |known| match known {
                Some(known) => Ok(Some(UserRecord { role, ..known })),
                None => Err(MembershipError::Unknown(format!("user {name}"))),
            })
            .await?;
        info!("user {name} is {role} now");
        changed.ok_or_else(|| MembershipError::Unknown(format!("user {name}")))
    }

    /// Removes a user: token and certificate are worth nothing from now on, and open streams end.
    pub async fn remove_user(&self, name: &UserName) -> Result<(), MembershipError> {
        self.change_user(name, |known| match known {
            Some(_) => Ok(None),
            None => Err(MembershipError::Unknown(format!("user {name}"))),
        })
        .await?;
        info!("removed user {name}");
        Ok(())
    }

    /// Commits what `decide` makes of a user's record, and returns it when this server goes by it.
    async fn change_user(
        &self,
        name: &UserName,
        decide: impl Fn(Option<UserRecord>) -> Result<Option<UserRecord>, MembershipError>,
    ) -> Result<Option<UserRecord>, MembershipError> {
        let key = user_key(name);
        for _ in 0..ATTEMPTS {
            let entry = self.store.get(&key).await?;
            let fresh = decide(entry.as_ref().map(read).transpose()?)?;
            let op = match &fresh {
                Some(record) => put(key.clone(), record)?,
                None => Op::Delete { key: key.clone() },
            };
            let revision = entry.map_or(0, |entry| entry.revision);
            let txn = Txn { compares: vec![Compare { key: key.clone(), revision }], ops: vec![op] };
            match self.store.commit(txn).await {
                Ok(revision) => {
                    self.hub.reached(revision).await;
                    return Ok(fresh);
                }
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(MembershipError::Contended(format!("user {name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_trust::Fingerprint;

    const NOW: u64 = 1_800_000_000;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn name(text: &str) -> UserName {
        UserName::parse(text).unwrap()
    }

    fn token() -> Token {
        Token::generate(Fingerprint([1; 32])).unwrap()
    }

    fn record(role: Role, token: &Token, key: Option<KeyId>) -> UserRecord {
        UserRecord {
            format: FORMAT,
            role,
            created: NOW,
            expires: NOW + 100,
            token: token.id,
            secret_sha256: token.secret.hash().to_string(),
            key,
        }
    }

    fn event(user: &str, record: Option<&UserRecord>) -> Event {
        let key: std::sync::Arc<str> = format!("{USERS}{user}").into();
        let entry = record.map(|record| Entry {
            key: key.clone(),
            value: serde_json::to_vec(record).unwrap().into(),
            revision: 3,
        });
        Event { key, entry }
    }

    fn shown(token: &Token) -> Credential {
        Credential::Token(token.id, token.secret.clone())
    }

    #[test]
    fn a_token_is_good_until_it_expires_or_the_user_changes() {
        let users = Users::new();
        let (ann, other) = (token(), token());
        assert_eq!(users.check(&shown(&ann), at(NOW)), Err(Denied::WrongToken));
        users.apply(&event("ann", Some(&record(Role::Viewer, &ann, None))));
        let access = users.check(&shown(&ann), at(NOW + 99)).unwrap();
        assert_eq!((access.user, access.role, access.until), (name("ann"), Role::Viewer, at(NOW + 100)));
        assert_eq!(users.check(&shown(&ann), at(NOW + 100)), Err(Denied::Expired(name("ann"))));
        let forged = Credential::Token(ann.id, other.secret.clone());
        assert_eq!(users.check(&forged, at(NOW + 100)), Err(Denied::WrongToken), "learns nothing else");
        users.apply(&event("ann", Some(&record(Role::Admin, &ann, None))));
        assert_eq!(users.check(&shown(&ann), at(NOW)).unwrap().role, Role::Admin);
        // Made anew, with another token.
        users.apply(&event("ann", Some(&record(Role::Admin, &other, None))));
        assert_eq!(users.check(&shown(&ann), at(NOW)), Err(Denied::WrongToken));
        assert!(users.check(&shown(&other), at(NOW)).is_ok());
        users.apply(&event("ann", None));
        assert_eq!(users.check(&shown(&other), at(NOW)), Err(Denied::WrongToken));
        assert!(users.list().is_empty());
    }

    #[test]
    fn a_certificate_is_good_for_its_key_and_its_time() {
        let users = Users::new();
        let (key, other): (KeyId, KeyId) = ("1".repeat(64).parse().unwrap(), "2".repeat(64).parse().unwrap());
        let says = |key, not_after| {
            Credential::Certificate(UserCertificate { user: name("ann"), key, not_after: at(not_after) })
        };
        assert_eq!(users.check(&says(key, NOW + 50), at(NOW)), Err(Denied::Removed(name("ann"))));
        users.apply(&event("ann", Some(&record(Role::Operator, &token(), Some(key)))));
        assert_eq!(users.check(&says(key, NOW + 50), at(NOW)).unwrap().until, at(NOW + 50));
        assert_eq!(users.check(&says(key, NOW + 500), at(NOW)).unwrap().until, at(NOW + 100));
        assert_eq!(users.check(&says(key, NOW + 50), at(NOW + 50)), Err(Denied::Expired(name("ann"))));
        assert_eq!(users.check(&says(other, NOW + 50), at(NOW)), Err(Denied::Removed(name("ann"))));
        // A user without a certificate is none of any key.
        users.apply(&event("ann", Some(&record(Role::Operator, &token(), None))));
        assert_eq!(users.check(&says(key, NOW + 50), at(NOW)), Err(Denied::Removed(name("ann"))));
    }

    #[test]
    fn who_can_not_be_read_has_no_access() {
        let users = Users::new();
        let ann = token();
        for wrong in [r#""format":2"#, r#""format":1,"later":1,"role":"king""#] {
            users.apply(&event("ann", Some(&record(Role::Viewer, &ann, None))));
            assert!(users.check(&shown(&ann), at(NOW)).is_ok());
            let text = serde_json::to_string(&record(Role::Viewer, &ann, None)).unwrap();
            let text = text.replace(r#""format":1"#, wrong).replacen(
                r#""role":"viewer","#,
                "",
                usize::from(wrong.contains("king")),
            );
            let mut broken = event("ann", None);
            broken.entry =
                Some(Entry { key: broken.key.clone(), value: text.as_bytes().into(), revision: 4 });
            users.apply(&broken);
            assert_eq!(users.check(&shown(&ann), at(NOW)), Err(Denied::WrongToken), "{text}");
        }
    }

    #[test]
    fn a_snapshot_replaces_everything() {
        let users = Users::new();
        let (ann, bob) = (token(), token());
        users.apply(&event("ann", Some(&record(Role::Viewer, &ann, None))));
        let entry = event("bob", Some(&record(Role::Viewer, &bob, None))).entry.unwrap();
        users.reset(&[entry]);
        assert!(users.check(&shown(&ann), at(NOW)).is_err());
        assert!(users.check(&shown(&bob), at(NOW)).is_ok());
    }

    #[test]
    fn nothing_but_the_hash_is_kept() {
        let ann = token();
        let text = serde_json::to_string(&record(Role::Viewer, &ann, None)).unwrap();
        let secret = ann.secret.to_bytes();
        assert!(!text.contains(&format!("{secret:?}")));
        assert!(!text.contains(&ann.to_text(Kind::User)[20..50]), "{text}");
        assert!(text.contains(&ann.secret.hash().to_string()));
    }
}
