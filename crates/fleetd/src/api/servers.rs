//! The servers of the cluster, and how their registry is.

use super::{Answer, Api, empty, failure, json};
use fleet_api::types::{self, ServerList};
use fleet_registry::{Store, StoreError};
use hyper::StatusCode;

impl<S: Store> Api<S> {
    /// All servers that are there, with what each says of itself, and the members of the registry.
    pub(super) async fn servers(&self) -> Answer {
        let (mut standings, health) = tokio::join!(self.server.standings(), self.server.registry_health());
        // What this server knows is as new as its answer.
        let newest = standings.iter().filter_map(|(_, said)| Some(said.as_ref().ok()?.revision)).max();
        let servers = self.server.servers().into_iter().map(|(id, record, leads)| {
            let at = standings.iter().position(|(other, _)| *other == id);
            let (standing, problem) = match at.map(|at| standings.swap_remove(at).1) {
                Some(Ok(standing)) => (Some(standing), String::new()),
                Some(Err(problem)) => (None, problem),
                None => (None, "it has come just now".to_owned()),
            };
            let revision = standing.map(|standing| standing.revision);
            types::Server {
                address: record.address.unwrap_or_default(),
                heard: standing.and_then(|standing| Some(standing.reached?.as_secs())),
                lag: revision.and_then(|revision| Some(newest?.saturating_sub(revision))),
                leader: leads,
                machine_id: id.to_string(),
                problem,
                revision,
                started: i64::try_from(record.started).unwrap_or(i64::MAX),
                version: record.version,
            }
        });
        let servers = servers.collect();
        let registry = health.into_iter().map(|part| types::RegistryMember {
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
