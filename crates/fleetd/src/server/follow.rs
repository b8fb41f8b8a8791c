//! Follows the store into the hub's view and the table of users: one snapshot, then changes; a new snapshot when changes were missed.
//!
//! While a registry is imported there is only a part of it, of which nobody must know: the view stays as it is, or empty, and is not
//! up to date, for which everybody waits. What came of it a server follows as after its start: see [`Server::exchanged`].

use super::{Server, transfer};
use anyhow::Context;
use fleet_cluster::model::Change;
use fleet_registry::records::{Reader, RecordError, record_of};
use fleet_registry::{Snapshot, Store, StoreError, Watch};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::{error, warn};

/// How long to wait before asking a store again that can't be reached: doubled up to the second value.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Why the registry is not followed any further.
enum Ended {
    Store(StoreError),
    /// It is being imported.
    Held,
}

impl From<StoreError> for Ended {
    fn from(error: StoreError) -> Self {
        Ended::Store(error)
    }
}

impl<S: Store> Server<S> {
    pub(super) async fn follow(&self) -> anyhow::Result<()> {
        let mut pause = RETRY.0;
        let mut held = false;
        loop {
            let ended = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                ended = self.follow_once(&mut pause, held) => ended,
            };
            let ended = match ended {
                Ended::Held => {
                    held = true;
                    continue;
                }
                Ended::Store(error) => error,
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

    /// `held`: it was being imported, which others acted on before.
    async fn follow_once(&self, pause: &mut Duration, held: bool) -> Ended {
        let mut reader = Reader::default();
        let snapshot = match self.whole().await {
            Ok(snapshot) => snapshot,
            Err(error) => return error.into(),
        };
        if held {
            self.exchanged.cancel();
            // Whoever runs this server ends it.
            std::future::pending::<()>().await;
        }
        let applied = *self.hub.applied().borrow();
        if snapshot.revision < applied {
            let revision = snapshot.revision;
            let reason =
                format!("it answers from revision {revision}, and this server knows {applied} already");
            return StoreError::Unavailable(reason).into();
        }
        let (mut changes, broken) = reader.snapshot(&snapshot);
        broken.iter().for_each(report);
        changes.extend(broken.iter().filter_map(RecordError::change));
        self.peers.reset(&snapshot);
        self.note_removals(&snapshot);
        self.users.reset(&snapshot.entries);
        self.hub.reset(changes, snapshot.revision);
        let mut watch = match self.store.watch("", snapshot.revision).await {
            Ok(watch) => watch,
            Err(error) => return error.into(),
        };
        *pause = RETRY.0;
        let share = self.share(&snapshot);
        tokio::pin!(share);
        let mut shared = false;
        loop {
            let batch = tokio::select! {
                biased;
                batch = watch.next() => batch,
                () = &mut share, if !shared => {
                    shared = true;
                    continue;
                }
            };
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => return error.into(),
            };
            // The others come to this revision as well, and it is a later one.
            shared = true;
            if batch.events.iter().any(transfer::begins) {
                self.importing.store(true, Ordering::Relaxed);
                self.hub.rewind();
                return Ended::Held;
            }
            let mut changes = Vec::with_capacity(batch.events.len());
            for event in &batch.events {
                self.peers.note(event);
                self.note_removal(event);
                self.users.apply(event);
                match reader.event(event) {
                    Ok(change) => {
                        changes.extend(change);
                        changes.extend(record_of(&event.key).map(|record| Change::Unread(record, None)));
                    }
                    Err(broken) => {
                        report(&broken);
                        changes.extend(broken.change());
                    }
                }
            }
            self.hub.apply(changes, batch.revision);
        }
    }
}

impl<S: Store> Server<S> {
    /// All of the registry. While it is being imported, waits.
    async fn whole(&self) -> Result<Snapshot, StoreError> {
        let mut told = false;
        loop {
            let snapshot = self.store.range("").await?;
            let importing = transfer::is_under_way(&snapshot);
            self.importing.store(importing, Ordering::Relaxed);
            if !importing {
                return Ok(snapshot);
            }
            if !told {
                warn!(
                    "the registry is being imported: nothing is decided, and no machine is told anything, before that is complete. If \
                     it was cut off, repeat it (fleetd registry import)"
                );
                told = true;
            }
            let mut watch = self.store.watch(transfer::IMPORT, snapshot.revision).await?;
            while !watch.next().await?.events.iter().any(transfer::ends) {}
        }
    }
}

/// One broken record must not stop the rest; what the view knew of it before stays, and nothing is decided from it. Agents are told
/// to leave such a unit as it is.
fn report(broken: &RecordError) {
    error!("{broken}; this record is left out, and what runs is left as it is");
}
