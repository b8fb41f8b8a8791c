//! What can go wrong with a request, in the original's words (golden/02-globals.txt).
use crate::types::ErrorBody;

/// Why there is no answer, or what the answer refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No answer came: no connection, connection lost, or too late.
    #[error("{method} {url:?}: {reason}")]
    NoAnswer {
        /// `Get`, `Put`, …
        method: &'static str,
        /// What was asked for.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The server refused, and said why.
    #[error("googleapi: Error {code}: {message}")]
    Refused {
        /// The HTTP status code.
        code: u16,
        /// The server's words.
        message: String,
        /// The exit code of the program whose failure this is (systemctl, journalctl), if it is one.
        exit_code: Option<i32>,
    },
    /// The server, or something else at this address, refused without a word.
    #[error("googleapi: got HTTP response code {code} with body: {body}")]
    Unexplained {
        /// The HTTP status code.
        code: u16,
        /// The beginning of the answer.
        body: String,
    },
    /// The answer came, but makes no sense.
    #[error("{method} {url:?}: {reason}")]
    Malformed {
        /// `Get`, `Put`, …
        method: &'static str,
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
}

/// The most of an unexplained answer that an error repeats, bytes.
const BODY_SHOWN: usize = 1024;

impl Error {
    /// The error that an answer with this status and body is.
    pub(super) fn of_answer(status: u16, body: &[u8], exit_code: Option<i32>) -> Self {
        if let Ok(ErrorBody { error }) = serde_json::from_slice(body)
            && !error.message.is_empty()
        {
            let code = if error.code == 0 { status } else { error.code };
            return Error::Refused { code, message: error.message, exit_code };
        }
        let shown = &body[..body.len().min(BODY_SHOWN)];
        Error::Unexplained { code: status, body: String::from_utf8_lossy(shown).into_owned() }
    }

    /// The HTTP status code of the refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            Error::Refused { code, .. } | Error::Unexplained { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// What happened, without what was asked for.
    pub fn reason(&self) -> String {
        match self {
            Error::NoAnswer { reason, .. } | Error::Malformed { reason, .. } => reason.clone(),
            refused => refused.to_string(),
        }
    }

    /// Whether no server answered at all.
    pub fn is_no_answer(&self) -> bool {
        matches!(self, Error::NoAnswer { .. })
    }

    /// Whether the server does not know this kind of request: an older one, or the original's.
    pub fn is_unknown_resource(&self) -> bool {
        matches!(self, Error::Unexplained { code: 404 | 405, .. } | Error::Refused { code: 405, .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_the_originals() {
        let refused = Error::of_answer(
            503,
            br#"{"error":{"code":503,"message":"fleet server unable to communicate with etcd"}}"#,
            None,
        );
        assert_eq!(refused.to_string(), "googleapi: Error 503: fleet server unable to communicate with etcd");
        let unexplained = Error::of_answer(404, br#"{"error":{"code":404,"message":""}}"#, None);
        assert_eq!(
            unexplained.to_string(),
            r#"googleapi: got HTTP response code 404 with body: {"error":{"code":404,"message":""}}"#
        );
        assert!(unexplained.is_unknown_resource());
        let foreign = Error::of_answer(404, b"404 page not found\n", None);
        assert_eq!(
            foreign.to_string(),
            "googleapi: got HTTP response code 404 with body: 404 page not found\n"
        );
        let lost = Error::NoAnswer {
            method: "Get",
            url: "http://domain-sock/fleet/v1/machines?alt=json".into(),
            reason: "dial unix /nonexistent.sock: connect: no such file or directory".into(),
        };
        assert_eq!(
            lost.to_string(),
            "Get \"http://domain-sock/fleet/v1/machines?alt=json\": \
             dial unix /nonexistent.sock: connect: no such file or directory"
        );
    }

    #[test]
    fn a_huge_foreign_answer_is_cut() {
        let error = Error::of_answer(500, &[b'x'; 100_000], None);
        assert!(error.to_string().len() < 2 * BODY_SHOWN);
    }
}
