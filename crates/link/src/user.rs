//! The names of users of the API, as certificates carry them.

use std::{fmt, str::FromStr};

/// The longest name, bytes.
const LONGEST: usize = 64;

/// The name of a user: 1 to 64 of `A-Z a-z 0-9 . _ -`, the first a letter or digit. So it can stand in a URL, in a certificate and in a log line as it is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserName(String);

/// A text that is no name of a user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of a user: 1 to 64 letters, digits, '.', '_' and '-' are, beginning with a letter or digit"
)]
pub struct UserNameError(String);

impl UserName {
    /// Reads a name.
    pub fn parse(text: &str) -> Result<Self, UserNameError> {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if first && text.len() <= LONGEST && text.bytes().all(good) {
            Ok(UserName(text.to_owned()))
        } else {
            Err(UserNameError(text.chars().take(LONGEST).collect()))
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for UserName {
    type Err = UserNameError;
    fn from_str(text: &str) -> Result<Self, UserNameError> {
        Self::parse(text)
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["ann", "A", "ci-deploy.2_x", "0", &"a".repeat(64)] {
            assert_eq!(UserName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", ".ann", "-x", "a b", "a/b", "a%2f", "ä", "a\n", &"a".repeat(65)] {
            assert!(UserName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
