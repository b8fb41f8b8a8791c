//! Unit names.
use std::{fmt, str::FromStr, sync::Arc};

/// A valid unit name, such as `hello.service` or `hello@1.service`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitName(Arc<str>);

/// The types of unit fleet accepts, each a file name suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum UnitType {
    Service,
    Socket,
    Device,
    Mount,
    Automount,
    Timer,
    Path,
    Target,
    Slice,
    Swap,
}

/// Why a string is not a unit name. The texts are those of the original's API answers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("todo")]
pub struct NameError;

impl UnitName {
    /// Checks a whole name.
    pub fn parse(_name: &str) -> Result<Self, NameError> {
        todo!()
    }
    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// The type, from the suffix.
    pub fn kind(&self) -> UnitType {
        todo!()
    }
    /// The name without its suffix (`hello@1` of `hello@1.service`): `%N`.
    pub fn stem(&self) -> &str {
        todo!()
    }
    /// What stands before the `@`, or the stem: `%p`.
    pub fn prefix(&self) -> &str {
        todo!()
    }
    /// What stands between the `@` and the suffix, empty for a template, `None` for a plain name: `%i`.
    pub fn instance(&self) -> Option<&str> {
        todo!()
    }
    /// `hello@.service`
    pub fn is_template(&self) -> bool {
        todo!()
    }
    /// For an instance, the name of its template.
    pub fn template(&self) -> Option<UnitName> {
        todo!()
    }
}

/// What the command line makes of an argument: the last path element, with `.service` added where
/// no known suffix stands (golden/04-submit.txt, golden/05-unit-text.txt).
pub fn from_argument(_argument: &str) -> String {
    todo!()
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl FromStr for UnitName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        Self::parse(s)
    }
}
impl AsRef<str> for UnitName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}
impl std::borrow::Borrow<str> for UnitName {
    fn borrow(&self) -> &str {
        &self.0
    }
}
impl serde::Serialize for UnitName {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}
impl<'de> serde::Deserialize<'de> for UnitName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}
