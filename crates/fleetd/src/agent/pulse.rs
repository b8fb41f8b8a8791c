//! Whether the agent gets on, for the watchdog.

use std::time::Duration;
use tokio::time::Instant;

/// A batch that takes longer than this hangs: each call to systemd in it has a shorter deadline of its own.
const STUCK: Duration = Duration::from_secs(600);

/// Whether the agent gets on, for the watchdog.
#[derive(Debug, Default)]
pub struct Pulse {
    /// Since when it is busy with one batch.
    busy: std::sync::Mutex<Option<Instant>>,
}

impl Pulse {
    /// False when one batch takes longer than anything in it may take.
    pub fn is_well(&self) -> bool {
        self.get().is_none_or(|since| since.elapsed() < STUCK)
    }

    fn get(&self) -> Option<Instant> {
        *self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn set(&self, busy: Option<Instant>) {
        *self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = busy;
    }
}
