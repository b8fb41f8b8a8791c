//! The event stream, `GET /fleet/v1/events` (server-sent events).
//!
//! Query: `unitName` (any number; none: all units, machines and notices), `machines=1` (machines and notices, too, though units are named),
//! `snapshot=1` (first one event for everything there is, then one `ready`
//! event), `since=REVISION` or the header `Last-Event-ID` (everything after that revision; when that is no longer kept, the
//! stream begins with a `reset` event: list anew). Every event has its revision as `id:`, its kind as `event:` and an
//! [`Event`] as JSON in `data:`. A comment line is sent every 15 s so that a dead connection is noticed.
use crate::types::{Explanation, Machine, Notice, UnitState};
use serde::{Deserialize, Serialize};

/// What happened, or (in the snapshot) what is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum Event {
    /// A unit: what is desired, how far it is, where, and what is in its way, and its states on all machines.
    Unit(UnitEvent),
    /// A unit was destroyed, and nothing of it is left on any machine.
    UnitGone {
        /// Its name.
        name: String,
    },
    /// A machine came or changed.
    Machine(Machine),
    /// A machine is gone.
    MachineGone {
        /// Its ID.
        id: String,
    },
    /// Something about the cluster as a whole that its operators should know.
    Notice(Notice),
    /// That is over.
    NoticeGone {
        /// The ID of the notice.
        id: String,
    },
    /// The snapshot is complete.
    Ready,
    /// What was asked for is no longer kept: list anew.
    Reset,
}

/// Everything that a waiting client wants to know of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UnitEvent {
    /// Whether its record exists: false while a destroyed unit is still being stopped somewhere.
    pub known: bool,
    /// The hash of its file (empty when not known).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub hash: String,
    /// Whether it is Global.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub global: bool,
    /// States, place, problems and reasons.
    #[serde(flatten)]
    pub explanation: Explanation,
    /// What systemd says of it, by machine.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub states: Vec<UnitState>,
}
