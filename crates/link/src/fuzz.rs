//! For fuzzing: messages of sessions as any bytes.

use crate::wire::generated as pb;
use crate::wire::{Down, Up};
use prost::Message;

/// A message: from an agent if the first byte is even, from a server if it is odd. What can be read is written and read again as the
/// same. Returns what came of it, in words.
///
/// # Panics
/// When that is not so.
pub fn message(bytes: &[u8]) -> String {
    match bytes.split_first() {
        Some((first, bytes)) if first % 2 == 0 => up(bytes),
        Some((_, bytes)) => down(bytes),
        None => "nothing".to_owned(),
    }
}

fn up(bytes: &[u8]) -> String {
    let message = match pb::FromAgent::decode(bytes) {
        Ok(message) => message,
        Err(error) => return format!("from an agent: {error}"),
    };
    match Up::decode(message) {
        Ok(read) => {
            let again = pb::FromAgent::decode(&read.clone().encode().encode_to_vec()[..]);
            let again = again.expect("what was encoded is a message");
            assert_eq!(Up::decode(again).as_ref(), Ok(&read), "read again");
            word(&read)
        }
        Err(error) => refusal(&error.to_string()),
    }
}

fn down(bytes: &[u8]) -> String {
    let message = match pb::ToAgent::decode(bytes) {
        Ok(message) => message,
        Err(error) => return format!("from a server: {error}"),
    };
    match Down::decode(message) {
        Ok(read) => {
            let again = pb::ToAgent::decode(&read.clone().encode().encode_to_vec()[..]);
            let again = again.expect("what was encoded is a message");
            assert_eq!(Down::decode(again).as_ref(), Ok(&read), "read again");
            word(&read)
        }
        Err(error) => refusal(&error.to_string()),
    }
}

/// Errors are logged, and told to the peer.
fn refusal(error: &str) -> String {
    assert!(!error.chars().any(|c| c.is_control()), "a control character in {error:?}");
    assert!(error.len() < 2048, "a long error: {} bytes", error.len());
    error.to_owned()
}

/// What kind of message it is, with its shape: its `Debug` without names and numbers.
fn word(message: &impl std::fmt::Debug) -> String {
    let mut quoted = false;
    let mut shape: String = format!("{message:?}")
        .chars()
        .filter(|c| {
            quoted ^= *c == '"';
            !quoted && (c.is_ascii_alphabetic() || *c == ' ')
        })
        .collect();
    shape.truncate(400);
    shape
}
