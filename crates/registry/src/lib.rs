//! The registry: the durable, watchable store of everything a cluster knows, typed over a small ordered
//! key-value store.
//!
//! - [`store`]: the contract every store keeps, and what callers may rely on
//! - [`embedded`]: the store in one file under /var/lib/fleet
//! - [`etcd`]: the store in etcd, for several servers
//! - [`records`]: keys and the versioned records under them
//! - [`conformance`]: the test-suite every store must pass

pub mod conformance;
pub mod embedded;
pub mod etcd;
pub mod records;
pub mod store;

pub use embedded::EmbeddedStore;
pub use etcd::{EtcdConfig, EtcdStore};
pub use store::{
    Compare, Conflict, Entry, Event, Health, LeaseId, Op, Snapshot, Store, StoreError, Txn, Watch, WatchBatch,
};
