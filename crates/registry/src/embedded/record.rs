//! How records and the store's own data are laid out on disk, each under a checksum.
//!
//! A value in the file is `CRC32 (4 bytes, little endian) | revision (8 bytes, little endian) | value`.
//! The checksum covers the length of the key, the key, the revision and the value, so that a value under
//! the wrong key or revision is noticed too.
use super::memory::Record;
use crate::store::Revision;

/// The format this code writes, and the newest it reads.
pub(super) const FORMAT: u32 = 1;
const HEADER: usize = 12;

/// The checksum of a record.
pub(super) fn checksum(key: &str, revision: Revision, value: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&(key.len() as u64).to_le_bytes());
    crc.update(key.as_bytes());
    crc.update(&revision.to_le_bytes());
    crc.update(value);
    crc.finalize()
}

pub(super) fn encode(key: &str, revision: Revision, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + value.len());
    bytes.extend(checksum(key, revision, value).to_le_bytes());
    bytes.extend(revision.to_le_bytes());
    bytes.extend(value);
    bytes
}

/// `None` when the checksum is wrong.
pub(super) fn decode(key: &str, bytes: &[u8]) -> Option<Record> {
    let (crc, rest) = bytes.split_first_chunk::<4>()?;
    let (revision, value) = rest.split_first_chunk::<8>()?;
    let revision = Revision::from_le_bytes(*revision);
    (checksum(key, revision, value) == u32::from_le_bytes(*crc)).then(|| Record {
        key: key.into(),
        revision,
        value: value.into(),
    })
}

/// What the store keeps of itself. JSON on disk, in a record of its own table, with the checksum of any
/// record.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Meta {
    pub(super) format: u32,
    /// Made with the registry, and kept by repairs: tells two clusters' registries apart.
    pub(super) cluster: String,
    /// Revisions below this may have been given.
    pub(super) ceiling: Revision,
}

/// The number of records and a checksum over all of them, which tell whether two states are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Digest {
    pub(super) records: u64,
    pub(super) crc: u32,
}

impl Digest {
    /// Of records in key order.
    pub(super) fn of(records: &[Record]) -> Self {
        let mut crc = crc32fast::Hasher::new();
        for r in records {
            crc.update(&checksum(&r.key, r.revision, &r.value).to_le_bytes());
        }
        Digest { records: records.len() as u64, crc: crc.finalize() }
    }
}
