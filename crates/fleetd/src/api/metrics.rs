//! `/metrics`: what fleetd counts, and what the view has now.

use super::{Answer, Api, full};
use crate::metrics::{CONTENT_TYPE, Text};
use fleet_cluster::model::DesiredState;
use fleet_registry::Store;
use hyper::{Response, header};
use std::collections::BTreeMap;

/// An answer with a text of metrics.
pub(super) fn answer(text: Text) -> Answer {
    let mut answer = Response::new(full(text.finish()));
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(CONTENT_TYPE));
    answer
}

impl<S: Store> Api<S> {
    pub(super) fn metrics(&self) -> Answer {
        let mut text = Text::default();
        self.server.metrics().write(&mut text);
        self.write_view(&mut text);
        text.process();
        answer(text)
    }

    /// What is in the view: counted now, so that it costs nothing while nobody asks.
    fn write_view(&self, text: &mut Text) {
        let hub = self.server.hub();
        let mut desired: BTreeMap<&str, usize> = BTreeMap::new();
        let mut copies: BTreeMap<String, usize> = BTreeMap::new();
        let (mut unplaced, mut problems) = (0, 0);
        let machines = {
            let view = hub.view();
            for (name, unit) in view.units() {
                *desired.entry(unit.desired.as_str()).or_default() += 1;
                let wants = unit.desired != DesiredState::Inactive && !unit.requirements.global;
                unplaced += usize::from(wants && view.place(name).is_none());
            }
            for (_, _, report) in view.reports() {
                *copies.entry(report.systemd.active.clone()).or_default() += 1;
                problems += usize::from(report.problem.is_some());
            }
            view.machines().count()
        };
        text.gauge("fleet_machines", "Machines that are there.", machines);
        text.gauges("fleet_units", "Units, by desired state.", "desired", desired);
        text.gauge("fleet_units_unplaced", "Units that are to be on a machine, and are on none.", unplaced);
        let copies = copies.iter().map(|(state, count)| (state.as_str(), *count));
        text.gauges("fleet_unit_copies", "Units on machines, by systemd's active state.", "active", copies);
        text.gauge("fleet_unit_problems", "Units on machines that are not as they should be.", problems);
        text.gauge(
            "fleet_sessions",
            "Agents that have a session with this server.",
            self.server.session_count(),
        );
        text.gauge(
            "fleet_revision",
            "The registry's revision that this server knows.",
            *hub.applied().borrow(),
        );
        let stale = self.server.stale_for().unwrap_or_default().as_secs();
        text.gauge("fleet_stale_seconds", "For how long the registry has not been reached.", stale);
    }
}
