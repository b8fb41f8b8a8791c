//! Follows the store into the hub's view and the table of users: one snapshot, then changes; a new snapshot when changes were missed.

use super::Server;
use anyhow::Context;
use fleet_registry::records::{Reader, RecordError};
use fleet_registry::{Store, StoreError, Watch};
use std::time::Duration;
use tracing::{error, warn};

/// How long to wait before asking a store again that can't be reached: doubled up to the second value.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

impl<S: Store> Server<S> {
    pub(super) async fn follow(&self) -> anyhow::Result<()> {
        let mut pause = RETRY.0;
        loop {
            let ended = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                ended = self.follow_once(&mut pause) => ended,
            };
            match ended {
                // A registry of our own is ours to mend; one that others share may be put right, or accepted, meanwhile.
                StoreError::Damaged(_) if !self.config.shared_registry => {
                    return Err(ended).context("the registry can't be read");
                }
                StoreError::Compacted { .. } => warn!("{ended}; listing the registry anew"),
                other => {
                    self.trouble("following the registry", &other);
                    tokio::select! {
                        biased;
                        () = self.cancel.cancelled() => return Ok(()),
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    async fn follow_once(&self, pause: &mut Duration) -> StoreError {
        let mut reader = Reader::default();
        let snapshot = match self.store.range("").await {
            Ok(snapshot) => snapshot,
            Err(error) => return error,
        };
        let applied = *self.hub.applied().borrow();
        if snapshot.revision < applied {
            return StoreError::Unavailable(format!(
                "it answers from revision {}, and this server knows {applied} already",
                snapshot.revision
            ));
        }
        let (changes, broken) = reader.snapshot(&snapshot);
        broken.iter().for_each(report);
        self.hub.set_unreadable(&broken);
        self.peers.reset(&snapshot);
        self.users.reset(&snapshot.entries);
        self.hub.reset(changes, snapshot.revision);
        let mut watch = match self.store.watch("", snapshot.revision).await {
            Ok(watch) => watch,
            Err(error) => return error,
        };
        *pause = RETRY.0;
        loop {
            let batch = match watch.next().await {
                Ok(batch) => batch,
                Err(error) => return error,
            };
            let mut changes = Vec::with_capacity(batch.events.len());
            let mut readable = Vec::with_capacity(batch.events.len());
            for event in &batch.events {
                self.peers.note(event);
                self.note_removal(event);
                self.users.apply(event);
                match reader.event(event) {
                    Ok(change) => {
                        readable.push(&event.key);
                        changes.extend(change);
                    }
                    Err(broken) => {
                        report(&broken);
                        self.hub.set_outdated(&broken);
                    }
                }
            }
            self.hub.apply(changes, batch.revision);
            readable.into_iter().for_each(|key| self.hub.set_readable(key));
        }
    }
}

/// One broken record must not stop the rest; what the view knew of it before stays. Of a unit that the view has
/// not known, agents are told to leave it as it is.
fn report(broken: &RecordError) {
    error!("{broken}; this record is left out, and what runs is left as it is");
}
