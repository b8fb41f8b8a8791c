//! How lines of several sources are shown: with the machine and the unit in front.
use super::wire::{Entry, Wire};
use crate::copies::Copy;
use jiff::{Timestamp, tz::TimeZone};
use std::borrow::Cow;

/// A form of lines.
pub(crate) struct Look {
    form: Form,
    /// Times are shown as they are here: those of the machines may differ.
    zone: TimeZone,
    /// What stands in front, for each source.
    fronts: Vec<String>,
}

/// journalctl's `--output`, as far as it makes sense for several sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Time in this form of strftime.
    Short(&'static str),
    /// Seconds since 1970.
    ShortUnix,
    /// Nothing but the message.
    Cat,
    /// One object for each entry.
    Json,
}

impl Form {
    /// Reads an `--output`. The error says which there are.
    pub(crate) fn parse(output: &str) -> Result<Self, String> {
        Ok(match output {
            "short" | "" => Form::Short("%b %d %H:%M:%S"),
            "short-precise" => Form::Short("%b %d %H:%M:%S.%6f"),
            "short-iso" => Form::Short("%Y-%m-%dT%H:%M:%S%z"),
            "short-iso-precise" => Form::Short("%Y-%m-%dT%H:%M:%S.%6f%z"),
            "short-full" => Form::Short("%a %Y-%m-%d %H:%M:%S %Z"),
            "short-unix" => Form::ShortUnix,
            "cat" => Form::Cat,
            "json" => Form::Json,
            _ => {
                return Err(format!(
                    "--output={output} is for one unit on one machine. Of several there are: short, short-precise, \
                     short-iso, short-iso-precise, short-full, short-unix, cat, json."
                ));
            }
        })
    }

    /// What to ask for.
    pub(crate) fn wire(self) -> Wire {
        match self {
            Form::Short(_) | Form::ShortUnix => Wire::Short,
            Form::Cat => Wire::Export,
            Form::Json => Wire::Json,
        }
    }
}

/// The first eight digits of a machine's ID.
pub(crate) fn short_id(machine: &str) -> &str {
    machine.get(..8).unwrap_or(machine)
}

impl Look {
    pub(crate) fn new(form: Form, zone: TimeZone, copies: &[Copy]) -> Self {
        let width = copies.iter().map(|copy| copy.unit.len()).max().unwrap_or_default();
        let fronts = copies.iter().map(|Copy { unit, machine }| match form {
            Form::Json => {
                // Names that no field of the journal can have: those are in capitals.
                let (unit, machine) = (serde_json::json!(unit), serde_json::json!(machine));
                format!("{{\"machineID\":{machine},\"unitName\":{unit},")
            }
            _ => format!("{} {unit:width$} ", short_id(machine)),
        });
        Look { form, zone, fronts: fronts.collect() }
    }

    /// Writes an entry of a source, each of its lines with the machine and the unit in front.
    pub(crate) fn write(&self, out: &mut Vec<u8>, source: usize, entry: &Entry) {
        let front = self.fronts.get(source).map_or("", String::as_str);
        if self.form == Form::Json {
            out.extend_from_slice(front.as_bytes());
            out.extend_from_slice(entry.text.strip_prefix(b"{").unwrap_or(&entry.text));
            out.push(b'\n');
            return;
        }
        let time = self.time(entry.stamp);
        // Where the message begins in `short-unix`, later lines begin, too: the time is as wide there as here.
        let was = format!("{}.{:06}", entry.stamp / 1_000_000, entry.stamp % 1_000_000).len();
        for (number, line) in entry.text.split(|&b| b == b'\n').enumerate() {
            out.extend_from_slice(front.as_bytes());
            if self.form == Form::Cat {
                out.extend_from_slice(line);
            } else if entry.first && number == 0 {
                out.extend_from_slice(time.as_bytes());
                out.push(b' ');
                out.extend_from_slice(line);
            } else {
                let indented = line.iter().take_while(|&&b| b == b' ').count();
                let blanks = (indented + time.chars().count()).saturating_sub(was);
                out.resize(out.len() + blanks, b' ');
                out.extend_from_slice(&line[indented..]);
            }
            out.push(b'\n');
        }
    }

    fn time(&self, stamp: u64) -> Cow<'static, str> {
        let Form::Short(form) = self.form else {
            return match self.form {
                Form::ShortUnix => format!("{}.{:06}", stamp / 1_000_000, stamp % 1_000_000).into(),
                _ => "".into(),
            };
        };
        let time = i64::try_from(stamp).ok().and_then(|stamp| Timestamp::from_microsecond(stamp).ok());
        match time {
            Some(time) => time.to_zoned(self.zone.clone()).strftime(form).to_string().into(),
            // Beyond all calendars.
            None => stamp.to_string().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(output: &str, entries: &[(usize, &str, bool)]) -> String {
        let copy = |unit: &str, machine: &str| Copy { unit: unit.to_owned(), machine: machine.to_owned() };
        let copies = [
            copy("a.service", "4a1e0c2fb7d94e6c8f3a51d2c07e9b11"),
            copy("long.service", "c93b5f08e1ad47d2b6740e9f8a2d3c33"),
        ];
        let look = Look::new(Form::parse(output).unwrap(), TimeZone::fixed(jiff::tz::offset(2)), &copies);
        let mut out = Vec::new();
        for (source, text, first) in entries {
            let entry = Entry { stamp: 1_700_000_000_123_456, text: text.as_bytes().to_vec(), first: *first };
            look.write(&mut out, *source, &entry);
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn machine_and_unit_in_front() {
        let entries = [
            (0, "gold-1 sh[7]: one\n                                two", true),
            (1, "gold-3 sh[8]: x", true),
        ];
        assert_eq!(
            shown("short", &entries),
            "4a1e0c2f a.service    Nov 15 00:13:20 gold-1 sh[7]: one\n\
             4a1e0c2f a.service                                  two\n\
             c93b5f08 long.service Nov 15 00:13:20 gold-3 sh[8]: x\n"
        );
        assert_eq!(
            shown("cat", &[(0, "one\ntwo", true), (1, "", true)]),
            "4a1e0c2f a.service    one\n4a1e0c2f a.service    two\nc93b5f08 long.service \n"
        );
        assert_eq!(
            shown("json", &[(1, r#"{"A":"1"}"#, true)]),
            "{\"machineID\":\"c93b5f08e1ad47d2b6740e9f8a2d3c33\",\"unitName\":\"long.service\",\"A\":\"1\"}\n"
        );
        // Lines that came too late for their entry.
        assert_eq!(
            shown("short", &[(0, "                                three", false)]),
            "4a1e0c2f a.service                                  three\n"
        );
    }

    #[test]
    fn times() {
        for (output, time) in [
            ("short", "Nov 15 00:13:20"),
            ("short-precise", "Nov 15 00:13:20.123456"),
            ("short-iso", "2023-11-15T00:13:20+0200"),
            ("short-iso-precise", "2023-11-15T00:13:20.123456+0200"),
            ("short-full", "Wed 2023-11-15 00:13:20 +02"),
            ("short-unix", "1700000000.123456"),
        ] {
            assert_eq!(
                shown(output, &[(1, "x", true)]),
                format!("c93b5f08 long.service {time} x\n"),
                "{output}"
            );
        }
        assert!(Form::parse("verbose").unwrap_err().contains("short-iso"));
    }
}
