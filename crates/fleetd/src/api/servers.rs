//! The servers of the cluster, and how their registry is.

use super::{Answer, Api, empty, failure, full, json, read_large_body, route, store_status};
use crate::server::transfer::{self, MAX_FILE, TransferError};
use fleet_api::types::{self, RegistryImport, ServerList};
use fleet_registry::{Store, StoreError};
use hyper::{Request, Response, StatusCode, body::Incoming, header};
use tracing::{error, warn};

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

    /// All that lasts in the registry, as a file.
    pub(super) async fn export_registry(&self) -> Answer {
        match self.server.export_registry().await {
            Ok((archive, wrong)) => {
                for line in wrong {
                    error!(
                        "exporting the registry: {line}; it is in the file as it is, and can't be imported"
                    );
                }
                warn!("the registry was exported, with the key of the cluster's CA");
                let mut answer = Response::new(full(archive.to_text()));
                let lines = header::HeaderValue::from_static("application/x-ndjson");
                answer.headers_mut().insert(header::CONTENT_TYPE, lines);
                answer
            }
            Err(error) => transfer_failure(&error),
        }
    }

    /// Makes the registry what a file says; `?replace=1`: whatever it is now.
    pub(super) async fn import_registry(
        &self,
        query: &[(String, String)],
        request: Request<Incoming>,
    ) -> Result<Answer, Answer> {
        let replace = route::first(query, "replace").is_some_and(|value| value == "1" || value == "true");
        let text = read_large_body(request.into_body(), MAX_FILE).await?;
        let archive = transfer::read(&text).map_err(|error| transfer_failure(&error.into()))?;
        drop(text);
        let done = self.server.import_registry(&archive, replace).await.map_err(|e| transfer_failure(&e))?;
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let done = RegistryImport { changed: count(done.changed), records: count(done.records) };
        Ok(json(StatusCode::OK, &done))
    }
}

fn transfer_failure(error: &TransferError) -> Answer {
    let status = match error {
        TransferError::File(_) => StatusCode::BAD_REQUEST,
        TransferError::NotEmpty(_)
        | TransferError::Another
        | TransferError::Incomplete
        | TransferError::Contended => StatusCode::CONFLICT,
        TransferError::Store(error) => store_status(error),
    };
    failure(status, &error.to_string())
}
