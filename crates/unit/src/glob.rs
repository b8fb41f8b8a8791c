//! Patterns as Go's `path.Match` reads them.

/// A pattern. A malformed one matches nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Glob(String);

impl Glob {
    /// Takes any text; [`is_valid`](Self::is_valid) tells whether it is well-formed.
    pub fn new(pattern: impl Into<String>) -> Self {
        Glob(pattern.into())
    }
    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
    /// Whether the pattern is well-formed.
    pub fn is_valid(&self) -> bool {
        todo!()
    }
    /// Whether the whole text matches.
    pub fn matches(&self, _text: &str) -> bool {
        todo!()
    }
}
