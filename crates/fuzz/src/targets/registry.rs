//! Records of the registry, as someone with access to etcd could write them.

use super::{Seen, about};
use fleet_cluster::view::View;
use fleet_registry::records::Reader;
use fleet_registry::{Entry, Event, Snapshot};

pub(super) const WORDS: &[&str] = &[
    "unit/",
    "schedule/",
    "leaving/",
    "states/",
    "presence/",
    "machine/",
    "format",
    "\"format\":1",
    "\"format\":2",
    "\"file\":",
    "\"desired\":\"launched\"",
    "\"machine\":",
    "\"metadata\":{",
    "\"cordoned\":true",
    "\"leaving\":true",
    "[X-Fleet]\\n",
    "Global=true",
    "Conflicts=*",
    ".service ",
    "c93b5f08e1ad47d2b6740e9f8a2d3c33",
];

/// Lines of `KEY VALUE`, or `KEY` alone for a deletion: no panic, a message that is safe to show for what can't be read, the view
/// consistent with itself, and the same from a snapshot.
pub(super) fn records(bytes: &[u8]) -> Seen {
    let Ok(text) = std::str::from_utf8(bytes) else { return Seen::of("no text") };
    let (mut reader, mut view) = (Reader::default(), View::default());
    let mut errors = Vec::new();
    let mut events = Vec::new();
    for (line, revision) in text.lines().zip(1..) {
        let (key, value) = line.split_once(' ').unwrap_or((line, ""));
        let entry =
            (!value.is_empty()).then(|| Entry { key: key.into(), value: value.as_bytes().into(), revision });
        let event = Event { key: key.into(), entry };
        match reader.event(&event) {
            Ok(change) => drop(change.map(|change| view.apply(change))),
            Err(error) => {
                errors.push(Seen::message(&error.reason));
                continue;
            }
        }
        events.push(event);
    }
    if let Err(error) = view.check() {
        panic!("the view is wrong: {error}");
    }
    // What is there now, read at once.
    let mut entries: Vec<Entry> = Vec::new();
    for event in &events {
        entries.retain(|entry| entry.key != event.key);
        entries.extend(event.entry.clone());
    }
    entries.sort_by(|one, other| one.key.cmp(&other.key));
    let snapshot = Snapshot { entries, revision: events.len() as u64 };
    let (changes, unread) = Reader::default().snapshot(&snapshot);
    assert!(unread.is_empty(), "read once and not again: {unread:?}");
    let mut at_once = View::default();
    for change in changes {
        at_once.apply(change);
    }
    assert!(view.units().eq(at_once.units()), "the units differ");
    assert!(view.schedule().eq(at_once.schedule()), "the schedule differs");
    assert!(view.machines().eq(at_once.machines()), "the machines differ");
    assert!(view.reports().eq(at_once.reports()), "the reports differ");
    errors.sort_unstable();
    errors.dedup();
    let sizes =
        [view.units().count(), view.schedule().count(), view.machines().count(), view.reports().count()];
    Seen::of((errors.iter().map(|seen| seen.0).collect::<Vec<_>>(), sizes.map(about)))
}
