//! Tokens, of machines and of users.

use super::Seen;
use fleet_trust::token::{Kind, Token};

/// No panic, no error that repeats the text, and a token that is read is written as it was.
pub(super) fn token(bytes: &[u8]) -> Seen {
    let Ok(text) = std::str::from_utf8(bytes) else { return Seen::of("no text") };
    let mut seen = Vec::new();
    for kind in [Kind::Join, Kind::User] {
        match Token::parse(kind, text) {
            Ok(token) => {
                assert_eq!(token.to_text(kind).as_str(), text.trim());
                assert!(!format!("{token:?}").contains(text.trim()), "a secret is shown");
                seen.push(0);
            }
            Err(error) => {
                let word = text.trim().rsplit('-').next().unwrap_or_default();
                // Who gives the message's own words has given no secret away.
                let is_secret = word.len() >= 16 && !word.contains(char::is_whitespace);
                assert!(!is_secret || !error.to_string().contains(word), "a secret is shown");
                seen.push(Seen::message(&error.to_string()).0);
            }
        }
    }
    Seen::of(seen)
}
