//! What journalctl prints, read entry by entry with the time of each: in the form `short-unix`, `export` or `json`,
//! whichever loses nothing of what is to be shown.
//!
//! Whatever a unit logs, an entry is never longer than [`LONGEST`], and never begins where journalctl did not begin one: in
//! `short-unix` later lines of a message are indented, in `export` what is not a line of text has its length in front, in
//! `json` an entry is a line.
use serde::Deserialize;
use std::collections::VecDeque;

/// The longest entry that is shown whole, bytes.
pub(crate) const LONGEST: usize = 1 << 20;
/// The longest JSON line, bytes. journalctl leaves out fields of more than 4 KiB.
const LONGEST_JSON: usize = 16 << 20;

/// The form in which entries are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    /// Time, host, program and message as people read them.
    Short,
    /// All fields in full, of which the message is wanted.
    Export,
    /// JSON, to be passed on.
    Json,
}

/// Something logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// When, in microseconds since 1970.
    pub(crate) stamp: u64,
    /// For `short-unix` what follows the time, line by line (an entry may go on with lines that came too late for it: then
    /// `first` is false); for `export` the message; for `json` the line.
    pub(crate) text: Vec<u8>,
    /// Whether it begins here.
    pub(crate) first: bool,
}

impl Wire {
    /// journalctl's name of it.
    pub(crate) fn output(self) -> &'static str {
        match self {
            Wire::Short => "short-unix",
            Wire::Export => "export",
            Wire::Json => "json",
        }
    }
}

/// Makes entries of bytes that come in pieces of any size.
pub(crate) struct Reader {
    wire: Wire,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// Bytes of that line that were too many.
    cut: usize,
    /// Bytes of a field of `export` that are yet to come.
    field: Option<Field>,
    /// The entry being read.
    entry: Option<Entry>,
    /// The time of the last entry of `short-unix`.
    last: u64,
    ready: VecDeque<Entry>,
}

/// A field of `export` with its length in front.
enum Field {
    /// So many of the eight bytes of the length have come.
    Length { message: bool, bytes: Vec<u8> },
    /// So many bytes of the value, and the newline after it, are yet to come.
    Value { message: bool, left: u64 },
}

impl Reader {
    pub(crate) fn new(wire: Wire) -> Self {
        Reader { wire, line: Vec::new(), cut: 0, field: None, entry: None, last: 0, ready: VecDeque::new() }
    }

    /// An entry that is complete.
    pub(crate) fn take(&mut self) -> Option<Entry> {
        self.ready.pop_front()
    }

    /// Takes a piece. The error says what is wrong with it.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            if let Some(field) = self.field.take() {
                bytes = self.binary(field, bytes)?;
                continue;
            }
            let end = bytes.iter().position(|&b| b == b'\n');
            let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            self.extend(part)?;
            bytes = rest.strip_prefix(b"\n").unwrap_or_default();
            if end.is_some() {
                let line = std::mem::take(&mut self.line);
                let cut = std::mem::take(&mut self.cut);
                self.line(line, cut)?;
            }
        }
        // What has come of the entry is shown now: more may not come for long.
        if self.wire == Wire::Short && self.line.is_empty() {
            self.finish();
        }
        Ok(())
    }

    /// Nothing more comes.
    pub(crate) fn end(&mut self) {
        if self.wire == Wire::Short && !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            let cut = std::mem::take(&mut self.cut);
            self.short(line, cut);
        }
        self.finish();
    }

    fn finish(&mut self) {
        self.ready.extend(self.entry.take());
    }

    fn extend(&mut self, part: &[u8]) -> Result<(), String> {
        let limit = if self.wire == Wire::Json { LONGEST_JSON } else { LONGEST };
        let room = part.len().min(limit.saturating_sub(self.line.len()));
        self.line.extend_from_slice(&part[..room]);
        self.cut += part.len() - room;
        if self.wire == Wire::Json && self.cut > 0 {
            return Err(format!("an entry is longer than {} MiB", LONGEST_JSON >> 20));
        }
        Ok(())
    }

    fn line(&mut self, line: Vec<u8>, cut: usize) -> Result<(), String> {
        match self.wire {
            Wire::Short => self.short(line, cut),
            Wire::Export => self.export(line, cut)?,
            Wire::Json if line.starts_with(b"{") => {
                let stamp = json_stamp(&line).ok_or("an entry has no time")?;
                self.ready.push_back(Entry { stamp, text: line, first: true });
            }
            // `-- No entries --`
            Wire::Json => {}
        }
        Ok(())
    }

    fn short(&mut self, mut line: Vec<u8>, cut: usize) {
        if cut > 0 {
            line.extend_from_slice(note(cut).as_bytes());
        }
        if let Some((stamp, text)) = short_stamp(&line) {
            let text = text.to_vec();
            self.finish();
            self.last = stamp;
            self.entry = Some(Entry { stamp, text, first: true });
        } else if line.first().is_some_and(|&b| b == b' ' || b == b'\t') && self.last > 0 {
            let too_long = |entry: &Entry| entry.text.len() + line.len() > LONGEST;
            if self.entry.as_ref().is_some_and(too_long) {
                self.finish();
            }
            match &mut self.entry {
                Some(entry) => {
                    entry.text.push(b'\n');
                    entry.text.append(&mut line);
                }
                None => self.entry = Some(Entry { stamp: self.last, text: line, first: false }),
            }
        }
        // Else journalctl speaks of the journal: `-- Boot … --`, `-- No entries --`.
    }

    fn export(&mut self, line: Vec<u8>, cut: usize) -> Result<(), String> {
        if line.is_empty() {
            // An entry without a message is empty with `cat`, too.
            if self.entry.as_ref().is_some_and(|entry| entry.stamp > 0) {
                self.finish();
            }
            self.entry = None;
            return Ok(());
        }
        let entry = self.entry.get_or_insert(Entry { stamp: 0, text: Vec::new(), first: true });
        let equals = line.iter().position(|&b| b == b'=');
        let (name, value) = match equals {
            Some(at) => (&line[..at], Some(&line[at + 1..])),
            None => (line.as_slice(), None),
        };
        match (name, value) {
            (b"__REALTIME_TIMESTAMP", Some(value)) => {
                let stamp = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                entry.stamp = stamp.ok_or("an entry has no time")?;
            }
            (b"MESSAGE", Some(value)) => {
                entry.text = value.to_vec();
                if cut > 0 {
                    entry.text.extend_from_slice(note(cut).as_bytes());
                }
            }
            (_, Some(_)) => {}
            // journalctl's own remarks have blanks; names of fields do not.
            (name, None) if name.contains(&b' ') => {}
            (name, None) => {
                self.field = Some(Field::Length { message: name == b"MESSAGE", bytes: Vec::new() });
            }
        }
        Ok(())
    }

    /// Goes on with a field that has its length in front; what is left of the bytes.
    fn binary<'a>(&mut self, field: Field, bytes: &'a [u8]) -> Result<&'a [u8], String> {
        match field {
            Field::Length { message, bytes: mut length } => {
                let (part, rest) = bytes.split_at(bytes.len().min(8 - length.len()));
                length.extend_from_slice(part);
                self.field = Some(match <[u8; 8]>::try_from(length.as_slice()) {
                    Ok(length) => {
                        let left = u64::from_le_bytes(length).checked_add(1).ok_or("a field has no end")?;
                        if message && let Some(entry) = &mut self.entry {
                            entry.text.clear();
                        }
                        Field::Value { message, left }
                    }
                    Err(_) => Field::Length { message, bytes: length },
                });
                Ok(rest)
            }
            Field::Value { message, left } => {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                let (part, rest) = bytes.split_at(here);
                let left = left - here as u64;
                if message && let Some(entry) = &mut self.entry {
                    let value = if left == 0 { part.strip_suffix(b"\n").unwrap_or(part) } else { part };
                    let room = value.len().min(LONGEST.saturating_sub(entry.text.len()));
                    entry.text.extend_from_slice(&value[..room]);
                    self.cut += value.len() - room;
                    if left == 0 && self.cut > 0 {
                        entry.text.extend_from_slice(note(self.cut).as_bytes());
                    }
                }
                if left == 0 {
                    self.cut = 0;
                } else {
                    self.field = Some(Field::Value { message, left });
                }
                Ok(rest)
            }
        }
    }
}

fn note(cut: usize) -> String {
    format!("… [{cut} bytes more]")
}

/// The time at the beginning of a line, `1700000000.123456 `, in microseconds, and the rest of the line.
fn short_stamp(line: &[u8]) -> Option<(u64, &[u8])> {
    let end = line.iter().position(|&b| b == b' ')?;
    let (seconds, micros) = std::str::from_utf8(&line[..end]).ok()?.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(seconds) || !digits(micros) || micros.len() != 6 {
        return None;
    }
    let stamp = seconds.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(micros.parse().ok()?)?;
    Some((stamp, &line[end + 1..]))
}

fn json_stamp(line: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Time {
        #[serde(rename = "__REALTIME_TIMESTAMP")]
        stamp: String,
    }
    serde_json::from_slice::<Time>(line).ok()?.stamp.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(wire: Wire, pieces: &[&[u8]]) -> Vec<(u64, String, bool)> {
        let mut reader = Reader::new(wire);
        for piece in pieces {
            reader.push(piece).unwrap();
        }
        reader.end();
        std::iter::from_fn(|| reader.take())
            .map(|entry| (entry.stamp, String::from_utf8_lossy(&entry.text).into_owned(), entry.first))
            .collect()
    }

    fn entry(stamp: u64, text: &str) -> (u64, String, bool) {
        (stamp, text.to_owned(), true)
    }

    const SHORT: &str = "-- Boot 4a1e --\n1700000000.000001 gold-1 sh[7]: one\n\
        1700000001.500000 gold-1 sh[7]: two\n                             and more\n\
        -- Boot c93b --\n1700000002.000000 gold-1 systemd[1]: 1700000003.000000 is no time";

    #[test]
    fn short_lines() {
        let expected = [
            entry(1_700_000_000_000_001, "gold-1 sh[7]: one"),
            entry(1_700_000_001_500_000, "gold-1 sh[7]: two\n                             and more"),
            entry(1_700_000_002_000_000, "gold-1 systemd[1]: 1700000003.000000 is no time"),
        ];
        assert_eq!(read(Wire::Short, &[SHORT.as_bytes()]), expected);
        assert_eq!(read(Wire::Short, &[b"-- No entries --\n"]), []);
        // However it is cut: the same lines, at the same times.
        for size in 1..40 {
            let pieces: Vec<_> = SHORT.as_bytes().chunks(size).collect();
            let mut got: Vec<(u64, String)> = Vec::new();
            for (stamp, text, first) in read(Wire::Short, &pieces) {
                match got.last_mut() {
                    Some((last, whole)) if !first => {
                        assert_eq!(*last, stamp);
                        whole.push_str(&format!("\n{text}"));
                    }
                    _ => got.push((stamp, text)),
                }
            }
            let expected: Vec<(u64, String)> = expected.iter().map(|it| (it.0, it.1.clone())).collect();
            assert_eq!(got, expected, "pieces of {size}");
        }
    }

    #[test]
    fn a_line_is_not_held_until_the_next_begins() {
        let mut reader = Reader::new(Wire::Short);
        reader.push(b"1700000000.000001 a b: c\n").unwrap();
        assert_eq!(reader.take().map(|entry| entry.stamp), Some(1_700_000_000_000_001));
        reader.push(b"       d\n").unwrap();
        let more = Entry { stamp: 1_700_000_000_000_001, text: b"       d".to_vec(), first: false };
        assert_eq!(reader.take(), Some(more));
    }

    fn export() -> Vec<u8> {
        let mut bytes = b"__CURSOR=s=1\n__REALTIME_TIMESTAMP=17\nMESSAGE=one = two\n_PID=7\n\n".to_vec();
        bytes.extend_from_slice(b"__REALTIME_TIMESTAMP=18\nBLOB\n");
        bytes.extend_from_slice(&30u64.to_le_bytes());
        bytes.extend_from_slice(b"\nMESSAGE=forged\n\n__REALTIME_TI\n");
        bytes.extend_from_slice(b"MESSAGE\n");
        bytes.extend_from_slice(&7u64.to_le_bytes());
        bytes.extend_from_slice(b"a\n\nb\xff\n\x00\n_PID=1\n\n-- No entries --\n__REALTIME_TIMESTAMP=19\n\n");
        bytes
    }

    #[test]
    fn export_entries() {
        let bytes = export();
        let expected = [entry(17, "one = two"), entry(18, "a\n\nb\u{fffd}\n\0"), entry(19, "")];
        assert_eq!(read(Wire::Export, &[&bytes]), expected);
        for size in 1..60 {
            let pieces: Vec<_> = bytes.chunks(size).collect();
            assert_eq!(read(Wire::Export, &pieces), expected, "pieces of {size}");
        }
    }

    #[test]
    fn json_lines() {
        let line = r#"{"MESSAGE":"x","__REALTIME_TIMESTAMP":"23"}"#;
        assert_eq!(read(Wire::Json, &[line.as_bytes(), b"\n-- No entries --\n"]), [entry(23, line)]);
        let mut reader = Reader::new(Wire::Json);
        assert!(reader.push(b"{\"MESSAGE\":1}\n").is_err());
    }

    #[test]
    fn what_is_too_long_is_cut() {
        let long = vec![b'x'; 3 * LONGEST];
        let mut bytes = b"1.000000 h p: ".to_vec();
        bytes.extend_from_slice(&long);
        bytes.extend_from_slice(b"\n2.000000 h p: next\n");
        let got = read(Wire::Short, &bytes.chunks(10_000).collect::<Vec<_>>());
        assert_eq!(got.len(), 2);
        assert!(got[0].1.len() < LONGEST + 64 && got[0].1.ends_with(" bytes more]"));
        assert_eq!(got[1], entry(2_000_000, "h p: next"));

        let mut bytes = b"__REALTIME_TIMESTAMP=5\nOTHER=".to_vec();
        bytes.extend_from_slice(&long);
        bytes.extend_from_slice(b"\nMESSAGE\n");
        bytes.extend_from_slice(&(long.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&long);
        bytes.extend_from_slice(b"\n\n__REALTIME_TIMESTAMP=6\nMESSAGE=next\n\n");
        let got = read(Wire::Export, &bytes.chunks(10_000).collect::<Vec<_>>());
        assert!(got[0].1.len() < LONGEST + 64 && got[0].1.ends_with("[2097152 bytes more]"));
        assert_eq!(got[1], entry(6, "next"));

        let mut reader = Reader::new(Wire::Json);
        assert!((0..20).any(|_| reader.push(&long).is_err()));
        let mut reader = Reader::new(Wire::Export);
        reader.push(b"F\n\xff\xff\xff\xff\xff\xff\xff").unwrap();
        assert!(reader.push(b"\xff").is_err());
    }

    /// Endless lines of one entry do not gather either.
    #[test]
    fn an_endless_entry_is_passed_on() {
        let mut reader = Reader::new(Wire::Short);
        let mut bytes = b"1.000000 h p: x".to_vec();
        (0..300_000).for_each(|_| bytes.extend_from_slice(b"\n      x"));
        reader.push(&bytes).unwrap();
        let parts: Vec<Entry> = std::iter::from_fn(|| reader.take()).collect();
        assert!(parts.iter().all(|part| part.text.len() <= LONGEST) && parts.len() > 1);
    }
}
