//! Files that a registry is exported to.

use super::{Seen, about};
use fleetd::server::transfer::{self, Archive};

pub(super) const WORDS: &[&str] = &[
    "{\"fleet-registry\":1",
    ",\"records\":1",
    "\n{\"key\":\"unit/a.service\",\"value\":",
    "\"hex\":\"7b7d\"}",
    "\"format\":1",
    "\"desired\":\"loaded\"",
    "}",
];

/// A file, after a byte: if that is even, its lines get right checksums first, which nothing would pass without. What is read is written
/// and read again as the same.
pub(super) fn export(bytes: &[u8]) -> Seen {
    let Some((first, bytes)) = bytes.split_first() else { return Seen::of("nothing") };
    let mut text = bytes.to_vec();
    if first % 2 == 0 {
        text.clear();
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let body = line.strip_suffix(b"}").unwrap_or(line);
            text.extend_from_slice(body);
            text.extend_from_slice(format!(",\"crc\":\"{:08x}\"}}\n", crc32fast::hash(body)).as_bytes());
        }
    }
    match transfer::read(&text) {
        Ok(archive) => {
            let again = Archive::read(archive.to_text().as_bytes()).expect("what was written can be read");
            assert!(again == archive, "read again it is another");
            Seen::of(about(archive.records.len()))
        }
        Err(error) => {
            let lines = 1 + text.iter().filter(|byte| **byte == b'\n').count();
            assert!((1..=lines).contains(&error.line), "line {} of {lines}", error.line);
            Seen::message(&error.reason)
        }
    }
}
