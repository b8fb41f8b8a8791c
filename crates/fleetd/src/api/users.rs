//! Users of the API over https.

use super::members::{membership_failure, seconds, ttl};
use super::{Answer, Api, empty, failure, json, read_body};
use crate::server::{Role, UserRecord};
use fleet_api::types::{NewUser, User, UserList, UserRequest};
use fleet_link::ca::PublicKey;
use fleet_link::user::{UserName, UserNameError};
use fleet_registry::Store;
use hyper::{Request, StatusCode, body::Incoming};
use std::time::Duration;

/// How long a user has access unless its maker says otherwise, and at most.
const DEFAULT_TTL: Duration = Duration::from_secs(365 * 24 * 3600);
const MAX_TTL: Duration = Duration::from_secs(3660 * 24 * 3600);

fn listed(name: &UserName, record: &UserRecord) -> User {
    User {
        certificate: record.key.is_some(),
        created: seconds(record.created),
        expires: seconds(record.expires),
        name: name.to_string(),
        role: record.role.to_string(),
    }
}

fn bad(message: impl ToString) -> Answer {
    failure(StatusCode::BAD_REQUEST, &message.to_string())
}

fn read_request(bytes: &[u8]) -> Result<UserRequest, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("unable to decode body: {error}"))
}

/// The body of `POST users`.
pub(super) struct Asked {
    name: UserName,
    role: Role,
    ttl: Duration,
    key: Option<PublicKey>,
}

/// Reads the body of `POST users`.
pub(super) fn read_new(bytes: &[u8]) -> Result<Asked, String> {
    let asked = read_request(bytes)?;
    Ok(Asked {
        name: UserName::parse(&asked.name).map_err(|error| error.to_string())?,
        role: role(&asked.role)?,
        ttl: ttl(asked.ttl.as_deref(), DEFAULT_TTL, MAX_TTL)?,
        key: match asked.request.as_deref() {
            None | Some("") => None,
            Some(request) => {
                Some(PublicKey::from_request_pem(request).map_err(|error| format!("request: {error}"))?)
            }
        },
    })
}

/// Reads the body of `PATCH users/NAME`.
pub(super) fn read_role(bytes: &[u8]) -> Result<Role, String> {
    role(&read_request(bytes)?.role)
}

fn role(text: &str) -> Result<Role, String> {
    Role::parse(text).ok_or_else(|| format!("invalid role {text:?}: expect viewer, operator, or admin"))
}

/// A path with a name that nobody can have.
fn missing(error: UserNameError) -> Answer {
    failure(StatusCode::NOT_FOUND, &error.to_string())
}

impl<S: Store> Api<S> {
    pub(super) fn users(&self) -> Answer {
        let users = self.server.users().list();
        let users = users.iter().map(|(name, record)| listed(name, record)).collect();
        json(StatusCode::OK, &UserList { users })
    }

    pub(super) async fn create_user(&self, request: Request<Incoming>) -> Result<Answer, Answer> {
        let Asked { name, role, ttl, key } = read_new(&read_body(request.into_body()).await?).map_err(bad)?;
        let made = self.server.create_user(&name, role, ttl, key.as_ref()).await;
        let made = made.map_err(|error| membership_failure(&error))?;
        let answer = NewUser {
            ca: made.ca,
            certificate: made.certificate.unwrap_or_default(),
            expires: seconds(made.record.expires),
            name: name.to_string(),
            role: role.to_string(),
            token: made.token.to_string(),
        };
        Ok(json(StatusCode::CREATED, &answer))
    }

    pub(super) async fn set_role(&self, user: &str, request: Request<Incoming>) -> Result<Answer, Answer> {
        let name = UserName::parse(user).map_err(missing)?;
        let role = read_role(&read_body(request.into_body()).await?).map_err(bad)?;
        match self.server.set_role(&name, role).await {
            Ok(record) => Ok(json(StatusCode::OK, &listed(&name, &record))),
            Err(error) => Err(membership_failure(&error)),
        }
    }

    pub(super) async fn remove_user(&self, user: &str) -> Result<Answer, Answer> {
        match self.server.remove_user(&UserName::parse(user).map_err(missing)?).await {
            Ok(()) => Ok(empty(StatusCode::NO_CONTENT)),
            Err(error) => Err(membership_failure(&error)),
        }
    }
}
