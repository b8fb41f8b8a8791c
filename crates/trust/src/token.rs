//! Tokens: secrets in one word, which carry the fingerprint of the cluster's CA, so that whoever uses one knows that it talks
//! to the right cluster *before* it sends the secret.
//!
//! There are two kinds: join tokens let a machine into a cluster, user tokens are what users of the API show. As text a token is
//! its kind's prefix and base64url, with a checksum, so that one that was cut off while copying is told from a wrong one. Nothing here
//! prints a secret: not errors, not `Debug`, only [`Token::to_text`].

use crate::{Fingerprint, NoRandomness, random, sha256};
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use std::{fmt, str::FromStr};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

const ID: usize = 6;
const SECRET: usize = 24;
const CHECK: usize = 4;
const LENGTH: usize = ID + SECRET + 32 + CHECK;
const ENCODED: usize = LENGTH * 4 / 3;

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Lets machines join.
    Join,
    /// Shows who a user of the API is.
    User,
}

impl Kind {
    /// What its tokens begin with, before the number of their format and a dash.
    fn stem(self) -> &'static str {
        match self {
            Kind::Join => "fleet",
            Kind::User => "fleetuser",
        }
    }

    fn prefix(self) -> String {
        format!("{}1-", self.stem())
    }

    fn made_by(self) -> &'static str {
        match self {
            Kind::Join => "fleetctl join-token create",
            Kind::User => "fleetctl user create",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Join => "join token",
            Kind::User => "user token",
        })
    }
}

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
            .ok_or_else(|| "the ID of a token is 12 lower-case hexadecimal digits".to_owned())
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

    /// For a message to a server that is known to be of the token's cluster.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// What a server keeps of it: its SHA-256. The secret is random and long, so no slow hash is needed.
    pub fn hash(&self) -> SecretHash {
        SecretHash(sha256(&self.0))
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

/// The hash of a secret. In text: 64 lower-case hexadecimal digits. There is no `==`: [`is_of`](Self::is_of) compares.
#[derive(Clone, Copy, Debug)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Reads a stored hash; `None` if the text is none.
    pub fn parse(text: &str) -> Option<Self> {
        HEXLOWER.decode(text.as_bytes()).ok()?.try_into().ok().map(SecretHash)
    }

    /// Whether it is this secret's. Takes the same time wherever it differs.
    pub fn is_of(&self, secret: &TokenSecret) -> bool {
        secret.hash().0.ct_eq(&self.0).into()
    }
}

impl fmt::Display for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

/// A token, as its owner has it.
#[derive(Clone, Debug)]
pub struct Token {
    /// By which the server finds it.
    pub id: TokenId,
    /// What is to be proved.
    pub secret: TokenSecret,
    /// The CA of the cluster that it is for.
    pub root: Fingerprint,
}

/// Why a text is no token. None of them quotes the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenTextError {
    /// It begins with something else.
    #[error("not a {0}: those begin with \"{prefix}\" ({made_by} makes one)", prefix = .0.prefix(), made_by = .0.made_by())]
    Prefix(Kind),
    /// It is of a later format.
    #[error("this {0} was made by a later version of fleet than this one")]
    Version(Kind),
    /// A character that no token has.
    #[error("not a {0}: its character {1} is none that tokens have; was something else copied with it?")]
    Character(Kind, usize),
    /// Cut off, or too long.
    #[error("not a {0}: it has {1} characters instead of {expected}; was it copied whole?", expected = .0.prefix().len() + ENCODED)]
    Length(Kind, usize),
    /// A character is another.
    #[error("the {0} has a mistake in it: its checksum is wrong; copy it again")]
    Checksum(Kind),
}

impl Token {
    /// A new token for the cluster with that CA.
    pub fn generate(root: Fingerprint) -> Result<Token, NoRandomness> {
        Ok(Token { id: TokenId(random()?), secret: TokenSecret(random()?), root })
    }

    /// Reads a token; blanks around it do not count.
    pub fn parse(kind: Kind, text: &str) -> Result<Token, TokenTextError> {
        let text = text.trim();
        let prefix = kind.prefix();
        let Some(encoded) = text.strip_prefix(prefix.as_str()) else {
            let later = text
                .strip_prefix(kind.stem())
                .and_then(|rest| rest.split_once('-'))
                .is_some_and(|(number, _)| number.parse::<u32>().is_ok_and(|number| number > 1));
            return Err(if later { TokenTextError::Version(kind) } else { TokenTextError::Prefix(kind) });
        };
        let strange = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        if let Some((before, _)) = encoded.split_once(strange) {
            return Err(TokenTextError::Character(kind, prefix.len() + before.len() + 1));
        }
        let length = TokenTextError::Length(kind, text.len());
        if encoded.len() != ENCODED {
            return Err(length);
        }
        let bytes = Zeroizing::new(BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| length)?);
        let (content, check) = bytes.split_at(LENGTH - CHECK);
        if sha256(content)[..CHECK] != *check {
            return Err(TokenTextError::Checksum(kind));
        }
        let mut token =
            Token { id: TokenId([0; ID]), secret: TokenSecret([0; SECRET]), root: Fingerprint([0; 32]) };
        token.id.0.copy_from_slice(&content[..ID]);
        token.secret.0.copy_from_slice(&content[ID..ID + SECRET]);
        token.root.0.copy_from_slice(&content[ID + SECRET..]);
        Ok(token)
    }

    /// The token as text: one word, its kind's prefix and 88 letters, digits, `-` and `_`.
    pub fn to_text(&self, kind: Kind) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(LENGTH));
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(&self.root.0);
        let check = sha256(&bytes);
        bytes.extend_from_slice(&check[..CHECK]);
        let prefix = kind.prefix();
        let mut text = Zeroizing::new(String::with_capacity(prefix.len() + ENCODED));
        text.push_str(&prefix);
        BASE64URL_NOPAD.encode_append(&bytes, &mut text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        Token::generate(Fingerprint([7; 32])).unwrap()
    }

    #[test]
    fn a_token_is_one_word_that_reads_back() {
        for kind in [Kind::Join, Kind::User] {
            let token = token();
            let text = token.to_text(kind);
            assert!(
                text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'),
                "one word to copy"
            );
            let read = Token::parse(kind, &format!("  {}\n", *text)).unwrap();
            assert_eq!((read.id, read.secret.0, read.root), (token.id, token.secret.0, token.root));
            assert_eq!(token.id.to_string().parse(), Ok(token.id));
        }
    }

    #[test]
    fn one_kind_is_no_other() {
        let token = token();
        let (join, user) = (token.to_text(Kind::Join), token.to_text(Kind::User));
        let error = Token::parse(Kind::User, &join).unwrap_err();
        assert_eq!(
            error.to_string(),
            "not a user token: those begin with \"fleetuser1-\" (fleetctl user create makes one)"
        );
        assert_eq!(Token::parse(Kind::Join, &user).unwrap_err(), TokenTextError::Prefix(Kind::Join));
    }

    #[test]
    fn what_is_wrong_with_a_text_is_said_without_the_text() {
        let token = token();
        let text = token.to_text(Kind::Join);
        let says = |text: &str| Token::parse(Kind::Join, text).unwrap_err();
        let kind = Kind::Join;
        assert_eq!(says(""), TokenTextError::Prefix(kind));
        assert_eq!(says("K10d3adb33f"), TokenTextError::Prefix(kind));
        assert_eq!(says(&text.replace("fleet1-", "fleet2-")), TokenTextError::Version(kind));
        assert_eq!(says(&text[..90]), TokenTextError::Length(kind, 90));
        assert_eq!(says(&format!("{} x", *text)), TokenTextError::Character(kind, 96));
        assert_eq!(says(&format!("{}ä", &text[..94])), TokenTextError::Character(kind, 95));
        let other = if text.as_bytes()[20] == b'A' { "B" } else { "A" };
        let mistyped = format!("{}{other}{}", &text[..20], &text[21..]);
        assert_eq!(says(&mistyped), TokenTextError::Checksum(kind));
        for error in [says(&mistyped), says(&text[..90])] {
            assert!(!error.to_string().contains(&text[10..20]));
        }
    }

    #[test]
    fn nothing_prints_the_secret() {
        let token = token();
        let secret = HEXLOWER.encode(&token.secret.0);
        let printed = format!("{token:?}");
        assert!(!printed.contains(&secret) && !printed.contains(&token.to_text(Kind::Join)[15..40]));
        assert!(!printed.contains(&format!("{:?}", token.secret.0)), "{printed}");
    }

    #[test]
    fn a_hash_is_of_one_secret() {
        let (one, other) = (token(), token());
        let hash = SecretHash::parse(&one.secret.hash().to_string()).unwrap();
        assert!(hash.is_of(&one.secret) && !hash.is_of(&other.secret));
        assert!(SecretHash::parse("none").is_none());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(fleet1-|fleetuser1-)?\\PC{0,100}") {
            let _ = Token::parse(Kind::Join, &text);
            let _ = Token::parse(Kind::User, &text);
        }

        #[test]
        fn every_single_mistake_is_found(at in 7usize..95, to in "[A-Za-z0-9_-]") {
            let token = token();
            let text = token.to_text(Kind::Join);
            let changed = format!("{}{to}{}", &text[..at], &text[at + 1..]);
            prop_assume!(changed != *text);
            prop_assert_eq!(Token::parse(Kind::Join, &changed).unwrap_err(), TokenTextError::Checksum(Kind::Join));
        }
    }
}
