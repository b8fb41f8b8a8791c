//! Join tokens: the one word by which a machine is let into a cluster.
//!
//! A token holds an ID, by which it is listed and revoked; a secret, which the server keeps only as a hash; and the
//! fingerprint of the cluster's CA, by which the joining machine knows that it talks to the right cluster *before*
//! it sends the secret. As text it is `fleet1-` and base64url, with a checksum, so that a token cut off while copying
//! is told from a wrong one. Nothing here prints a secret: not errors, not `Debug`, only [`Token::to_text`].

use crate::ca::{CaError, Fingerprint, random, sha256};
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use std::time::{Duration, SystemTime};
use std::{fmt, str::FromStr};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

/// What every token begins with.
const PREFIX: &str = "fleet1-";
const ID: usize = 6;
const SECRET: usize = 24;
const CHECK: usize = 4;
const LENGTH: usize = ID + SECRET + 32 + CHECK;

/// The public name of a token. In text, also for serde: 12 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId([u8; ID]);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TokenId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = HEXLOWER.decode(text.as_bytes()).ok();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(TokenId)
            .ok_or_else(|| "the ID of a join token is 12 lower-case hexadecimal digits".to_owned())
    }
}

impl serde::Serialize for TokenId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for TokenId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The secret of a token. Wiped from memory when dropped.
#[derive(Clone)]
pub struct TokenSecret([u8; SECRET]);

impl TokenSecret {
    /// From the bytes of a message; `None` if they are not of the right number.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(TokenSecret)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    fn hash(&self) -> [u8; 32] {
        sha256(&self.0)
    }
}

impl fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl Drop for TokenSecret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A join token, as its user has it.
#[derive(Clone, Debug)]
pub struct Token {
    /// By which it is listed and revoked.
    pub id: TokenId,
    /// What is to be proved.
    pub secret: TokenSecret,
    /// The cluster that it lets into.
    pub root: Fingerprint,
}

/// Why a text is no join token. None of them quotes the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenTextError {
    /// It begins with something else.
    #[error("not a join token: those begin with \"{PREFIX}\" (fleetctl join-token create makes one)")]
    Prefix,
    /// It is of a later format.
    #[error("this join token was made by a later version of fleet than this one")]
    Version,
    /// A character that no token has.
    #[error(
        "not a join token: its character {0} is none that tokens have; was something else copied with it?"
    )]
    Character(usize),
    /// Cut off, or too long.
    #[error("not a join token: it has {0} characters instead of {expected}; was it copied whole?", expected = PREFIX.len() + LENGTH * 4 / 3)]
    Length(usize),
    /// A character is another.
    #[error("the join token has a mistake in it: its checksum is wrong; copy it again")]
    Checksum,
}

impl Token {
    /// A new token for the cluster with that CA, and what the server keeps of it.
    pub fn create(
        root: Fingerprint,
        terms: &Terms,
        now: SystemTime,
    ) -> Result<(Token, TokenRecord), CaError> {
        let token = Token { id: TokenId(random()?), secret: TokenSecret(random()?), root };
        let record = TokenRecord {
            format: 1,
            id: token.id,
            secret_sha256: HEXLOWER.encode(&token.secret.hash()),
            created: seconds(now),
            expires: seconds(now).saturating_add(terms.ttl.as_secs()),
            uses_left: terms.uses,
            revoked: false,
        };
        Ok((token, record))
    }

    /// Reads a token; blanks around it do not count.
    pub fn parse(text: &str) -> Result<Token, TokenTextError> {
        let text = text.trim();
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            let later = text
                .strip_prefix("fleet")
                .and_then(|rest| rest.split_once('-'))
                .is_some_and(|(number, _)| number.parse::<u32>().is_ok_and(|number| number > 1));
            return Err(if later { TokenTextError::Version } else { TokenTextError::Prefix });
        };
        let strange = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        if let Some((before, _)) = encoded.split_once(strange) {
            return Err(TokenTextError::Character(PREFIX.len() + before.len() + 1));
        }
        let length = TokenTextError::Length(text.len());
        if encoded.len() != LENGTH * 4 / 3 {
            return Err(length);
        }
        let bytes = Zeroizing::new(BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| length)?);
        let (content, check) = bytes.split_at(LENGTH - CHECK);
        if sha256(content)[..CHECK] != *check {
            return Err(TokenTextError::Checksum);
        }
        let mut token =
            Token { id: TokenId([0; ID]), secret: TokenSecret([0; SECRET]), root: Fingerprint([0; 32]) };
        token.id.0.copy_from_slice(&content[..ID]);
        token.secret.0.copy_from_slice(&content[ID..ID + SECRET]);
        token.root.0.copy_from_slice(&content[ID + SECRET..]);
        Ok(token)
    }

    /// The token as text: one word, `fleet1-` and 88 letters, digits, `-` and `_`.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH));
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(&self.root.0);
        let check = sha256(&bytes);
        bytes.extend_from_slice(&check[..CHECK]);
        let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + LENGTH * 4 / 3));
        text.push_str(PREFIX);
        BASE64URL_NOPAD.encode_append(&bytes, &mut text);
        text
    }
}

/// What a token is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How long it is valid.
    pub ttl: Duration,
    /// How many machines may join with it; `None`: any number.
    pub uses: Option<u32>,
}

/// What a server keeps of a token: enough to check it, not enough to use it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TokenRecord {
    /// The number of this format, 1.
    pub format: u32,
    /// The token's public name.
    pub id: TokenId,
    /// The SHA-256 of its secret, hexadecimal. The secret is random and long, so no slow hash is needed.
    pub secret_sha256: String,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// From when it is not valid any more, seconds since 1970.
    pub expires: u64,
    /// How many more machines may join with it; `None`: any number.
    pub uses_left: Option<u32>,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// Why a token lets nobody in (any more).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// There is no such token, or the secret is another. Told apart by nobody, since that would tell which IDs there are.
    #[error("the join token is wrong: this cluster knows no such token")]
    Wrong,
    /// Its time is over.
    #[error("the join token has expired; make a new one with fleetctl join-token create")]
    Expired,
    /// As many machines as it was made for have joined.
    #[error("the join token is used up; make a new one with fleetctl join-token create")]
    UsedUp,
    /// Somebody took it back.
    #[error("the join token was revoked")]
    Revoked,
}

impl TokenRecord {
    /// Whether the secret is this token's and the token still good. Only who has the secret learns what else is
    /// wrong with it; comparing takes the same time wherever it differs.
    pub fn check(&self, secret: &TokenSecret, now: SystemTime) -> Result<(), TokenError> {
        let kept = HEXLOWER.decode(self.secret_sha256.as_bytes()).unwrap_or_default();
        if !bool::from(secret.hash().as_slice().ct_eq(&kept)) {
            return Err(TokenError::Wrong);
        }
        if self.revoked {
            return Err(TokenError::Revoked);
        }
        if self.is_over(now) {
            return Err(TokenError::Expired);
        }
        if self.uses_left == Some(0) {
            return Err(TokenError::UsedUp);
        }
        Ok(())
    }

    /// Whether its time is over.
    pub fn is_over(&self, now: SystemTime) -> bool {
        seconds(now) >= self.expires
    }

    /// The record after one more machine has joined. To be written in the same transaction as the machine.
    pub fn used(&self) -> TokenRecord {
        TokenRecord { uses_left: self.uses_left.map(|left| left.saturating_sub(1)), ..self.clone() }
    }
}

/// Seconds since 1970; 0 before.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + NOW
    }

    fn token(uses: Option<u32>) -> (Token, TokenRecord) {
        let terms = Terms { ttl: Duration::from_secs(3600), uses };
        Token::create(Fingerprint([7; 32]), &terms, now()).unwrap()
    }

    #[test]
    fn a_token_is_one_word_that_reads_back() {
        let (token, _) = token(None);
        let text = token.to_text();
        assert!(
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'),
            "one word to copy"
        );
        let read = Token::parse(&format!("  {}\n", *text)).unwrap();
        assert_eq!((read.id, read.secret.0, read.root), (token.id, token.secret.0, token.root));
        assert_eq!(token.id.to_string().parse(), Ok(token.id));
    }

    #[test]
    fn what_is_wrong_with_a_text_is_said_without_the_text() {
        let (token, _) = token(None);
        let text = token.to_text();
        let says = |text: &str| Token::parse(text).unwrap_err();
        assert_eq!(says(""), TokenTextError::Prefix);
        assert_eq!(says("K10d3adb33f"), TokenTextError::Prefix);
        assert_eq!(says(&text.replace("fleet1-", "fleet2-")), TokenTextError::Version);
        assert_eq!(says(&text[..90]), TokenTextError::Length(90));
        assert_eq!(says(&format!("{} x", *text)), TokenTextError::Character(96));
        assert_eq!(says(&format!("{}ä", &text[..94])), TokenTextError::Character(95));
        let other = if text.as_bytes()[20] == b'A' { "B" } else { "A" };
        let mistyped = format!("{}{other}{}", &text[..20], &text[21..]);
        assert_eq!(says(&mistyped), TokenTextError::Checksum);
        for error in [says(&mistyped), says(&text[..90])] {
            assert!(!error.to_string().contains(&text[10..20]));
        }
    }

    #[test]
    fn nothing_prints_the_secret() {
        let (token, record) = token(None);
        let secret = HEXLOWER.encode(&token.secret.0);
        let printed = format!("{token:?} {record:?} {}", serde_json::to_string(&record).unwrap());
        assert!(!printed.contains(&secret) && !printed.contains(&token.to_text()[15..40]), "{printed}");
        assert!(!printed.contains(&format!("{:?}", token.secret.0)), "{printed}");
    }

    #[test]
    fn a_token_is_good_until_it_expires_is_used_up_or_revoked() {
        let (token, record) = token(Some(2));
        let second = Duration::from_secs(1);
        let end = now() + Duration::from_secs(3600);
        assert_eq!(record.check(&token.secret, now()), Ok(()));
        assert_eq!(record.check(&token.secret, end - second), Ok(()));
        assert_eq!(record.check(&token.secret, end), Err(TokenError::Expired));
        assert_eq!(record.used().check(&token.secret, now()), Ok(()));
        assert_eq!(record.used().used().check(&token.secret, now()), Err(TokenError::UsedUp));
        assert_eq!(record.used().used().used().uses_left, Some(0));
        let revoked = TokenRecord { revoked: true, ..record.clone() };
        assert_eq!(revoked.check(&token.secret, now()), Err(TokenError::Revoked));
        // A wrong secret learns nothing else.
        let (other, _) = super::tests::token(None);
        assert_eq!(revoked.check(&other.secret, end), Err(TokenError::Wrong));
        let damaged = TokenRecord { secret_sha256: "none".to_owned(), ..record };
        assert_eq!(damaged.check(&token.secret, now()), Err(TokenError::Wrong));
    }

    #[test]
    fn a_record_survives_being_written() {
        let (_, record) = token(Some(3));
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<TokenRecord>(&text).unwrap(), record);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(fleet1-)?\\PC{0,100}") {
            let _ = Token::parse(&text);
        }

        #[test]
        fn every_single_mistake_is_found(at in 7usize..95, to in "[A-Za-z0-9_-]") {
            let (token, _) = token(None);
            let text = token.to_text();
            let changed = format!("{}{to}{}", &text[..at], &text[at + 1..]);
            prop_assume!(changed != *text);
            prop_assert_eq!(Token::parse(&changed).unwrap_err(), TokenTextError::Checksum);
        }
    }
}
