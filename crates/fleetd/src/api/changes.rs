//! Many changes of units in one request, so that the registry gets few transactions. What a request for one of them would be
//! answered, each of them is.

use super::resources::{check_content_type, read_desired, read_file, write_status};
use super::{Answer, Api, failure, json, read_body};
use crate::server::{Put, UnitChange};
use fleet_api::types::{self, MOST_CHANGES, UnitChangeList, UnitChangeOutcome, UnitChangeOutcomes};
use fleet_registry::Store;
use fleet_unit::UnitName;
use hyper::{Request, StatusCode, body::Incoming};

impl<S: Store> Api<S> {
    pub(super) async fn change_units(&self, request: Request<Incoming>) -> Result<Answer, Answer> {
        let bad = |message: String| failure(StatusCode::BAD_REQUEST, &message);
        check_content_type(request.headers())
            .map_err(|message| failure(StatusCode::UNSUPPORTED_MEDIA_TYPE, &message))?;
        let bytes = read_body(request.into_body()).await?;
        let UnitChangeList { changes } =
            serde_json::from_slice(&bytes).map_err(|error| bad(format!("unable to decode body: {error}")))?;
        if changes.len() > MOST_CHANGES {
            let message = format!("{} changes (at most {MOST_CHANGES} in one request)", changes.len());
            return Err(failure(StatusCode::PAYLOAD_TOO_LARGE, &message));
        }
        let read: Vec<Result<UnitChange, String>> = changes.iter().map(change).collect();
        let good: Vec<UnitChange> = read.iter().filter_map(|read| read.as_ref().ok()).cloned().collect();
        let mut made = self.server.change_units(&good).await.into_iter();
        let outcomes = read.into_iter().map(|read| match read {
            Err(message) => outcome(StatusCode::BAD_REQUEST, message),
            Ok(_) => match made.next() {
                Some(Ok(Put::Created)) => outcome(StatusCode::CREATED, String::new()),
                Some(Ok(Put::Updated)) => outcome(StatusCode::NO_CONTENT, String::new()),
                Some(Err(error)) => outcome(write_status(&error), error.to_string()),
                None => outcome(StatusCode::INTERNAL_SERVER_ERROR, "it was left out".to_owned()),
            },
        });
        Ok(json(StatusCode::OK, &UnitChangeOutcomes { outcomes: outcomes.collect() }))
    }
}

fn outcome(status: StatusCode, message: String) -> UnitChangeOutcome {
    UnitChangeOutcome { code: status.as_u16(), message }
}

/// Reads one change.
fn change(change: &types::UnitChange) -> Result<UnitChange, String> {
    let name = UnitName::parse(&change.name).map_err(|error| error.to_string())?;
    if change.destroy {
        return Ok(UnitChange::Destroy(name));
    }
    let desired = read_desired(&change.desired_state)?;
    Ok(UnitChange::Put { name, file: read_file(Vec::new(), &change.file)?, desired })
}
