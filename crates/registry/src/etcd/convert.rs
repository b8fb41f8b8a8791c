//! Transactions and entries as etcd's messages, and back.

use super::generated::{self as pb, compare, request_op::Request, response_op::Response};
use super::layout::Layout;
use crate::store::*;
use std::collections::HashMap;

/// A revision as etcd has it.
pub(super) fn to_etcd(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

/// A revision as etcd had it.
pub(super) fn of_etcd(revision: i64) -> Revision {
    Revision::try_from(revision).unwrap_or(0)
}

/// A transaction for etcd: where a condition does not hold, it reads the revisions of all keys that have one.
///
/// # Errors
/// [`StoreError::TooLarge`]
pub(super) fn request(txn: &Txn, layout: &Layout) -> Result<pb::TxnRequest, StoreError> {
    check_size(txn)?;
    // etcd refuses two writes of one key.
    let last: HashMap<&str, usize> = txn.ops.iter().enumerate().map(|(n, op)| (op.key(), n)).collect();
    let writes = txn.ops.iter().enumerate().filter(|(n, op)| last[op.key()] == *n).map(|(_, op)| match op {
        Op::Put { key, value, lease } => Request::RequestPut(pb::PutRequest {
            key: layout.entry(key),
            value: value.clone().into(),
            lease: lease.map_or(0, |lease| lease.0),
        }),
        Op::Delete { key } => Request::RequestDeleteRange(pb::DeleteRangeRequest {
            key: layout.entry(key),
            ..pb::DeleteRangeRequest::default()
        }),
    });
    let mut success: Vec<_> = writes.map(op).collect();
    if success.is_empty() {
        // etcd answers a transaction without anything in it from what the member happens to know; a read makes sure
        // that it is current.
        success.push(read_revision(layout.registry()));
    }
    let compare = txn.compares.iter().map(|condition| pb::Compare {
        result: compare::CompareResult::Equal.into(),
        target: compare::CompareTarget::Mod.into(),
        key: layout.entry(&condition.key),
        target_union: Some(compare::TargetUnion::ModRevision(to_etcd(condition.revision))),
        ..pb::Compare::default()
    });
    let failure = txn.compares.iter().map(|condition| read_revision(layout.entry(&condition.key)));
    Ok(pb::TxnRequest { compare: compare.collect(), failure: failure.collect(), success })
}

fn op(request: Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn read_revision(key: bytes::Bytes) -> pb::RequestOp {
    op(Request::RequestRange(pb::RangeRequest { key, keys_only: true, ..pb::RangeRequest::default() }))
}

/// What etcd answered.
///
/// # Errors
/// [`Conflict`] with the first condition that did not hold.
pub(super) fn answer(txn: &Txn, answer: &pb::TxnResponse) -> Result<Revision, StoreError> {
    if answer.succeeded {
        return Ok(of_etcd(answer.header.map_or(0, |h| h.revision)));
    }
    let found = answer.responses.iter().map(|op| match &op.response {
        Some(Response::ResponseRange(range)) => range.kvs.first().map_or(0, |kv| of_etcd(kv.mod_revision)),
        _ => 0,
    });
    let broken = txn.compares.iter().zip(found).find(|(condition, found)| condition.revision != *found);
    let (condition, found) = broken.ok_or_else(|| {
        StoreError::Unusable("etcd says that a condition does not hold, but all of them do".into())
    })?;
    Err(Conflict { key: condition.key.clone(), expected: condition.revision, found }.into())
}

/// What makes watches of all entries tell a revision.
pub(super) fn barrier(layout: &Layout) -> pb::TxnRequest {
    let put = pb::PutRequest { key: layout.barrier(), ..pb::PutRequest::default() };
    pb::TxnRequest { success: vec![op(Request::RequestPut(put))], ..pb::TxnRequest::default() }
}

/// An entry. `None`: its key is that of the barrier, or none of ours; that is said in the log.
pub(super) fn entry(kv: &pb::KeyValue, layout: &Layout) -> Option<Entry> {
    if kv.key == layout.barrier() {
        return None;
    }
    let Some(key) = layout.key(&kv.key) else {
        let key = kv.key.escape_ascii();
        tracing::warn!("etcd has a key that is not of fleet: {key}; it is ignored");
        return None;
    };
    Some(Entry { key, value: (&*kv.value).into(), revision: of_etcd(kv.mod_revision) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(revision: i64) -> pb::ResponseOp {
        let kv = pb::KeyValue { mod_revision: revision, ..pb::KeyValue::default() };
        let kvs = if revision == 0 { vec![] } else { vec![kv] };
        let range = pb::RangeResponse { kvs, ..pb::RangeResponse::default() };
        pb::ResponseOp { response: Some(Response::ResponseRange(range)) }
    }

    #[test]
    fn the_last_write_of_a_key_is_sent() {
        let layout = Layout::new("/p/");
        let txn = Txn::of(Op::put("a", "1")).then(Op::put("b", "1")).then(Op::delete("a")).when("c", 7);
        let request = request(&txn, &layout).unwrap();
        let keys: Vec<_> = request
            .success
            .iter()
            .map(|op| match op.request.as_ref().unwrap() {
                Request::RequestPut(put) => (put.key.clone(), true),
                Request::RequestDeleteRange(delete) => (delete.key.clone(), false),
                Request::RequestRange(_) => panic!("a read"),
            })
            .collect();
        assert_eq!(keys, [(layout.entry("b"), true), (layout.entry("a"), false)]);
        assert_eq!((request.compare.len(), request.failure.len()), (1, 1));
    }

    #[test]
    fn the_first_broken_condition_is_told() {
        let txn = Txn::default().when("a", 1).when("b", 0).when("c", 3);
        let failed = |responses| answer(&txn, &pb::TxnResponse { responses, ..pb::TxnResponse::default() });
        let conflict = |key: &str, expected, found| {
            Err(StoreError::Conflict(Conflict { key: key.into(), expected, found }))
        };
        assert_eq!(failed(vec![range(1), range(9), range(0)]), conflict("b", 0, 9));
        assert_eq!(failed(vec![range(1), range(0), range(0)]), conflict("c", 3, 0));
        assert!(matches!(failed(vec![range(1), range(0), range(3)]), Err(StoreError::Unusable(_))));
    }
}
