//! Unit files: a text, kept byte for byte, and what is read from it.
//!
//! The reading follows the original's (golden/05-unit-text.txt, "unit file errors" of
//! golden/04-submit.txt), so that the same file has the same options and the same hash. Three things
//! differ, all as systemd.syntax(7) has them: a comment line within a continued value is left out
//! instead of taken for a part of it, `\r\n` ends a line also where it is continued, and a backslash
//! with blanks after it never continues a line.
use crate::lexer;
use sha1::{Digest, Sha1};
use std::{borrow::Cow, collections::HashMap, fmt, sync::Arc};

pub use crate::lexer::{MAX_LINE, ParseError};

/// One `Name=Value` line of a unit file, with the section it stands in.
///
/// A value that goes over several lines has them as they stand, with the backslashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub struct UnitOption {
    pub section: String,
    pub name: String,
    pub value: String,
}

/// The SHA-1 of a unit file's options in normal form, as the original computed it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 20]);

/// A unit file: its text, byte for byte, and the options read from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitFile {
    text: Arc<str>,
    options: Arc<[UnitOption]>,
    /// For every option, the line it begins in.
    lines: Arc<[usize]>,
    description: Option<Arc<str>>,
    hash: Hash,
}

/// The largest unit file accepted, bytes. systemd itself reads at most 1 MiB a line; unit files are
/// in the kilobytes.
pub const MAX_SIZE: usize = 1 << 20;

impl UnitFile {
    /// Reads a text.
    ///
    /// # Errors
    /// What the original refused, NUL bytes, and more than [`MAX_SIZE`] bytes.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        if text.len() > MAX_SIZE {
            return Err(ParseError::too_large(&text.as_bytes()[..MAX_SIZE]));
        }
        let (options, lines): (Vec<_>, Vec<_>) = lexer::read(text)?.into_iter().unzip();
        let description = options
            .iter()
            .rfind(|o| o.section == "Unit" && o.name == "Description")
            .map(UnitOption::unfolded_value)
            .filter(|description| !description.is_empty())
            .map(Arc::from);
        let hash = Hash(Sha1::digest(serialise(&options)).into());
        Ok(UnitFile { text: text.into(), options: options.into(), lines: lines.into(), description, hash })
    }

    /// Reads the bytes of a file: as [`parse`](Self::parse), and refuses what is not UTF-8.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ParseError> {
        if bytes.len() > MAX_SIZE {
            return Err(ParseError::too_large(&bytes[..MAX_SIZE]));
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::parse(text),
            Err(error) => Err(ParseError::not_utf8(&bytes[..error.valid_up_to()])),
        }
    }

    /// Makes a file in normal form of options, as the API v1 delivers them.
    ///
    /// The options are written out and read again, so that a newline in a value can make further
    /// options, as in the original. Lines of an error count in the text written out.
    pub fn from_options(options: Vec<UnitOption>) -> Result<Self, ParseError> {
        let text = serialise(&options);
        let file = Self::parse(&text)?;
        let normal = file.normal_form();
        if normal == text { Ok(file) } else { Self::parse(&normal) }
    }

    /// The text, byte for byte.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text, shared.
    pub fn shared_text(&self) -> Arc<str> {
        self.text.clone()
    }

    /// All options, in the order of the file.
    pub fn options(&self) -> &[UnitOption] {
        &self.options
    }

    /// The line (from 1) in which an option, counted from 0 as in [`options`](Self::options), begins.
    pub fn line_of(&self, option_index: usize) -> Option<usize> {
        self.lines.get(option_index).copied()
    }

    /// The options in the original's normal form, whose SHA-1 the hash is: sections in the order in
    /// which they first appear, a blank line between them, one `Name=Value` a line. Reading it gives
    /// the same normal form again.
    pub fn normal_form(&self) -> String {
        serialise(&self.options)
    }

    /// The hash.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// All values of an option, in order.
    pub fn values<'a>(&'a self, section: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |o| o.section == section && o.name == name).map(|o| o.value.as_str())
    }

    /// `Description=` of `[Unit]` (the last one, continued lines joined), if any and not empty.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// Whether it has an `[Install]` section with options, so that it has to be enabled.
    pub fn has_install(&self) -> bool {
        self.options.iter().any(|o| o.section == "Install")
    }
}

impl UnitOption {
    /// The value on one line, as systemd reads it: every backslash at the end of a line is a blank,
    /// and lines lose their indentation.
    pub fn unfolded_value(&self) -> Cow<'_, str> {
        unfolded(&self.value)
    }
}

/// See [`UnitOption::unfolded_value`].
pub(crate) fn unfolded(value: &str) -> Cow<'_, str> {
    if !value.contains('\n') {
        return Cow::Borrowed(value);
    }
    let lines: Vec<&str> = value.split("\\\n").map(str::trim_start).collect();
    Cow::Owned(lines.join(" ").trim().to_owned())
}

/// Writes options in normal form.
fn serialise(options: &[UnitOption]) -> String {
    let mut index: HashMap<&str, usize> = HashMap::new();
    let mut sections: Vec<(&str, Vec<&UnitOption>)> = Vec::new();
    for option in options {
        let at = *index.entry(&option.section).or_insert_with(|| {
            sections.push((&option.section, Vec::new()));
            sections.len() - 1
        });
        sections[at].1.push(option);
    }
    let mut text = String::new();
    for (section, options) in sections {
        if !text.is_empty() {
            text.push('\n');
        }
        text.extend(["[", section, "]\n"]);
        for option in options {
            text.extend([&option.name, "=", &option.value, "\n"]);
        }
    }
    text
}

impl Hash {
    /// The first 7 hexadecimal digits, as shown in lists.
    pub fn short(&self) -> String {
        self.to_string()[..7].to_owned()
    }

    /// Reads 40 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Hash> {
        let digits: &[u8; 40] = text.as_bytes().try_into().ok()?;
        let mut hash = [0; 20];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let [high, low] = [pair[0], pair[1]].map(|digit| char::from(digit).to_digit(16));
            *byte = u8::try_from(high? * 16 + low?).ok()?;
        }
        Some(Hash(hash))
    }
}
impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
impl serde::Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}
impl<'de> serde::Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a unit hash has 40 hexadecimal digits"))
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
