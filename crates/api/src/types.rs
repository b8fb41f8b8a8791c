//! Bodies of the API, with the original's key order (alphabetical) and optional fields (left out when empty).
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct Unit {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub current_state: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub desired_state: String,
    /// Ours: the file's text, byte for byte; only in requests (the text is at `units/NAME/file`). The options say
    /// the same for servers that do not know it; where both are given they have to agree.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    #[serde(rename = "machineID", skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<UnitOption>,
}

/// Ours: one of many changes of units; `POST unit-changes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct UnitChange {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub desired_state: String,
    /// The unit is destroyed; all else but the name has no meaning then.
    #[serde(skip_serializing_if = "is_not_set")]
    pub destroy: bool,
    /// The file's text, byte for byte, where it is new or to be replaced.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    pub name: String,
}

/// Ours: `POST unit-changes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct UnitChangeList {
    pub changes: Vec<UnitChange>,
}

/// Ours: what came of one change: what a request for this unit alone would have been answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnitChangeOutcome {
    /// The HTTP status code: 201 when a unit was made or its file replaced, 204 when something else was done.
    pub code: u16,
    /// Why it was refused.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Ours: the answer to `POST unit-changes`, in the order of the changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct UnitChangeOutcomes {
    pub outcomes: Vec<UnitChangeOutcome>,
}

/// Ours: what an import of the registry did; `POST registry/import`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RegistryImport {
    /// How many records were written, or removed.
    pub changed: u64,
    /// How many records there are.
    pub records: u64,
}

/// The most changes that one request may have.
pub const MOST_CHANGES: usize = 1000;

/// An option of a unit file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct UnitOption {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub section: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub value: String,
}

/// What systemd on a machine says of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct UnitState {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hash: String,
    #[serde(rename = "machineID", skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub systemd_active_state: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub systemd_load_state: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub systemd_sub_state: String,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Machine {
    /// Ours: no new unit is placed there.
    #[serde(skip_serializing_if = "is_not_set")]
    pub cordoned: bool,
    /// Ours: its units are to move away; no new unit is placed there either.
    #[serde(skip_serializing_if = "is_not_set")]
    pub draining: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    #[serde(rename = "primaryIP", skip_serializing_if = "String::is_empty")]
    pub primary_ip: String,
}

/// Flags that are not set are left out, so that machines look as the original's.
fn is_not_set(flag: &bool) -> bool {
    !flag
}

/// Ours: how far the units of a machine have moved away; before a drain, how that would go. `GET machines/ID/drain`. Global units are
/// in no list: they stay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Drain {
    /// Whether the machine is marked to be drained.
    pub draining: bool,
    /// The machine.
    #[serde(rename = "machineID")]
    pub machine_id: String,
    /// Units taken off that still run, or are being stopped, there.
    pub stopping: Vec<String>,
    /// Units that fit elsewhere and go when it is their turn.
    pub to_move: Vec<String>,
    /// Units that stay because they have nowhere to go.
    pub undrained: Vec<Undrained>,
}

/// Ours: a unit that has nowhere to go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Undrained {
    /// The unit.
    pub name: String,
    /// Why it does not fit, for each other machine.
    pub reasons: Vec<Reason>,
}

/// Ours: something about the cluster as a whole that its operators should know, for as long as it lasts; `GET notices`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Notice {
    /// What it is: `massLoss`, many machines vanished at once and their units are placed elsewhere a few at a time.
    pub id: String,
    /// Since when, seconds since 1970.
    pub since: i64,
    /// In words for people.
    pub text: String,
}

/// Ours: `GET notices`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct NoticeList {
    pub notices: Vec<Notice>,
}

/// Ours: why a unit is not (yet) what it should be; `GET units/NAME/explain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct Explanation {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub current_state: String,
    /// Why it is not placed (elsewhere) yet, though a machine fits.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub delayed: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub desired_state: String,
    #[serde(rename = "machineID", skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    pub name: String,
    /// What went wrong on a machine with the last thing done there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Reason>,
    /// Why it is not placed: for each machine; one entry without a machine where none is there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unplaced: Vec<Reason>,
}

/// A reason, on a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct Reason {
    #[serde(rename = "machineID", skip_serializing_if = "String::is_empty")]
    pub machine_id: String,
    pub reason: String,
}

/// `PATCH machines`: one edit of a machine's metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct MetadataOp {
    pub op: String,
    pub path: String,
    pub value: Option<serde_json::Value>,
}

/// Ours: what is asked of a new join token; `POST join-tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct JoinTokenRequest {
    /// How long it is good for, as a [`duration`](crate::duration); the server's default is 24h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    /// How many machines may join with it; any number when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
}

/// Ours: a join token just made, the only time that its secret is told.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NewJoinToken {
    /// When it expires, seconds since 1970.
    pub expires: i64,
    /// The name under which it is listed and revoked.
    pub id: String,
    /// The token itself, for `join_token`: a secret.
    pub token: String,
    /// How many machines may still join with it; any number when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uses_left: Option<u32>,
}

impl std::fmt::Debug for NewJoinToken {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewJoinToken")
            .field("expires", &self.expires)
            .field("id", &self.id)
            .field("uses_left", &self.uses_left)
            .finish_non_exhaustive()
    }
}

/// Ours: a join token as it is listed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JoinToken {
    /// When it was made, seconds since 1970.
    pub created: i64,
    /// When it expires, seconds since 1970.
    pub expires: i64,
    /// The name under which it is revoked.
    pub id: String,
    /// How many machines may still join with it; any number when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uses_left: Option<u32>,
}

/// Ours: `GET join-tokens`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct JoinTokenList {
    pub join_tokens: Vec<JoinToken>,
}

/// Ours: a machine that joined with a token, whether or not it is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Member {
    /// Whether it has a session with a server now.
    pub connected: bool,
    /// When it joined, seconds since 1970.
    pub joined: i64,
    /// Its ID.
    #[serde(rename = "machineID")]
    pub machine_id: String,
    /// Whether it was removed and has not heard so yet, or has not stopped its units yet.
    #[serde(skip_serializing_if = "is_not_set")]
    pub removed: bool,
}

/// Ours: `GET members`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct MemberList {
    pub members: Vec<Member>,
}

/// A server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Server {
    /// Where other servers and agents reach it; empty when it listens on no port.
    pub address: String,
    /// How many seconds ago it last reached the registry; each server tries every 3 s. None when that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heard: Option<u64>,
    /// How many revisions it is behind the server that is furthest; none when that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<u64>,
    /// Whether its engine decides.
    pub leader: bool,
    /// The machine it runs on.
    #[serde(rename = "machineID")]
    pub machine_id: String,
    /// Why it does not say how it is; empty when it does.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub problem: String,
    /// The revision of the registry that it knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// Since when it runs, seconds since 1970.
    pub started: i64,
    /// Its version.
    pub version: String,
}

/// A part of the registry: a member of etcd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RegistryMember {
    /// How it is, in words.
    pub detail: String,
    /// Where it is reached.
    pub endpoint: String,
    /// Whether it can be reached, and works.
    pub healthy: bool,
    /// Whether the server that answers uses it.
    pub in_use: bool,
}

/// All servers, and the members of their registry; none for a registry that a server has for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ServerList {
    pub registry: Vec<RegistryMember>,
    pub servers: Vec<Server>,
}

/// Ours: what is asked of a new user (`POST users`), or of one that is there (`PATCH users/NAME`, only the role).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserRequest {
    /// The name: 1 to 64 letters, digits, `.`, `_` and `-`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// A certificate request in PEM, for a certificate with its key (ECDSA P-256).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// `viewer`, `operator` or `admin`.
    pub role: String,
    /// How long the user has access, as a [`duration`](crate::duration); the server's default is 8760h.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
}

/// Ours: a user just made, the only time that the token is told.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewUser {
    /// The certificate of the cluster's CA, PEM.
    pub ca: String,
    /// The user's certificate, PEM, if one was asked for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub certificate: String,
    /// When the access ends, seconds since 1970.
    pub expires: i64,
    /// The user's name.
    pub name: String,
    /// The user's role.
    pub role: String,
    /// The token: a secret.
    pub token: String,
}

impl std::fmt::Debug for NewUser {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewUser").field("name", &self.name).field("role", &self.role).finish_non_exhaustive()
    }
}

/// Ours: a user as it is listed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct User {
    /// Whether the user has a certificate besides the token.
    pub certificate: bool,
    /// Seconds since 1970.
    pub created: i64,
    /// When the access ends, seconds since 1970.
    pub expires: i64,
    pub name: String,
    pub role: String,
}

/// Ours: `GET users`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct UserList {
    pub users: Vec<User>,
}

/// A page of units.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct UnitPage {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next_page_token: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub units: Vec<Unit>,
}

/// A page of unit states.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct UnitStatePage {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next_page_token: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<UnitState>,
}

/// A page of machines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs)]
pub struct MachinePage {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<Machine>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub next_page_token: String,
}

/// An error answer: `{"error":{"code":404,"message":"unit does not exist"}}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ErrorDetail {
    pub code: u16,
    #[serde(default)]
    pub message: String,
}
