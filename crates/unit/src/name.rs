//! Unit names: which strings are one, and the parts of it.
//!
//! The rules are systemd's (systemd.unit(5), `unit_name_is_valid()`), the texts of the refusals are
//! the original's (golden/04-submit.txt, golden/19-api.txt).
use crate::quote::{quoted, quoted_char};
use std::{fmt, str::FromStr, sync::Arc};

/// The longest name systemd takes, bytes (its UNIT_NAME_MAX of 256 counts the final NUL).
pub const MAX_LENGTH: usize = 255;

/// A valid unit name, such as `hello.service` or `hello@1.service`. It has no `/`, so that it is
/// safe as a file name.
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
pub enum NameError {
    /// There is nothing.
    #[error("unit name cannot be empty")]
    Empty,
    /// More than [`MAX_LENGTH`] bytes.
    #[error("unit name exceeds maximum length ({MAX_LENGTH})")]
    TooLong,
    /// No suffix.
    #[error("unit name must contain \".\"")]
    NoDot,
    /// An empty suffix.
    #[error("unit name cannot end in \".\"")]
    EndsInDot,
    /// A suffix that is no [`UnitType`].
    #[error("invalid unit type: {}", quoted(.0))]
    UnknownType(String),
    /// An `@` in a name of a type that has no templates.
    #[error("invalid unit type for template: {}", quoted(.0.suffix()))]
    NoTemplateType(UnitType),
    /// A character that systemd does not allow.
    #[error("invalid character {} in unit name", quoted_char(*.0))]
    InvalidCharacter(char),
    /// Nothing before the `@`.
    #[error("unit name cannot start in \"@\"")]
    StartsInAt,
    /// Nothing before the suffix. (The original took it, and systemd then refused it.)
    #[error("unit name must have something before {}", quoted(&format!(".{}", .0.suffix())))]
    NoStem(UnitType),
}

impl UnitType {
    /// All types.
    pub const ALL: [UnitType; 10] = [
        UnitType::Service,
        UnitType::Socket,
        UnitType::Device,
        UnitType::Mount,
        UnitType::Automount,
        UnitType::Timer,
        UnitType::Path,
        UnitType::Target,
        UnitType::Slice,
        UnitType::Swap,
    ];

    /// The suffix of names of this type, without the dot.
    pub fn suffix(self) -> &'static str {
        match self {
            UnitType::Service => "service",
            UnitType::Socket => "socket",
            UnitType::Device => "device",
            UnitType::Mount => "mount",
            UnitType::Automount => "automount",
            UnitType::Timer => "timer",
            UnitType::Path => "path",
            UnitType::Target => "target",
            UnitType::Slice => "slice",
            UnitType::Swap => "swap",
        }
    }

    /// The type with this suffix (without the dot), which is case-sensitive.
    pub fn from_suffix(suffix: &str) -> Option<UnitType> {
        Self::ALL.into_iter().find(|kind| kind.suffix() == suffix)
    }

    /// Whether there are templates of this type, as systemd has it.
    pub fn may_be_template(self) -> bool {
        use UnitType::{Path, Service, Socket, Target, Timer};
        matches!(self, Path | Service | Socket | Target | Timer)
    }
}

impl fmt::Display for UnitType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.suffix())
    }
}

impl UnitName {
    /// Checks a whole name. The first fault in the original's order of checks is the one reported.
    pub fn parse(name: &str) -> Result<Self, NameError> {
        if name.is_empty() {
            return Err(NameError::Empty);
        }
        if name.len() > MAX_LENGTH {
            return Err(NameError::TooLong);
        }
        let (stem, suffix) = name.rsplit_once('.').ok_or(NameError::NoDot)?;
        if suffix.is_empty() {
            return Err(NameError::EndsInDot);
        }
        let kind = UnitType::from_suffix(suffix).ok_or_else(|| NameError::UnknownType(suffix.into()))?;
        if stem.contains('@') && !kind.may_be_template() {
            return Err(NameError::NoTemplateType(kind));
        }
        if let Some(c) = stem.chars().find(|&c| !is_allowed(c)) {
            return Err(NameError::InvalidCharacter(c));
        }
        if stem.starts_with('@') {
            return Err(NameError::StartsInAt);
        }
        if stem.is_empty() {
            return Err(NameError::NoStem(kind));
        }
        Ok(UnitName(name.into()))
    }

    /// The whole name: `%n`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The type, from the suffix.
    pub fn kind(&self) -> UnitType {
        UnitType::from_suffix(self.split().1).expect("parse() took no other suffix")
    }

    /// The name without its suffix (`hello@1` of `hello@1.service`): `%N`.
    pub fn stem(&self) -> &str {
        self.split().0
    }

    /// What stands before the first `@`, or the stem: `%p`.
    pub fn prefix(&self) -> &str {
        self.stem().split_once('@').map_or(self.stem(), |(prefix, _)| prefix)
    }

    /// What stands between the first `@` and the suffix, empty for a template, `None` for a plain
    /// name: `%i`.
    pub fn instance(&self) -> Option<&str> {
        self.stem().split_once('@').map(|(_, instance)| instance)
    }

    /// `hello@.service`
    pub fn is_template(&self) -> bool {
        self.instance() == Some("")
    }

    /// For an instance, the name of its template.
    pub fn template(&self) -> Option<UnitName> {
        let instance = self.instance()?;
        if instance.is_empty() {
            return None;
        }
        let (_, suffix) = self.split();
        Some(UnitName(format!("{}@.{suffix}", self.prefix()).into()))
    }

    fn split(&self) -> (&str, &str) {
        self.0.rsplit_once('.').expect("parse() took no name without a dot")
    }
}

/// systemd's VALID_CHARS with the `@`.
fn is_allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '\\' | '@')
}

/// What the command line makes of an argument: the last path element, with `.service` added where
/// no known suffix stands (golden/04-submit.txt, golden/05-unit-text.txt).
///
/// The result need not be a valid name, but it never contains a `/`.
pub fn from_argument(argument: &str) -> String {
    let base = argument.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let has_type = base.rsplit_once('.').is_some_and(|(_, suffix)| UnitType::from_suffix(suffix).is_some());
    if has_type { base.to_owned() } else { format!("{base}.service") }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_with_the_texts_of_the_original() {
        // golden/04-submit.txt "names", golden/19-api.txt "name …".
        let cases = [
            ("", "unit name cannot be empty"),
            ("a b.service", "invalid character ' ' in unit name"),
            ("ä.service", "invalid character 'ä' in unit name"),
            ("a+b.service", "invalid character '+' in unit name"),
            ("../x.service", "invalid character '/' in unit name"),
            ("a\nb.service", r"invalid character '\n' in unit name"),
            ("@.service", r#"unit name cannot start in "@""#),
            ("@x.service", r#"unit name cannot start in "@""#),
            (".service", r#"unit name must have something before ".service""#),
            ("noext", r#"unit name must contain ".""#),
            ("x.", r#"unit name cannot end in ".""#),
            ("x.bogus", r#"invalid unit type: "bogus""#),
            ("x.SERVICE", r#"invalid unit type: "SERVICE""#),
            ("x.scope", r#"invalid unit type: "scope""#),
            ("x.service/", r#"invalid unit type: "service/""#),
            ("x.ser\"vice", r#"invalid unit type: "ser\"vice""#),
            ("t@1.mount", r#"invalid unit type for template: "mount""#),
            ("t@.slice", r#"invalid unit type for template: "slice""#),
        ];
        for (name, text) in cases {
            assert_eq!(UnitName::parse(name).unwrap_err().to_string(), text, "{name:?}");
        }
        let long = format!("{}.service", "x".repeat(248));
        assert_eq!(long.len(), 256);
        assert_eq!(UnitName::parse(&long).unwrap_err().to_string(), "unit name exceeds maximum length (255)");
        assert!(UnitName::parse(&long[1..]).is_ok());
    }

    #[test]
    fn accepts_what_the_original_accepted() {
        for name in [
            r"a\x2db.service",
            "-dash.service",
            "foo.service.service",
            "foo.mount",
            "foo.timer",
            "foo@@.service",
            "f.target",
            "f.slice",
            "..service",
            "a:b_c.socket",
        ] {
            assert_eq!(UnitName::parse(name).unwrap().as_str(), name);
        }
        for kind in UnitType::ALL {
            let name = UnitName::parse(&format!("x.{kind}")).unwrap();
            assert_eq!(name.kind(), kind);
            assert_eq!(UnitName::parse(&format!("x@1.{kind}")).is_ok(), kind.may_be_template());
        }
    }

    #[test]
    fn splits_names() {
        // name, stem, prefix, instance, template
        let cases = [
            ("foo.service", "foo", "foo", None, None),
            ("foo@.service", "foo@", "foo", Some(""), None),
            ("foo@bar.service", "foo@bar", "foo", Some("bar"), Some("foo@.service")),
            ("foo@bar@baz.service", "foo@bar@baz", "foo", Some("bar@baz"), Some("foo@.service")),
            ("foo.1@2.service", "foo.1@2", "foo.1", Some("2"), Some("foo.1@.service")),
            ("foo@a.b.socket", "foo@a.b", "foo", Some("a.b"), Some("foo@.socket")),
        ];
        for (name, stem, prefix, instance, template) in cases {
            let name = UnitName::parse(name).unwrap();
            assert_eq!(name.stem(), stem);
            assert_eq!(name.prefix(), prefix);
            assert_eq!(name.instance(), instance);
            assert_eq!(name.is_template(), instance == Some(""));
            assert_eq!(name.template().map(|t| t.to_string()).as_deref(), template);
        }
    }

    #[test]
    fn reads_arguments_as_the_original() {
        let cases = [
            ("hello", "hello.service"),
            ("hello.service", "hello.service"),
            ("./x/comments.service", "comments.service"),
            ("/root/u/hello.service", "hello.service"),
            ("foo.bar", "foo.bar.service"),
            ("foo.SERVICE", "foo.SERVICE.service"),
            ("foo.timer", "foo.timer"),
            // The original did not know these three suffixes.
            ("foo.target", "foo.target"),
            ("foo.slice", "foo.slice"),
            ("foo.swap", "foo.swap"),
            ("hello@1", "hello@1.service"),
            ("sub/", "sub.service"),
            (".", "..service"),
            ("", ".service"),
            ("/", ".service"),
            ("//", ".service"),
        ];
        for (argument, want) in cases {
            assert_eq!(from_argument(argument), want, "{argument:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>()) {
            if let Ok(name) = UnitName::parse(&text) {
                let _ = (name.kind(), name.prefix(), name.template());
            }
            prop_assert!(!from_argument(&text).contains('/'));
        }

        #[test]
        fn parts_make_the_name(
            prefix in r"[a-zA-Z0-9:_.\\-]{1,40}",
            instance in proptest::option::of(r"[a-zA-Z0-9:_.\\@-]{0,40}"),
            kind in prop::sample::select(&[
                UnitType::Service, UnitType::Socket, UnitType::Timer, UnitType::Path, UnitType::Target,
            ]),
        ) {
            let stem = match &instance {
                Some(instance) => format!("{prefix}@{instance}"),
                None => prefix.clone(),
            };
            let text = format!("{stem}.{kind}");
            let name = UnitName::parse(&text).unwrap();
            prop_assert_eq!(name.as_str(), &text);
            prop_assert_eq!(name.kind(), kind);
            prop_assert_eq!(name.stem(), stem);
            prop_assert_eq!(name.prefix(), prefix);
            prop_assert_eq!(name.instance(), instance.as_deref());
            // An argument that is a name stands for itself, in whatever directory.
            prop_assert_eq!(from_argument(&format!("../x/{text}")), text);
            if let Some(template) = name.template() {
                prop_assert!(template.is_template());
                prop_assert_eq!(UnitName::parse(template.as_str()).unwrap(), template);
            }
        }
    }
}
