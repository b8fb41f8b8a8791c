//! What operators say of machines, cordon and drain, and what is said to operators: notices.

use super::{Answer, Api, empty, failure, json, resources::write_failure};
use crate::server::{MachineMark, WriteError, hub};
use fleet_api::types;
use fleet_cluster::{drain::drain_status, model::MachineId};
use fleet_registry::Store;
use fleet_unit::UnitName;
use hyper::StatusCode;

impl<S: Store> Api<S> {
    pub(super) async fn mark_machine(&self, id: &str, mark: MachineMark) -> Answer {
        let id = match MachineId::parse(id) {
            Ok(id) => id,
            Err(error) => return failure(StatusCode::NOT_FOUND, &error.to_string()),
        };
        match self.server.mark_machine(&id, mark).await {
            Ok(()) => empty(StatusCode::NO_CONTENT),
            Err(error) => write_failure(&error),
        }
    }

    pub(super) async fn drain(&self, id: &str) -> Answer {
        let id = match MachineId::parse(id) {
            Ok(id) => id,
            Err(error) => return failure(StatusCode::NOT_FOUND, &error.to_string()),
        };
        match self.server.knows_machine(&id).await {
            Ok(true) => {}
            Ok(false) => return write_failure(&WriteError::NoMachine(id)),
            Err(error) => return write_failure(&error),
        }
        let view = self.server.hub().view();
        let status = drain_status(&view, &id);
        let names = |names: Vec<UnitName>| names.iter().map(ToString::to_string).collect();
        let undrained = status.undrained.into_iter().map(|left| types::Undrained {
            name: left.unit.to_string(),
            reasons: hub::misfit_reasons(left.why),
        });
        let drain = types::Drain {
            draining: view.machine(&id).is_some_and(|machine| machine.draining),
            machine_id: id.to_string(),
            stopping: names(status.stopping),
            to_move: names(status.to_move),
            undrained: undrained.collect(),
        };
        json(StatusCode::OK, &drain)
    }

    pub(super) fn notices(&self) -> Answer {
        json(StatusCode::OK, &types::NoticeList { notices: self.server.hub().notices() })
    }
}
