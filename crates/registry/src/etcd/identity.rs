//! Which registry this is, so that one that was emptied, restored from a backup or exchanged is not taken for the one
//! that was there before.
//!
//! The record at `v3/registry` is made once, with a random ID, and never changed. What a server last saw of it, it
//! remembers as an [`Identity`] outside of etcd. Revisions never go back in an etcd that has its data.

use crate::store::{Revision, StoreError};
use serde::{Deserialize, Serialize};

/// The newest format of the registry in etcd this code reads, and the one it makes.
const FORMAT: u32 = 1;

/// A registry in etcd as a server last saw it: to be kept in a file between runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The registry's own ID, made with it.
    pub registry: String,
    /// The ID of the etcd cluster that holds it, 16 hexadecimal digits.
    pub etcd_cluster: String,
    /// The highest revision seen there.
    pub revision: Revision,
}

/// What is at `v3/registry`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RegistryRecord {
    pub(super) format: u32,
    pub(super) id: String,
}

impl RegistryRecord {
    pub(super) fn new(id: String) -> Self {
        RegistryRecord { format: FORMAT, id }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a number and a text are always valid JSON")
    }

    /// Reads what is at `key`.
    pub(super) fn parse(key: &str, value: &[u8]) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let bad = |e: serde_json::Error| StoreError::Damaged(format!("etcd's {key} can't be read: {e}"));
        let Format { format } = serde_json::from_slice(value).map_err(bad)?;
        if format > FORMAT {
            return Err(StoreError::Damaged(format!(
                "etcd's {key} says format {format}, and this fleetd reads up to format {FORMAT}: a newer fleetd is \
                 needed"
            )));
        }
        serde_json::from_slice(value).map_err(bad)
    }
}

/// How to go on when the registry is not the one that was expected.
const ACCEPT: &str = "if the registry as it is now is to be used, run `fleetctl registry accept`";

/// Whether what etcd has now is what was there before. `prefix` is for the message.
pub(super) fn compare(before: &Identity, now: Option<&Identity>, prefix: &str) -> Result<(), StoreError> {
    let Identity { registry, etcd_cluster, revision } = before;
    let reason = match now {
        None => format!(
            "etcd has no registry at {prefix} any more (it had {registry}, last seen at revision {revision}): its \
             data was lost or removed"
        ),
        Some(now) if now.registry != *registry => {
            format!("etcd has another registry at {prefix}: {}, where {registry} was before", now.registry)
        }
        Some(now) if now.etcd_cluster != *etcd_cluster => format!(
            "the registry at {prefix} is in another etcd cluster: {}, where {etcd_cluster} was before; was it \
             restored from a backup?",
            now.etcd_cluster
        ),
        Some(now) if now.revision < *revision => format!(
            "the registry at {prefix} has gone back from revision {revision} to {}: etcd was restored from a \
             backup, or lost data",
            now.revision
        ),
        Some(_) => return Ok(()),
    };
    Err(StoreError::Damaged(format!("{reason}; {ACCEPT}")))
}

/// A random ID.
pub(super) fn new_id() -> Result<String, StoreError> {
    crate::embedded::new_cluster_id().map_err(|e| StoreError::Unavailable(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(registry: &str, etcd_cluster: &str, revision: Revision) -> Identity {
        Identity { registry: registry.into(), etcd_cluster: etcd_cluster.into(), revision }
    }

    #[test]
    fn only_the_same_registry_with_all_its_data_will_do() {
        let before = identity("r", "c", 10);
        let now = |now: Option<Identity>| compare(&before, now.as_ref(), "/p/");
        assert_eq!(now(Some(identity("r", "c", 10))), Ok(()));
        assert_eq!(now(Some(identity("r", "c", 11))), Ok(()));
        for (bad, word) in [
            (None, "no registry at /p/ any more"),
            (Some(identity("x", "c", 11)), "another registry at /p/: x, where r was"),
            (Some(identity("r", "x", 11)), "another etcd cluster: x, where c was"),
            (Some(identity("r", "c", 9)), "gone back from revision 10 to 9"),
        ] {
            let Err(StoreError::Damaged(message)) = now(bad) else { panic!("{word}") };
            assert!(message.contains(word) && message.contains("fleetctl registry accept"), "{message}");
        }
    }

    #[test]
    fn records_of_newer_formats_and_nonsense_are_refused() {
        let record = RegistryRecord::new("x".into());
        assert_eq!(RegistryRecord::parse("k", &record.to_json()), Ok(record));
        assert!(RegistryRecord::parse("k", br#"{"format":1,"id":"x","more":[]}"#).is_ok());
        for (bad, word) in [
            (&br#"{"format":2,"new":"x"}"#[..], "says format 2, and this fleetd reads up to format 1"),
            (br#"{"format":1}"#, "k can't be read: missing field `id`"),
            (b"\xff", "k can't be read"),
            (b"", "k can't be read"),
        ] {
            let Err(StoreError::Damaged(message)) = RegistryRecord::parse("k", bad) else { panic!("{word}") };
            assert!(message.contains(word), "{message}");
        }
    }
}
