//! How the members of etcd are, each asked by itself.

use super::connection::Connection;
use super::convert::of_etcd;
use super::generated::StatusRequest;
use super::members::{Link, Members, unusable};
use super::status::clean;
use crate::store::{Health, Revision, StoreError};
use futures_util::future::join_all;
use tokio::time::timeout;

/// One endpoint, and the member there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointHealth {
    /// Its URL as configured.
    pub endpoint: String,
    /// Whether the store uses it now.
    pub in_use: bool,
    /// How its member is, or why it did not say.
    pub member: Result<MemberHealth, String>,
}

impl EndpointHealth {
    /// In words for the user.
    pub fn summary(&self) -> Health {
        let (healthy, detail) = match &self.member {
            Err(reason) => (false, reason.clone()),
            Ok(member) => {
                let mut detail = format!(
                    "etcd {}, {}, revision {}, {} MB",
                    member.version,
                    if member.leads { "leader" } else { "follower" },
                    member.revision,
                    member.database.0.div_ceil(1 << 20)
                );
                for problem in &member.problems {
                    detail += ", ";
                    detail += problem;
                }
                (member.has_leader && member.problems.is_empty(), detail)
            }
        };
        Health { endpoint: self.endpoint.clone(), in_use: self.in_use, healthy, detail }
    }
}

/// What a member says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberHealth {
    /// Its ID in etcd.
    pub id: u64,
    /// Of its etcd.
    pub version: String,
    /// Whether it leads.
    pub leads: bool,
    /// Whether it knows a leader: without one it can't do anything.
    pub has_leader: bool,
    /// The election it knows of.
    pub raft_term: u64,
    /// The last decision it knows of.
    pub raft_index: u64,
    /// The revision its data is at.
    pub revision: Revision,
    /// Bytes of its database on disk, and of those in use.
    pub database: (u64, u64),
    /// What it complains about: alarms (`NOSPACE`, `CORRUPT`) and missing leaders, in etcd's words.
    pub problems: Vec<String>,
}

pub(super) async fn ask(members: &Members) -> Vec<EndpointHealth> {
    let link = members.link().borrow().clone();
    let ask = members.settings.endpoints.iter().map(async |endpoint| {
        let in_use = matches!(&link, Link::Up(up) if up.endpoint() == endpoint.url);
        let answer = timeout(members.settings.timeout, async {
            let mut connection =
                Connection::open(endpoint, &members.settings).await.map_err(StoreError::from)?;
            // Not as other calls are sent: a member without a leader is to say how it is, too.
            let status = connection.maintenance().status(StatusRequest {}).await;
            match status.map_err(|status| unusable(&connection, &status)) {
                // Newer ones tell it only to users; and to find out who one is takes a leader.
                Err(StoreError::Denied(_)) if members.settings.login.is_some() => {
                    members.log_in(&mut connection).await?;
                    let request = connection.request(StatusRequest {}, None);
                    let status = connection.maintenance().status(request).await;
                    status.map_err(|status| unusable(&connection, &status))
                }
                answer => answer,
            }
        });
        let member = match answer.await {
            Err(_) => Err(format!("no answer within {:?}", members.settings.timeout)),
            Ok(Err(error)) => Err(error.to_string()),
            Ok(Ok(status)) => {
                let status = status.into_inner();
                let header = status.header.unwrap_or_default();
                Ok(MemberHealth {
                    id: header.member_id,
                    version: clean(&status.version),
                    leads: status.leader != 0 && status.leader == header.member_id,
                    has_leader: status.leader != 0,
                    raft_term: status.raft_term,
                    raft_index: status.raft_index,
                    revision: of_etcd(header.revision),
                    database: (
                        u64::try_from(status.db_size).unwrap_or(0),
                        u64::try_from(status.db_size_in_use).unwrap_or(0),
                    ),
                    problems: status.errors.iter().map(|problem| clean(problem)).collect(),
                })
            }
        };
        EndpointHealth { endpoint: endpoint.url.clone(), in_use, member }
    });
    join_all(ask).await
}
