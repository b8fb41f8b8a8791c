//! Which keys fleet has in etcd.
//!
//! | key | holds |
//! |---|---|
//! | `PREFIX` `v3/registry` | which registry this is: see [`super::identity`] |
//! | `PREFIX` `v3/entries/` KEY | the entry KEY of the registry |
//! | `PREFIX` `v3/entries/` | nothing; it is written so that watches of all entries tell its revision: see [`crate::Store::barrier`] |
//!
//! `PREFIX` is `etcd_key_prefix`. The fleet of CoreOS kept its data at the same prefix, in etcd's older store of API v2, which
//! API v3 does not show; where it was migrated into the newer one its keys lie beside ours and are left alone.

use bytes::Bytes;
use std::sync::Arc;

/// What the keys of fleet 1.0 begin with, after the prefix; in order.
const OLD: [&str; 7] = ["engine/", "job/", "lease/", "machines/", "state/", "states/", "unit/"];
const OURS: &str = "v3/";

/// The keys below one prefix.
#[derive(Debug)]
pub(super) struct Layout {
    prefix: String,
    entries: String,
}

/// The keys from the first up to, not including, the second.
pub(super) type KeyRange = (Bytes, Bytes);

impl Layout {
    pub(super) fn new(prefix: &str) -> Self {
        let prefix = match prefix.trim_matches('/') {
            "" => "/".to_owned(),
            inner => format!("/{inner}/"),
        };
        Layout { entries: format!("{prefix}{OURS}entries/"), prefix }
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The key of the record that says which registry this is.
    pub(super) fn registry(&self) -> Bytes {
        format!("{}{OURS}registry", self.prefix).into()
    }

    /// etcd's key of an entry.
    pub(super) fn entry(&self, key: &str) -> Bytes {
        format!("{}{key}", self.entries).into()
    }

    /// The key that is none of an entry, and lies among theirs.
    pub(super) fn barrier(&self) -> Bytes {
        self.entries.clone().into()
    }

    /// etcd's keys of the entries that begin with `prefix`.
    pub(super) fn entries(&self, prefix: &str) -> KeyRange {
        below(format!("{}{prefix}", self.entries))
    }

    /// The key of an entry, of etcd's key. `None`: it is no text, or of no entry.
    pub(super) fn key(&self, key: &[u8]) -> Option<Arc<str>> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&self.entries)?;
        (!key.is_empty()).then(|| key.into())
    }

    /// All that this registry has or had.
    pub(super) fn ours(&self) -> KeyRange {
        below(format!("{}{OURS}", self.prefix))
    }

    /// What lies below the prefix and is neither ours nor of fleet 1.0.
    pub(super) fn foreign(&self) -> Vec<KeyRange> {
        let (mut from, end) = below(self.prefix.clone());
        let mut gaps = Vec::new();
        for known in OLD.iter().chain([&OURS]) {
            let (start, after) = below(format!("{}{known}", self.prefix));
            gaps.push((from, start));
            from = after;
        }
        gaps.push((from, end));
        gaps
    }
}

/// All keys that begin with `prefix`.
fn below(prefix: String) -> KeyRange {
    let mut end = prefix.clone().into_bytes();
    // The end of every prefix here is text, and no byte of a text is 255.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    (prefix.into(), end.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_there_and_back() {
        for prefix in ["/_coreos.com/fleet/", "_coreos.com/fleet", "/_coreos.com/fleet"] {
            let layout = Layout::new(prefix);
            assert_eq!(layout.prefix(), "/_coreos.com/fleet/");
            let key = layout.entry("unit/a.service");
            assert_eq!(key, "/_coreos.com/fleet/v3/entries/unit/a.service");
            assert_eq!(layout.key(&key).as_deref(), Some("unit/a.service"));
        }
        let layout = Layout::new("/");
        assert_eq!(layout.registry(), "/v3/registry");
        for bad in [&b"/v3/registry"[..], b"/v3/entries/", b"/v3/entries/\xff", b"x"] {
            assert_eq!(layout.key(bad), None);
        }
        assert_eq!(layout.entries("unit/"), ("/v3/entries/unit/".into(), "/v3/entries/unit0".into()));
        assert_eq!(layout.entries(""), ("/v3/entries/".into(), "/v3/entries0".into()));
    }

    #[test]
    fn foreign_is_what_is_neither_ours_nor_old() {
        let layout = Layout::new("/p/");
        let foreign = |key: &str| {
            layout.foreign().iter().any(|(from, to)| &from[..] <= key.as_bytes() && key.as_bytes() < &to[..])
        };
        for known in [
            "/p/job/a.service/object",
            "/p/unit/1",
            "/p/states/a",
            "/p/state/a",
            "/p/v3/entries/x",
            "/p/lease/engine",
        ] {
            assert!(!foreign(known), "{known}");
        }
        for other in ["/p/", "/p/a", "/p/jobs", "/p/v3", "/p/v4/x", "/p/zebra", "/p/statesman"] {
            assert!(foreign(other), "{other}");
        }
        for elsewhere in ["/o", "/p", "/p0", "/q/x"] {
            assert!(!foreign(elsewhere), "{elsewhere}");
        }
        assert!(layout.foreign().iter().all(|(from, to)| from <= to));
    }
}
