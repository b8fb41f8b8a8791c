//! What an error answer of etcd means for the caller: whether anything was done, and who can help.

use crate::store::StoreError;
use tonic::{Code, Status};

/// What to do about a call that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// Nothing was done, and it is no use to ask again.
    Final(StoreError),
    /// Nothing was done; another connection or another member may do it.
    Elsewhere(String),
    /// The revision asked for is no longer kept; nothing was done.
    Compacted,
    /// The answer is larger than we take.
    LargeAnswer,
    /// It may have been done or not. A read may be repeated.
    Unsure(String),
}

/// How etcd says that a user's token has run out, is not known to the member, or is older than a change of users.
const STALE_TOKEN: [&str; 2] = ["invalid auth token", "revision in header is old"];

/// Reads the error answer of the member at `endpoint`. `with_login`: a user is configured.
///
/// The texts are etcd's (its package rpctypes); gRPC's codes alone don't tell enough apart.
pub(super) fn read(status: &Status, endpoint: &str, with_login: bool) -> Failure {
    let message = clean(status.message());
    let has = |text: &str| message.contains(text);
    let said = || format!("{endpoint}: {message}");
    match status.code() {
        _ if has("requested lease not found") => Failure::Final(StoreError::LeaseEnded),
        _ if has("request is too large") || has("trying to send message larger") => {
            Failure::Final(StoreError::TooLarge(format!("{endpoint} takes no request of this size")))
        }
        _ if has("database space exceeded") => Failure::Final(StoreError::Unavailable(format!(
            "etcd at {endpoint} has used up its space and takes no writes (alarm NOSPACE): compact and defragment it, \
             then `etcdctl alarm disarm`"
        ))),
        _ if has("required revision has been compacted") => Failure::Compacted,
        _ if has("decoded message length too large") => Failure::LargeAnswer,
        _ if STALE_TOKEN.iter().any(|text| has(text)) => Failure::Elsewhere(said()),
        // Without a token although there is a user: authentication was enabled after the token was asked for.
        _ if has("user name is empty") && with_login => Failure::Elsewhere(said()),
        _ if has("user name is empty") => Failure::Final(StoreError::Denied(format!(
            "etcd at {endpoint} wants a user: set etcd_username and etcd_password"
        ))),
        _ if has("authentication failed") => Failure::Final(StoreError::Denied(format!(
            "etcd at {endpoint} does not take the user name and password of etcd_username and etcd_password"
        ))),
        Code::PermissionDenied => Failure::Final(StoreError::Denied(format!(
            "etcd at {endpoint} gives its user no permission for this ({message})"
        ))),
        Code::Unimplemented => Failure::Final(StoreError::Unusable(format!(
            "{endpoint} does not speak etcd's API v3 ({message})"
        ))),
        // Some of its members have other data than the others.
        Code::DataLoss => Failure::Final(StoreError::Damaged(said())),
        // Said before anything is done.
        _ if has("etcdserver: no leader") || has("not supported for learner") || has("too many requests") => {
            Failure::Elsewhere(said())
        }
        _ => Failure::Unsure(said()),
    }
}

/// Text from outside, fit for logs and terminals, with what caused it where that says more.
pub(super) fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_that_nothing_was_done_is_no_unknown() {
        let read = |code, text: &str| super::read(&Status::new(code, text), "http://x:1", true);
        // As etcd 3.4 words them.
        for (code, text) in [
            (Code::Unavailable, "etcdserver: request timed out"),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to previous leader failure"),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to connection lost"),
            (Code::Unavailable, "etcdserver: leader changed"),
            (Code::Unavailable, "etcdserver: server stopped"),
            (Code::Unknown, "raft proposal dropped"),
            (Code::Unknown, "context deadline exceeded"),
            (Code::Cancelled, "timeout expired"),
        ] {
            assert_eq!(read(code, text), Failure::Unsure(format!("http://x:1: {text}")));
        }
        for (code, text) in [
            (Code::Unavailable, "etcdserver: no leader"),
            (Code::ResourceExhausted, "etcdserver: too many requests"),
            (Code::Unauthenticated, "etcdserver: invalid auth token"),
            (Code::InvalidArgument, "etcdserver: revision in header is old"),
            (Code::InvalidArgument, "etcdserver: user name is empty"),
        ] {
            assert!(matches!(read(code, text), Failure::Elsewhere(_)), "{text}");
        }
        let text = "etcdserver: mvcc: required revision has been compacted";
        assert_eq!(read(Code::OutOfRange, text), Failure::Compacted);
    }

    #[test]
    fn refusals_say_what_to_do() {
        let of = |status: Status| match read(&status, "http://x:1", false) {
            Failure::Final(error) => error.to_string(),
            other => panic!("{other:?}"),
        };
        for (status, word) in [
            (Status::resource_exhausted("etcdserver: mvcc: database space exceeded"), "alarm NOSPACE"),
            (
                Status::invalid_argument("etcdserver: user name is empty"),
                "set etcd_username and etcd_password",
            ),
            (
                Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password"),
                "does not take the user name",
            ),
            (Status::permission_denied("etcdserver: permission denied"), "no permission"),
            (Status::unimplemented("unknown service"), "does not speak etcd's API v3"),
            (Status::data_loss("etcdserver: corrupt cluster"), "corrupt cluster"),
        ] {
            let message = of(status);
            assert!(message.contains(word) && message.contains("http://x:1"), "{message}");
        }
        assert_eq!(
            read(&Status::not_found("etcdserver: requested lease not found"), "x", false),
            Failure::Final(StoreError::LeaseEnded)
        );
    }
}
