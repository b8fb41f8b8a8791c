//! Who may ask for what.
//!
//! Whoever gets at the unix socket is root or of the group fleet, and may do everything; so may clients of a TCP socket that systemd passed,
//! as in the original. Who comes over https shows a token or a certificate with *every* request, and may do what the user's role
//! allows: [`needs`] says what that takes, and nothing else does.

use super::{Answer, failure, route::Route};
use crate::server::{Access, Credential, Denied, Role, Users};
use fleet_link::ca::ClientCertificate;
use fleet_link::serve::Visitor;
use fleet_trust::token::{Kind, Token, TokenTextError};
use hyper::{HeaderMap, StatusCode, header};
use std::time::SystemTime;
use tokio::sync::watch;

/// The role that a request needs at least.
pub(crate) fn needs(route: &Route) -> Role {
    match route {
        // What is not there, or not so, is told to every user, and to nobody else.
        Route::Refused(..) | Route::Discovery | Route::Metrics => Role::Viewer,
        Route::Machines
        | Route::Members
        | Route::Servers
        | Route::Drain(_)
        | Route::Notices
        | Route::Units
        | Route::Unit(_)
        | Route::UnitFile(_)
        | Route::UnitStatus(_)
        | Route::UnitJournal(_)
        | Route::UnitExplain(_)
        | Route::States
        | Route::State(_)
        | Route::Events => Role::Viewer,
        Route::PutUnit(_)
        | Route::DeleteUnit(_)
        | Route::ChangeUnits
        | Route::PatchMachines
        | Route::MarkMachine(..) => Role::Operator,
        Route::JoinTokens
        | Route::CreateJoinToken
        | Route::RevokeJoinToken(_)
        | Route::RemoveMachine(_)
        | Route::AcceptRegistry
        | Route::ExportRegistry
        | Route::ImportRegistry
        | Route::Users
        | Route::CreateUser
        | Route::SetRole(_)
        | Route::RemoveUser(_) => Role::Admin,
    }
}

/// Whether the answer to a request goes on for as long as the client likes.
pub(crate) fn is_live(route: &Route) -> bool {
    matches!(route, Route::Events | Route::UnitJournal(_))
}

/// What a request shows, read and not yet checked.
#[derive(Debug, thiserror::Error)]
enum Unknown {
    #[error(
        "who are you? Show a user token (Authorization: Bearer …; fleetctl --token-file) or a user's certificate (fleetctl --cert-file \
         and --key-file); fleetctl user create makes them"
    )]
    Nothing,
    #[error("the certificate shown is a machine's: machines are no users")]
    Machine,
    #[error("the certificate shown is a server's: servers are no users")]
    Server,
    #[error("Authorization has to be \"Bearer TOKEN\"")]
    Scheme,
    #[error("{0}")]
    Token(#[from] TokenTextError),
    #[error("{0}")]
    Denied(#[from] Denied),
}

impl Unknown {
    /// For the log: one of a few texts, whatever the peer sends.
    fn for_the_log(&self) -> String {
        match self {
            Unknown::Nothing => "it shows neither a user token nor a certificate to the API".to_owned(),
            Unknown::Scheme | Unknown::Token(_) => "what it shows to the API is no user token".to_owned(),
            other => other.to_string(),
        }
    }
}

/// A token in the header counts before a certificate.
fn credential(visitor: &Visitor, headers: &HeaderMap) -> Result<Credential, Unknown> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let text = value.to_str().map_err(|_| Unknown::Scheme)?;
        let (scheme, token) = text.split_once(' ').ok_or(Unknown::Scheme)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Unknown::Scheme);
        }
        let token = Token::parse(Kind::User, token)?;
        return Ok(Credential::Token(token.id, token.secret));
    }
    match visitor.certificate() {
        Some(ClientCertificate::User(says)) => Ok(Credential::Certificate(says.clone())),
        Some(ClientCertificate::Machine(_)) => Err(Unknown::Machine),
        Some(ClientCertificate::Server(_)) => Err(Unknown::Server),
        None => Err(Unknown::Nothing),
    }
}

/// Somebody at the other end of an https connection.
#[derive(Debug)]
pub(crate) struct Remote {
    visitor: Visitor,
    /// The live answer under way: by whose right, and what that takes.
    live: watch::Sender<Option<(Credential, Role)>>,
}

impl Remote {
    pub(crate) fn new(visitor: Visitor) -> Self {
        Remote { visitor, live: watch::Sender::new(None) }
    }

    /// Lets a request through (`None`), or answers it: 401 when it is not known who asks, 403 when they may not.
    pub(crate) fn refuse(&self, users: &Users, route: &Route, headers: &HeaderMap) -> Option<Answer> {
        self.live.send_replace(None);
        let known = credential(&self.visitor, headers).and_then(|credential| {
            let access = users.check(&credential, SystemTime::now())?;
            Ok((credential, access))
        });
        let (credential, Access { user, role, .. }) = match known {
            Ok(known) => known,
            Err(unknown) => {
                self.visitor.refused(&unknown.for_the_log());
                return Some(unauthorized(&unknown.to_string()));
            }
        };
        if !self.visitor.admit() {
            self.visitor.refused("too many users are connected");
            return Some(failure(StatusCode::SERVICE_UNAVAILABLE, "too many users are connected"));
        }
        let needed = needs(route);
        if role < needed {
            self.visitor.refused(&format!("user {user}, {role}, asks for what takes the role {needed}"));
            let message = format!("user {user} has the role {role}; this takes the role {needed}");
            return Some(failure(StatusCode::FORBIDDEN, &message));
        }
        if is_live(route) {
            self.live.send_replace(Some((credential, needed)));
        }
        None
    }

    /// Waits until the user may not have the live answer any more that is under way.
    pub(crate) async fn lost(&self, users: &Users) {
        let (mut changed, mut live) = (users.changed(), self.live.subscribe());
        loop {
            changed.borrow_and_update();
            let shown = live.borrow_and_update().clone();
            let now = SystemTime::now();
            let left = match shown.map(|(credential, needed)| (users.check(&credential, now), needed)) {
                None => None,
                Some((Ok(access), needed)) if access.role >= needed => {
                    Some(access.until.duration_since(now).unwrap_or_default())
                }
                Some(_) => {
                    self.visitor.refused("what its user may see has ended");
                    return;
                }
            };
            let expiry = async {
                match left {
                    Some(left) => tokio::time::sleep(left).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = changed.changed() => {}
                _ = live.changed() => {}
                () = expiry => {}
            }
        }
    }
}

fn unauthorized(message: &str) -> Answer {
    let mut answer = failure(StatusCode::UNAUTHORIZED, message);
    let bearer = header::HeaderValue::from_static("Bearer realm=\"fleet\"");
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::MachineMark;

    fn routes() -> Vec<Route> {
        let name = || "x".to_owned();
        vec![
            Route::Discovery,
            Route::Metrics,
            Route::Machines,
            Route::PatchMachines,
            Route::Units,
            Route::Unit(name()),
            Route::PutUnit(name()),
            Route::DeleteUnit(name()),
            Route::UnitFile(name()),
            Route::UnitStatus(name()),
            Route::UnitJournal(name()),
            Route::UnitExplain(name()),
            Route::States,
            Route::State(name()),
            Route::Events,
            Route::JoinTokens,
            Route::CreateJoinToken,
            Route::RevokeJoinToken(name()),
            Route::Members,
            Route::Servers,
            Route::Drain(name()),
            Route::MarkMachine(name(), MachineMark::Cordon),
            Route::Notices,
            Route::RemoveMachine(name()),
            Route::AcceptRegistry,
            Route::ExportRegistry,
            Route::ImportRegistry,
            Route::ChangeUnits,
            Route::Users,
            Route::CreateUser,
            Route::SetRole(name()),
            Route::RemoveUser(name()),
            Route::Refused(StatusCode::NOT_FOUND, ""),
        ]
    }

    /// The name of a route. A new one does not compile until it stands here, and then fails the test below until its
    /// role is decided.
    fn word(route: &Route) -> &'static str {
        match route {
            Route::Discovery => "discovery",
            Route::Metrics => "metrics",
            Route::Machines => "machines",
            Route::PatchMachines => "patch machines",
            Route::Units => "units",
            Route::Unit(_) => "unit",
            Route::PutUnit(_) => "put unit",
            Route::DeleteUnit(_) => "delete unit",
            Route::UnitFile(_) => "unit file",
            Route::UnitStatus(_) => "status",
            Route::UnitJournal(_) => "journal",
            Route::UnitExplain(_) => "explain",
            Route::States => "states",
            Route::State(_) => "state",
            Route::Events => "events",
            Route::JoinTokens => "join tokens",
            Route::CreateJoinToken => "create join token",
            Route::RevokeJoinToken(_) => "revoke join token",
            Route::Members => "members",
            Route::Servers => "servers",
            Route::Drain(_) => "drain",
            Route::MarkMachine(..) => "mark machine",
            Route::Notices => "notices",
            Route::RemoveMachine(_) => "remove machine",
            Route::AcceptRegistry => "accept registry",
            Route::ExportRegistry => "export registry",
            Route::ImportRegistry => "import registry",
            Route::ChangeUnits => "change units",
            Route::Users => "users",
            Route::CreateUser => "create user",
            Route::SetRole(_) => "set role",
            Route::RemoveUser(_) => "remove user",
            Route::Refused(..) => "refused",
        }
    }

    #[test]
    fn every_route_takes_its_role() {
        let of = |role| -> Vec<_> { routes().iter().filter(|r| needs(r) == role).map(word).collect() };
        assert_eq!(
            of(Role::Viewer),
            [
                "discovery",
                "metrics",
                "machines",
                "units",
                "unit",
                "unit file",
                "status",
                "journal",
                "explain",
                "states",
                "state",
                "events",
                "members",
                "servers",
                "drain",
                "notices",
                "refused"
            ]
        );
        assert_eq!(
            of(Role::Operator),
            ["patch machines", "put unit", "delete unit", "mark machine", "change units"]
        );
        assert_eq!(
            of(Role::Admin),
            [
                "join tokens",
                "create join token",
                "revoke join token",
                "remove machine",
                "accept registry",
                "export registry",
                "import registry",
                "users",
                "create user",
                "set role",
                "remove user"
            ]
        );
        assert!(Role::Viewer < Role::Operator && Role::Operator < Role::Admin);
    }

    #[test]
    fn what_changes_something_takes_more_than_a_viewer() {
        for method in ["PUT", "POST", "PATCH", "DELETE"] {
            let method = hyper::Method::from_bytes(method.as_bytes()).unwrap();
            for path in [
                "units/a.service",
                "unit-changes",
                "registry/export",
                "registry/import",
                "machines",
                "machines/x",
                "machines/x/drain",
                "machines/x/cordon",
                "join-tokens",
                "join-tokens/a",
                "users",
                "users/ann",
                "state",
                "events",
                "members",
                "discovery",
            ] {
                let route = super::super::route::route(&method, &format!("/fleet/v1/{path}"));
                let refused = matches!(route, Route::Refused(..));
                assert!(refused || needs(&route) > Role::Viewer, "{method} {path}: {route:?}");
            }
        }
    }
}
