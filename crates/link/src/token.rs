//! Join tokens: the one word by which a machine is let into a cluster, and what a server keeps of it.
//!
//! The text of tokens is [`fleet_trust::token`]'s. Nothing here prints a secret: not errors, not `Debug`, only [`Token::to_text`].

use crate::ca::{CaError, Fingerprint};
use fleet_trust::token::{self as text, Kind, SecretHash};
use std::time::{Duration, SystemTime};
use zeroize::Zeroizing;

pub use fleet_trust::token::{TokenId, TokenSecret, TokenTextError};

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

impl Token {
    /// A new token for the cluster with that CA, and what the server keeps of it.
    pub fn create(
        root: Fingerprint,
        terms: &Terms,
        now: SystemTime,
    ) -> Result<(Token, TokenRecord), CaError> {
        let made = text::Token::generate(root).map_err(|error| CaError::Failed(error.to_string()))?;
        let text::Token { id, secret, root } = made;
        let token = Token { id, secret, root };
        let record = TokenRecord {
            format: 1,
            id: token.id,
            secret_sha256: token.secret.hash().to_string(),
            created: seconds(now),
            expires: seconds(now).saturating_add(terms.ttl.as_secs()),
            uses_left: terms.uses,
            revoked: false,
        };
        Ok((token, record))
    }

    /// Reads a token; blanks around it do not count.
    pub fn parse(text: &str) -> Result<Token, TokenTextError> {
        text::Token::parse(Kind::Join, text).map(|text::Token { id, secret, root }| Token {
            id,
            secret,
            root,
        })
    }

    /// The token as text: one word, `fleet1-` and 88 letters, digits, `-` and `_`.
    pub fn to_text(&self) -> Zeroizing<String> {
        let Token { id, secret, root } = self.clone();
        text::Token { id, secret, root }.to_text(Kind::Join)
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
        if !SecretHash::parse(&self.secret_sha256).is_some_and(|kept| kept.is_of(secret)) {
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

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + NOW
    }

    fn token(uses: Option<u32>) -> (Token, TokenRecord) {
        let terms = Terms { ttl: Duration::from_secs(3600), uses };
        Token::create(Fingerprint([7; 32]), &terms, now()).unwrap()
    }

    #[test]
    fn nothing_prints_the_secret() {
        let (token, record) = token(None);
        let secret = format!("{:?}", token.secret.to_bytes());
        let printed = format!("{token:?} {record:?} {}", serde_json::to_string(&record).unwrap());
        assert!(!printed.contains(&secret) && !printed.contains(&token.to_text()[15..40]), "{printed}");
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
}
