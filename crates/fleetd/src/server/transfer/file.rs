//! The file that a registry is exported to: lines of JSON, for people to read and for programs to check.
//!
//! ```text
//! {"fleet-registry":1,"software":"2.0.0","taken":1795200000,"revision":812,"records":2,"note":"…","crc":"0badf00d"}
//! {"key":"schedule/a.service","value":{"format":1,"machine":"…"},"crc":"…"}
//! {"key":"unit/a.service","value":{"format":1,"file":"…","desired":"launched"},"crc":"…"}
//! ```
//!
//! The first line tells the format of the file and how many records follow, one a line, in the order of their keys. Values are the
//! records of the registry as they are, byte for byte; one that is no JSON is written as `hex`. Each line ends with the CRC-32 of
//! what it says before, so that damage is found where it is.

use fleet_registry::Entry;
use serde::{Deserialize, Serialize, de::IgnoredAny};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

/// The format this code writes, and the newest it reads.
const FORMAT: u32 = 1;
/// The largest file that is read, bytes: some hundred thousand units.
pub const MAX_FILE: usize = 256 << 20;
/// What the first line says to people.
const NOTE: &str = "whoever has this file has the cluster: the key of its CA is in it";
/// What the end of each line begins with.
const SEAL: &str = r#","crc":""#;

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    #[serde(rename = "fleet-registry")]
    format: u32,
    software: String,
    taken: u64,
    revision: u64,
    records: usize,
    note: String,
}

/// All durable records of a registry at one revision.
#[derive(Clone, PartialEq, Eq)]
pub struct Archive {
    /// The version of the fleetd that made it.
    pub software: String,
    /// When, seconds since 1970.
    pub taken: u64,
    /// The revision of the registry, which means nothing in another.
    pub revision: u64,
    /// Values by keys.
    pub records: BTreeMap<String, Arc<[u8]>>,
}

impl std::fmt::Debug for Archive {
    /// Without what the records say: there are secrets among them.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Archive").field("records", &self.records.len()).finish_non_exhaustive()
    }
}

/// Why a file is not taken, and where in it that is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
#[allow(missing_docs)]
pub struct FileError {
    /// From 1 on.
    pub line: usize,
    pub reason: String,
}

impl Archive {
    /// What is exported of these entries at this moment.
    pub fn of<'a>(entries: impl IntoIterator<Item = &'a Entry>, revision: u64, taken: u64) -> Self {
        let records = entries.into_iter().map(|entry| (entry.key.to_string(), entry.value.clone()));
        Archive {
            software: env!("CARGO_PKG_VERSION").to_owned(),
            taken,
            revision,
            records: records.collect(),
        }
    }

    /// The file.
    pub fn to_text(&self) -> String {
        let head = Head {
            format: FORMAT,
            software: self.software.clone(),
            taken: self.taken,
            revision: self.revision,
            records: self.records.len(),
            note: NOTE.to_owned(),
        };
        let mut text = String::new();
        seal(&mut text, serde_json::to_string(&head).expect("texts and numbers are always valid JSON"));
        for (key, value) in &self.records {
            let key = serde_json::to_string(key).expect("a text is always valid JSON");
            let line = match plain(value) {
                Some(json) => format!(r#"{{"key":{key},"value":{json}}}"#),
                None => format!(r#"{{"key":{key},"hex":"{}"}}"#, to_hex(value)),
            };
            seal(&mut text, line);
        }
        text
    }

    /// Reads a file.
    ///
    /// # Errors
    /// Names the first line that is not what [`to_text`](Self::to_text) writes.
    pub fn read(text: &[u8]) -> Result<Self, FileError> {
        let at = |line: usize| move |reason: String| FileError { line, reason };
        if text.len() > MAX_FILE {
            return Err(at(1)(format!("the file is larger than {} MiB", MAX_FILE >> 20)));
        }
        let text = std::str::from_utf8(text).map_err(|error| {
            let before = text.get(..error.valid_up_to()).unwrap_or_default();
            at(before.iter().filter(|byte| **byte == b'\n').count() + 1)("this is no text (UTF-8)".to_owned())
        })?;
        let mut lines = text.lines().zip(1..);
        let (first, _) = lines.next().ok_or_else(|| at(1)("the file is empty".to_owned()))?;
        let head = head(first).map_err(at(1))?;
        let mut records = BTreeMap::new();
        let mut last = 1;
        for (line, number) in lines {
            last = number;
            if records.len() == head.records {
                let reason =
                    format!("there are more lines than the {} records that line 1 tells of", head.records);
                return Err(at(number)(reason));
            }
            let (key, value) = record(line).map_err(at(number))?;
            if records.last_key_value().is_some_and(|(before, _)| *before >= key) {
                return Err(at(number)(format!(
                    "{key} stands out of its place: keys are in order, each once"
                )));
            }
            records.insert(key, value);
        }
        if records.len() < head.records {
            let missing = head.records - records.len();
            return Err(at(last)(format!(
                "the file ends here, and {missing} of {} records are missing",
                head.records
            )));
        }
        Ok(Archive { software: head.software, taken: head.taken, revision: head.revision, records })
    }

    /// What tells the contents from others'.
    pub fn digest(&self) -> String {
        let mut crc = crc32fast::Hasher::new();
        let mut bytes = 0;
        for (key, value) in &self.records {
            // Lengths first, so that no two contents look the same.
            for part in [key.as_bytes(), value] {
                crc.update(&(part.len() as u64).to_be_bytes());
                crc.update(part);
                bytes += part.len();
            }
        }
        format!("{:08x}-{}-{bytes}", crc.finalize(), self.records.len())
    }
}

/// A value that can stand in a line as it is.
fn plain(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?;
    // Nothing but a record begins so; and what a line looks like does not depend on blanks around it.
    let object = text.starts_with('{') && text.ends_with('}') && !text.contains(['\n', '\r']);
    (object && serde_json::from_str::<IgnoredAny>(text).is_ok()).then_some(text)
}

/// Ends a line with its checksum.
fn seal(text: &mut String, line: String) {
    let body = line.strip_suffix('}').unwrap_or(&line);
    // Writing to a text does not fail.
    let _ = writeln!(text, r#"{body}{SEAL}{:08x}"}}"#, crc32fast::hash(body.as_bytes()));
}

/// A line without its checksum, which has to be right.
fn unseal(line: &str) -> Result<String, String> {
    let sealed = line.rsplit_once(SEAL).and_then(|(body, end)| Some((body, end.strip_suffix(r#""}"#)?)));
    let right = |(body, crc): &(&str, &str)| format!("{:08x}", crc32fast::hash(body.as_bytes())) == *crc;
    match sealed.filter(right) {
        Some((body, _)) => Ok(format!("{body}}}")),
        None => Err("it is damaged: its checksum (crc) is not that of what it says".to_owned()),
    }
}

fn head(line: &str) -> Result<Head, String> {
    #[derive(Deserialize)]
    struct Format {
        #[serde(rename = "fleet-registry")]
        format: u32,
    }
    // Looked at first: a newer file may be different in all else.
    let Format { format } =
        serde_json::from_str(line).map_err(|_| "this is no export of a fleet registry".to_owned())?;
    if format == 0 || format > FORMAT {
        return Err(format!(
            "format {format} is unknown here (known: up to {FORMAT}); was it made by a newer fleetd?"
        ));
    }
    serde_json::from_str(&unseal(line)?).map_err(|error| error.to_string())
}

fn record(line: &str) -> Result<(String, Arc<[u8]>), String> {
    let line = unseal(line)?;
    let strange = || "this is no record: {\"key\":…,\"value\":…}".to_owned();
    let rest = line.strip_prefix(r#"{"key":"#).ok_or_else(strange)?;
    let mut keys = serde_json::Deserializer::from_str(rest).into_iter::<String>();
    let key = keys.next().and_then(Result::ok).ok_or_else(strange)?;
    let rest = rest.get(keys.byte_offset()..).unwrap_or_default();
    let value = if let Some(json) = rest.strip_prefix(r#","value":"#).and_then(|rest| rest.strip_suffix('}'))
    {
        plain(json.as_bytes()).ok_or_else(strange)?.as_bytes().into()
    } else {
        let hex = rest.strip_prefix(r#","hex":""#).and_then(|rest| rest.strip_suffix(r#""}"#));
        hex.and_then(from_hex).ok_or_else(strange)?.into()
    };
    Ok((key, value))
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = hex.as_bytes().chunks(2);
    pairs.map(|pair| Some((digit(pair[0])? << 4) | digit(*pair.get(1)?)?)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn archive(records: &[(&str, &[u8])]) -> Archive {
        Archive {
            software: "2.0.0".to_owned(),
            taken: 1_795_200_000,
            revision: 812,
            records: records.iter().map(|(key, value)| ((*key).to_owned(), (*value).into())).collect(),
        }
    }

    fn error(text: &str) -> String {
        Archive::read(text.as_bytes()).unwrap_err().to_string()
    }

    const UNIT: &[u8] =
        br#"{"format":1,"file":"[Service]\nExecStart=/bin/true\n","desired":"launched","later":[1.50]}"#;

    #[test]
    fn the_form_of_the_file_stays() {
        let text = archive(&[("unit/a.service", UNIT), ("odd", b"\xff\n")]).to_text();
        let expected = concat!(
            r#"{"fleet-registry":1,"software":"2.0.0","taken":1795200000,"revision":812,"records":2,"#,
            r#""note":"whoever has this file has the cluster: the key of its CA is in it","crc":"CRC"}"#,
            "\n",
            r#"{"key":"odd","hex":"ff0a","crc":"CRC"}"#,
            "\n",
            r#"{"key":"unit/a.service","value":{"format":1,"file":"[Service]\nExecStart=/bin/true\n","desired":"launched","later":[1.50]},"crc":"CRC"}"#,
            "\n",
        );
        let mut shown = String::new();
        for line in text.lines() {
            let (body, crc) = line.rsplit_once(SEAL).unwrap();
            assert_eq!(crc.len(), 10);
            shown += &format!("{body}{SEAL}CRC\"}}\n");
            // All of it is JSON.
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
        assert_eq!(shown, expected);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let good = archive(&[("a", b"{}"), ("b", UNIT), ("c", b"{}")]).to_text();
        let lines: Vec<&str> = good.lines().collect();
        let of = |lines: &[&str]| lines.join("\n") + "\n";
        assert_eq!(error(""), "line 1: the file is empty");
        assert_eq!(error("[Unit]\n"), "line 1: this is no export of a fleet registry");
        assert_eq!(error("{}\n"), "line 1: this is no export of a fleet registry");
        let newer = good.replace(r#"{"fleet-registry":1"#, r#"{"fleet-registry":2"#);
        assert!(error(&newer).starts_with("line 1: format 2 is unknown here"), "{}", error(&newer));
        assert_eq!(error(&good.replace("/bin/true", "/bin/tree")).split(':').next(), Some("line 3"));
        assert_eq!(error(&good.replace("812", "813")).split(':').next(), Some("line 1"));
        assert_eq!(error(&of(&lines[..2])), "line 2: the file ends here, and 2 of 3 records are missing");
        assert_eq!(error(&of(&lines[..1])), "line 1: the file ends here, and 3 of 3 records are missing");
        let swapped = of(&[lines[0], lines[2], lines[1], lines[3]]);
        assert_eq!(error(&swapped), "line 3: a stands out of its place: keys are in order, each once");
        let more = of(&[lines[0], lines[1], lines[2], lines[3], lines[3]]);
        assert_eq!(error(&more), "line 5: there are more lines than the 3 records that line 1 tells of");
        let cut = &good[..good.len() - 20];
        assert!(error(cut).starts_with("line 4: it is damaged"), "{}", error(cut));
        let mut binary = good.clone().into_bytes();
        binary[lines[0].len() + 5] = 0xff;
        assert_eq!(Archive::read(&binary).unwrap_err().to_string(), "line 2: this is no text (UTF-8)");
    }

    #[test]
    fn nothing_shows_secrets() {
        let archive = archive(&[("ca", br#"{"key":"hunter2"}"#)]);
        assert!(!format!("{archive:?}").contains("hunter2"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(records in proptest::collection::btree_map(".*", proptest::collection::vec(any::<u8>(), 0..40), 0..20)) {
            let records: Vec<(&str, &[u8])> = records.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
            let before = archive(&records);
            let after = Archive::read(before.to_text().as_bytes()).unwrap();
            prop_assert!(after == before);
            prop_assert_eq!(after.digest(), before.digest());
        }

        #[test]
        fn any_change_of_a_byte_is_found(at in 0usize..600, to in any::<u8>()) {
            let before = archive(&[("a", b"{}"), ("b", UNIT)]);
            let mut text = before.to_text().into_bytes();
            let at = at % text.len();
            prop_assume!(text[at] != to);
            text[at] = to;
            // A line end that became a blank between two lines' braces and the like is refused, or says the same.
            if let Ok(after) = Archive::read(&text) {
                prop_assert!(after == before);
            }
        }

        #[test]
        fn nothing_crashes_it(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Archive::read(&text);
        }
    }
}
