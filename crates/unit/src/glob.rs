//! Patterns as Go's `path.Match` reads them, which is what the original used for `Conflicts=` and
//! `Replaces=`.
//!
//! `*` stands for any number of characters but `/`, `?` for one but `/`, `[a-z]` and `[^a-z]` for
//! one in or not in the set, and `\` takes the next character for itself. Matching takes time in
//! proportion to the pattern times the text at worst: like Go's, it never goes back to an earlier
//! `*` once what follows it has been found.

/// A pattern. A malformed one matches nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Glob(String);

/// A pattern that breaks the rules: a set without end or that is empty, a `\` at the end.
struct Malformed;

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
        let mut rest = self.0.as_str();
        while !rest.is_empty() {
            let (_, chunk, after) = next_chunk(rest);
            // Against the empty text a chunk fails at once, but is still read to its end.
            if match_chunk(chunk, "").is_err() {
                return false;
            }
            rest = after;
        }
        true
    }

    /// The only text that the pattern can match, when it has no special character at all.
    pub fn literal(&self) -> Option<&str> {
        (!self.0.contains(['*', '?', '[', '\\'])).then_some(&self.0)
    }

    /// Whether the whole text matches.
    pub fn matches(&self, text: &str) -> bool {
        let (mut pattern, mut text) = (self.0.as_str(), text);
        while !pattern.is_empty() {
            let (star, chunk, after) = next_chunk(pattern);
            pattern = after;
            if star && chunk.is_empty() {
                return !text.contains('/');
            }
            let last = pattern.is_empty();
            let mut starts = std::iter::successors(Some(text), |rest| {
                let mut chars = rest.chars();
                // A `*` may skip anything but a `/`; without one the chunk must stand right here.
                chars.next().filter(|&c| star && c != '/').map(|_| chars.as_str())
            });
            let found = starts.find_map(|start| match match_chunk(chunk, start) {
                Err(Malformed) => Some(None),
                Ok(Some(rest)) if !last || rest.is_empty() => Some(Some(rest)),
                Ok(_) => None,
            });
            let Some(Some(rest)) = found else { return false };
            text = rest;
        }
        text.is_empty()
    }
}

/// Takes leading `*`s off, then all up to the next `*` that is not in a set:
/// (was there a `*`, the chunk, the rest).
fn next_chunk(pattern: &str) -> (bool, &str, &str) {
    let chunk = pattern.trim_start_matches('*');
    let star = chunk.len() < pattern.len();
    let mut in_set = false;
    let mut bytes = chunk.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'[' => in_set = true,
            b']' => in_set = false,
            b'*' if !in_set => return (star, &chunk[..at], &chunk[at..]),
            _ => {}
        }
    }
    (star, chunk, "")
}

/// Matches a chunk (no `*` outside sets) at the start of a text: what remains of the text, or `None`
/// when it does not match. The chunk is read to its end either way, to find out what is malformed.
fn match_chunk<'t>(chunk: &str, text: &'t str) -> Result<Option<&'t str>, Malformed> {
    let mut pattern = chunk.chars();
    let mut text = text.chars();
    let mut matched = true;
    while let Some(p) = pattern.next() {
        // Once it failed, nothing more is taken from the text.
        let c = if matched { text.next() } else { None };
        let fits = match p {
            '[' => {
                let inside = match_set(&mut pattern, c)?;
                c.is_some() && inside
            }
            '?' => c.is_some_and(|c| c != '/'),
            '\\' => c == Some(pattern.next().ok_or(Malformed)?),
            p => c == Some(p),
        };
        matched = matched && fits;
    }
    Ok(matched.then_some(text.as_str()))
}

/// Reads a set up to and with its `]`; whether the character is in it (or not, for `[^`).
fn match_set(pattern: &mut std::str::Chars<'_>, c: Option<char>) -> Result<bool, Malformed> {
    let negated = pattern.as_str().starts_with('^');
    if negated {
        pattern.next();
    }
    let mut found = false;
    let mut first = true;
    loop {
        if !first && pattern.as_str().starts_with(']') {
            pattern.next();
            return Ok(found != negated);
        }
        first = false;
        let low = set_member(pattern)?;
        let mut high = low;
        if pattern.as_str().starts_with('-') {
            pattern.next();
            high = set_member(pattern)?;
        }
        found |= c.is_some_and(|c| low <= c && c <= high);
    }
}

/// One character of a set, which may be escaped, and after which the pattern must go on.
fn set_member(pattern: &mut std::str::Chars<'_>) -> Result<char, Malformed> {
    let member = match pattern.next() {
        None | Some('-' | ']') => return Err(Malformed),
        Some('\\') => pattern.next().ok_or(Malformed)?,
        Some(c) => c,
    };
    if pattern.as_str().is_empty() { Err(Malformed) } else { Ok(member) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The table of Go's own test of `path.Match`; `None` is a malformed pattern.
    const GO: &[(&str, &str, Option<bool>)] = &[
        ("abc", "abc", Some(true)),
        ("*", "abc", Some(true)),
        ("*c", "abc", Some(true)),
        ("a*", "a", Some(true)),
        ("a*", "abc", Some(true)),
        ("a*", "ab/c", Some(false)),
        ("a*/b", "abc/b", Some(true)),
        ("a*/b", "a/c/b", Some(false)),
        ("a*b*c*d*e*/f", "axbxcxdxe/f", Some(true)),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/f", Some(true)),
        ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", Some(false)),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", Some(false)),
        ("a*b?c*x", "abxbbxdbxebxczzx", Some(true)),
        ("a*b?c*x", "abxbbxdbxebxczzy", Some(false)),
        ("ab[c]", "abc", Some(true)),
        ("ab[b-d]", "abc", Some(true)),
        ("ab[e-g]", "abc", Some(false)),
        ("ab[^c]", "abc", Some(false)),
        ("ab[^b-d]", "abc", Some(false)),
        ("ab[^e-g]", "abc", Some(true)),
        ("a\\*b", "a*b", Some(true)),
        ("a\\*b", "ab", Some(false)),
        ("a?b", "a☺b", Some(true)),
        ("a[^a]b", "a☺b", Some(true)),
        ("a???b", "a☺b", Some(false)),
        ("a[^a][^a][^a]b", "a☺b", Some(false)),
        ("[a-ζ]*", "α", Some(true)),
        ("*[a-ζ]", "A", Some(false)),
        ("a?b", "a/b", Some(false)),
        ("a*b", "a/b", Some(false)),
        ("[\\]a]", "]", Some(true)),
        ("[\\-]", "-", Some(true)),
        ("[x\\-]", "x", Some(true)),
        ("[x\\-]", "-", Some(true)),
        ("[x\\-]", "z", Some(false)),
        ("[\\-x]", "x", Some(true)),
        ("[\\-x]", "-", Some(true)),
        ("[\\-x]", "a", Some(false)),
        ("[]a]", "]", None),
        ("[-]", "-", None),
        ("[x-]", "x", None),
        ("[x-]", "-", None),
        ("[x-]", "z", None),
        ("[-x]", "x", None),
        ("[-x]", "-", None),
        ("[-x]", "a", None),
        ("\\", "a", None),
        ("[a-b-c]", "a", None),
        ("[", "a", None),
        ("[^", "a", None),
        ("[^bc", "a", None),
        ("a[", "a", None),
        ("a[", "ab", None),
        ("a[", "x", None),
        ("a/b[", "x", None),
        ("*x", "xxx", Some(true)),
    ];

    #[test]
    fn agrees_with_go() {
        for &(pattern, text, want) in GO {
            let glob = Glob::new(pattern);
            assert_eq!(glob.is_valid(), want.is_some(), "{pattern:?}");
            assert_eq!(glob.matches(text), want.unwrap_or(false), "{pattern:?} on {text:?}");
        }
        assert!(Glob::new("").matches("") && !Glob::new("").matches("a"));
        // A set matches a `/`, and a `*` that found its place once does not look for another.
        assert!(Glob::new("a[^x]b").matches("a/b"));
        assert!(!Glob::new("*[^x]a*z").matches("qa/az"));
    }

    #[test]
    fn stays_fast_on_hostile_patterns() {
        let text = "a".repeat(2000);
        // Takes about 2000 × 2000 steps; with backtracking it would not end.
        assert!(!Glob::new("*a".repeat(500) + "*b").matches(&text));
        assert!(Glob::new("*a".repeat(500) + "*").matches(&text));
    }

    /// The obvious, exponential matcher, for patterns and texts without `/`.
    fn reference(pattern: &[char], text: &[char]) -> bool {
        match pattern {
            [] => text.is_empty(),
            ['*', rest @ ..] => (0..=text.len()).any(|skip| reference(rest, &text[skip..])),
            ['?', rest @ ..] => !text.is_empty() && reference(rest, &text[1..]),
            [p, rest @ ..] => text.first() == Some(p) && reference(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_backtracking(pattern in "[ab*?]{0,8}", text in "[ab]{0,10}") {
            let want = reference(
                &pattern.chars().collect::<Vec<_>>(),
                &text.chars().collect::<Vec<_>>(),
            );
            prop_assert_eq!(Glob::new(pattern).matches(&text), want);
        }

        #[test]
        fn never_panics_and_malformed_matches_nothing(
            pattern in r"[ab/ä☃*?\[\]\\^-]{0,12}", text in "[ab/ä☃]{0,8}",
        ) {
            let glob = Glob::new(pattern);
            let matched = glob.matches(&text);
            prop_assert!(glob.is_valid() || !matched);
        }

        #[test]
        fn escaped_text_matches_itself(text in any::<String>()) {
            let escaped: String = text.chars().flat_map(|c| ['\\', c]).collect();
            prop_assert!(Glob::new(escaped).matches(&text));
            let plain = Glob::new(text.as_str());
            if let Some(literal) = plain.literal() {
                prop_assert_eq!(literal, &text);
                prop_assert!(plain.is_valid() && plain.matches(&text));
            }
        }
    }
}
