//! Join tokens, and the machines that joined.

use super::{Answer, Api, empty, failure, json, read_body};
use crate::config::duration;
use crate::server::MembershipError;
use fleet_api::types::{JoinToken, JoinTokenList, JoinTokenRequest, Member, MemberList, NewJoinToken};
use fleet_cluster::model::MachineId;
use fleet_link::token::{Terms, TokenRecord};
use fleet_registry::Store;
use hyper::{Request, StatusCode, body::Incoming};
use std::time::Duration;

/// How long a token is good unless its maker says otherwise, and at most.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
const MAX_TTL: Duration = Duration::from_secs(366 * 24 * 3600);

/// Seconds since 1970 as the API has them.
pub(super) fn seconds(time: u64) -> i64 {
    i64::try_from(time).unwrap_or(i64::MAX)
}

/// How long something is to be good for.
pub(super) fn ttl(text: Option<&str>, default: Duration, longest: Duration) -> Result<Duration, String> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(default) };
    match duration::parse(text) {
        Ok(ttl) if (Duration::from_secs(1)..=longest).contains(&ttl) => Ok(ttl),
        Ok(_) => {
            let hours = longest.as_secs() / 3600;
            Err(format!("ttl must be from 1s to {} days ({hours}h)", hours / 24))
        }
        Err(error) => Err(format!("ttl: {error}")),
    }
}

/// Reads the body of `POST join-tokens`.
pub(super) fn read_terms(bytes: &[u8]) -> Result<Terms, String> {
    let asked: JoinTokenRequest = match bytes.trim_ascii() {
        [] => JoinTokenRequest::default(),
        body => serde_json::from_slice(body).map_err(|error| format!("unable to decode body: {error}"))?,
    };
    let ttl = ttl(asked.ttl.as_deref(), DEFAULT_TTL, MAX_TTL)?;
    if asked.uses == Some(0) {
        return Err("uses must be 1 or more".to_owned());
    }
    Ok(Terms { ttl, uses: asked.uses })
}

fn listed(record: &TokenRecord) -> JoinToken {
    JoinToken {
        created: seconds(record.created),
        expires: seconds(record.expires),
        id: record.id.to_string(),
        uses_left: record.uses_left,
    }
}

impl<S: Store> Api<S> {
    pub(super) async fn join_tokens(&self) -> Answer {
        match self.server.tokens().await {
            Ok(records) => {
                let join_tokens = records.iter().map(listed).collect();
                json(StatusCode::OK, &JoinTokenList { join_tokens })
            }
            Err(error) => membership_failure(&error),
        }
    }

    pub(super) async fn create_join_token(&self, request: Request<Incoming>) -> Answer {
        let bytes = match read_body(request.into_body()).await {
            Ok(bytes) => bytes,
            Err(answer) => return answer,
        };
        let terms = match read_terms(&bytes) {
            Ok(terms) => terms,
            Err(message) => return failure(StatusCode::BAD_REQUEST, &message),
        };
        match self.server.create_token(terms).await {
            Ok((token, record)) => {
                let made = NewJoinToken {
                    expires: seconds(record.expires),
                    id: record.id.to_string(),
                    token: token.to_text().to_string(),
                    uses_left: record.uses_left,
                };
                json(StatusCode::CREATED, &made)
            }
            Err(error) => membership_failure(&error),
        }
    }

    pub(super) async fn revoke_join_token(&self, id: &str) -> Answer {
        match self.server.revoke_token(id).await {
            Ok(()) => empty(StatusCode::NO_CONTENT),
            Err(error) => membership_failure(&error),
        }
    }

    pub(super) async fn members(&self) -> Answer {
        match self.server.members().await {
            Ok(members) => {
                let members = members.iter().map(|member| Member {
                    connected: self.server.is_connected(&member.machine),
                    joined: seconds(member.joined),
                    machine_id: member.machine.to_string(),
                    removed: member.removed,
                });
                json(StatusCode::OK, &MemberList { members: members.collect() })
            }
            Err(error) => membership_failure(&error),
        }
    }

    pub(super) async fn remove_machine(&self, id: &str) -> Answer {
        let id = match MachineId::parse(id) {
            Ok(id) => id,
            Err(error) => return failure(StatusCode::NOT_FOUND, &error.to_string()),
        };
        match self.server.remove_machine(&id).await {
            Ok(()) => empty(StatusCode::NO_CONTENT),
            Err(error) => membership_failure(&error),
        }
    }
}

pub(super) fn membership_failure(error: &MembershipError) -> Answer {
    let status = match error {
        MembershipError::Unknown(_) => StatusCode::NOT_FOUND,
        MembershipError::Contended(_) | MembershipError::Exists(_) => StatusCode::CONFLICT,
        MembershipError::Store(error) => super::store_status(error),
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    failure(status, &error.to_string())
}
