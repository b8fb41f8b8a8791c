//! The servers of the cluster, and how their registry is.

use super::{Answer, Api, empty, failure, json};
use fleet_api::types::{self, ServerList};
use fleet_registry::{Store, StoreError};
use hyper::StatusCode;

impl<S: Store> Api<S> {
    /// All servers that are there, as this one knows them, and the members of the registry.
    pub(super) async fn servers(&self) -> Answer {
        let servers = self.server.servers().into_iter().map(|(id, record, leads)| types::Server {
            address: record.address.unwrap_or_default(),
            leader: leads,
            machine_id: id.to_string(),
            started: i64::try_from(record.started).unwrap_or(i64::MAX),
            version: record.version,
        });
        let servers = servers.collect();
        let registry = self.server.registry_health().await.into_iter().map(|part| types::RegistryMember {
            detail: part.detail,
            endpoint: part.endpoint,
            healthy: part.healthy,
            in_use: part.in_use,
        });
        json(StatusCode::OK, &ServerList { registry: registry.collect(), servers })
    }

    /// Takes a registry that was exchanged.
    pub(super) async fn accept_registry(&self) -> Answer {
        match self.server.accept_registry().await {
            Ok(()) => empty(StatusCode::NO_CONTENT),
            Err(error @ StoreError::Unusable(_)) => failure(StatusCode::CONFLICT, &error.to_string()),
            Err(error) => failure(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
        }
    }
}
