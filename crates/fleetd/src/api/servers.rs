//! The servers of the cluster.

use super::{Answer, Api, json};
use fleet_api::types::{self, ServerList};
use fleet_registry::Store;
use hyper::StatusCode;

impl<S: Store> Api<S> {
    /// All servers that are there, as this one knows them.
    pub(super) fn servers(&self) -> Answer {
        let servers = self.server.servers().into_iter().map(|(id, record, leads)| types::Server {
            address: record.address.unwrap_or_default(),
            leader: leads,
            machine_id: id.to_string(),
            started: i64::try_from(record.started).unwrap_or(i64::MAX),
            version: record.version,
        });
        json(StatusCode::OK, &ServerList { servers: servers.collect() })
    }
}
