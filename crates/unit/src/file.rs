//! Unit files.
use std::{fmt, sync::Arc};

/// One `Name=Value` line of a unit file, with the section it stands in.
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
    hash: Hash,
}

/// Why a text is not a unit file, with the line (from 1). Display gives the original's text without
/// the line; `line()` gives the place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("todo")]
pub struct ParseError;

impl ParseError {
    /// The line of the mistake, from 1.
    pub fn line(&self) -> usize {
        todo!()
    }
}

/// The largest unit file accepted, bytes. systemd itself reads at most 1 MiB a line; unit files are
/// in the kilobytes.
pub const MAX_SIZE: usize = 1 << 20;

impl UnitFile {
    /// Reads a text.
    pub fn parse(_text: &str) -> Result<Self, ParseError> {
        todo!()
    }
    /// Reads the bytes of a file: as [`parse`](Self::parse), and refuses what is not UTF-8, has NUL bytes or is
    /// larger than [`MAX_SIZE`].
    pub fn from_bytes(_bytes: &[u8]) -> Result<Self, ParseError> {
        todo!()
    }
    /// Makes a file in normal form of options, as the API v1 delivers them (a newline in a value can
    /// make further options, as in the original).
    pub fn from_options(_options: Vec<UnitOption>) -> Result<Self, ParseError> {
        todo!()
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
    /// The options in the original's normal form, whose SHA-1 the hash is.
    pub fn normal_form(&self) -> String {
        todo!()
    }
    /// The hash.
    pub fn hash(&self) -> Hash {
        self.hash
    }
    /// All values of an option, in order.
    pub fn values<'a>(&'a self, section: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |o| o.section == section && o.name == name).map(|o| o.value.as_str())
    }
    /// `Description=` of [Unit] (the last one), if any and not empty.
    pub fn description(&self) -> Option<&str> {
        todo!()
    }
    /// Whether it has an [Install] section with options, so that it has to be enabled.
    pub fn has_install(&self) -> bool {
        todo!()
    }
}

impl Hash {
    /// The first 7 hexadecimal digits, as shown in lists.
    pub fn short(&self) -> String {
        self.to_string()[..7].to_owned()
    }
    /// Reads 40 hexadecimal digits.
    pub fn parse(_text: &str) -> Option<Hash> {
        todo!()
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
