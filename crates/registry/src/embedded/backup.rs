//! The backup: all durable records as JSON lines, for the day the file itself can't be read any more.
//!
//! The first line describes the rest, every line carries a checksum, and the file is replaced as a
//! whole. It is written away from the commits, from what is in memory, and only when something changed.
use super::{
    disk::sync_directory,
    error::OpenError,
    memory::Record,
    record::{Digest, FORMAT, Meta, checksum},
};
use crate::store::Revision;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, BufWriter, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The name of the backup.
pub(super) const FILE: &str = "registry.backup";
/// The longest line: a value as text with every byte escaped (six for one), and the rest.
const MAX_LINE: u64 = 6 * crate::store::MAX_BYTES as u64 + 65_536;

/// The first line.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Header {
    #[serde(flatten)]
    pub(super) meta: Meta,
    /// When it was written, seconds since 1970.
    taken: u64,
    pub(super) digest: Digest,
}

impl Header {
    /// How old the backup is.
    pub(super) fn age(&self) -> Duration {
        now().saturating_sub(Duration::from_secs(self.taken))
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Line {
    key: String,
    revision: Revision,
    /// The value, when it is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// The value, when it is not: its bytes as hexadecimal digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hex: Option<String>,
    crc: u32,
}

impl Line {
    fn of(record: &Record) -> Self {
        let text = std::str::from_utf8(&record.value).ok().map(str::to_owned);
        let hex = text.is_none().then(|| record.value.iter().map(|b| format!("{b:02x}")).collect());
        let crc = checksum(&record.key, record.revision, &record.value);
        Line { key: record.key.to_string(), revision: record.revision, text, hex, crc }
    }
    fn record(self) -> Option<Record> {
        let value = match (self.text, self.hex) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(hex)) => from_hex(&hex)?,
            _ => return None,
        };
        (checksum(&self.key, self.revision, &value) == self.crc).then(|| Record {
            key: self.key.into(),
            revision: self.revision,
            value: value.into(),
        })
    }
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| (b as char).to_digit(16);
    let pairs = hex.as_bytes().chunks(2);
    pairs.map(|p| Some((digit(p[0])? << 4 | digit(*p.get(1)?)?) as u8)).collect()
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Puts a backup of these records in place, unless the one there holds just these.
pub(super) fn write(directory: &Path, meta: &Meta, records: &[Record]) -> Result<(), OpenError> {
    let digest = Digest::of(records);
    if header(directory).is_some_and(|h| h.digest == digest && h.meta.cluster == meta.cluster) {
        return Ok(());
    }
    let (path, new) = (directory.join(FILE), directory.join("registry.backup.new"));
    let header = Header { meta: meta.clone(), taken: now().as_secs(), digest };
    let write = || {
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let mut out = BufWriter::with_capacity(1 << 16, file);
        let head = serde_json::to_string(&header)?;
        writeln!(out, "{head} {}", crc32fast::hash(head.as_bytes()))?;
        for record in records {
            serde_json::to_writer(&mut out, &Line::of(record))?;
            out.write_all(b"\n")?;
        }
        out.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        fs::rename(&new, &path)
    };
    if let Err(e) = write() {
        // Half a backup is of no use, and may be what fills the disk.
        let _ = fs::remove_file(&new);
        return Err(OpenError::io("write", new)(e));
    }
    sync_directory(directory)
}

fn parse_header(line: &str) -> Option<Header> {
    let (json, crc) = line.trim_end().rsplit_once(' ')?;
    let right = crc32fast::hash(json.as_bytes()) == crc.parse::<u32>().ok()?;
    let header: Header = serde_json::from_str(json).ok().filter(|_| right)?;
    (header.meta.format <= FORMAT).then_some(header)
}

/// The description of the backup in a directory, when there is one that can be read.
fn header(directory: &Path) -> Option<Header> {
    let mut line = String::new();
    BufReader::new(File::open(directory.join(FILE)).ok()?.take(4096)).read_line(&mut line).ok()?;
    parse_header(&line)
}

/// The age of the backup in a directory, when there is one.
pub(super) fn age(directory: &Path) -> Option<Duration> {
    header(directory).map(|h| h.age())
}

/// A backup read back.
pub(super) struct Backup {
    pub(super) header: Header,
    /// In key order.
    pub(super) records: Vec<Record>,
}

impl Backup {
    /// Whether all that was written is there.
    pub(super) fn is_whole(&self) -> bool {
        Digest::of(&self.records) == self.header.digest
    }
}

/// Reads the backup; lines with a wrong checksum are left out. `None`: there is none, or its first line
/// can't be read.
pub(super) fn read(directory: &Path) -> Result<Option<Backup>, OpenError> {
    let path = directory.join(FILE);
    let file = match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(OpenError::io("open", &path))?,
    };
    let mut lines = BufReader::new(file);
    let mut line = Vec::new();
    let mut next = |line: &mut Vec<u8>| {
        line.clear();
        lines.by_ref().take(MAX_LINE).read_until(b'\n', line).map_err(OpenError::io("read", &path))
    };
    next(&mut line)?;
    let Some(header) = std::str::from_utf8(&line).ok().and_then(parse_header) else { return Ok(None) };
    let mut records = Vec::new();
    while next(&mut line)? > 0 {
        let parsed = serde_json::from_slice::<Line>(&line).ok();
        records.extend(parsed.and_then(Line::record));
    }
    records.sort_by(|a: &Record, b| a.key.cmp(&b.key));
    Ok(Some(Backup { header, records }))
}
