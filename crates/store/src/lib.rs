//! The cluster's records: one narrow trait with etcd's semantics, drivers, and one contract suite for all of them.
//!
//! Everything the manager must not forget goes through [`Store`]: about ten verbs over keys such as `/vms/vm-abc` and
//! values of bytes. The store has one revision that grows by one with each transaction that changes anything, so that
//! "nobody touched it since I looked" is one comparison, and a watcher that reconnects says where it stopped.
//!
//! The trait promises only what etcd can keep as well, because an etcd driver comes next: transactions of bounded size
//! that name a key once, watches that start at a revision, leases that end some time *after* their time to live, and
//! no ordering beyond the revision. [`SqliteStore`] keeps one file for a single manager; [`MemoryStore`] is for tests
//! and simulations, and is the model against which the other is checked. The suite in `contract` (feature `contract`)
//! says in executable form what a driver owes.
//!
//! Most callers use [`Records`], the typed layer with JSON values, and see [`Store`] only in transactions.

mod store;

mod error;

mod records;

mod watch;

mod clock;

mod lease;

mod limits;

mod memory;

mod sqlite;

#[cfg(any(test, feature = "contract"))]
pub mod contract;

#[cfg(test)]
mod equivalence;

pub use clock::{Clock, ManualClock, SystemClock};
pub use error::Error;
pub use limits::{KEY_BYTES_MAX, LEASE_TTL_MAX, OPERATIONS_MAX, TRANSACTION_BYTES_MAX, VALUE_BYTES_MAX};
pub use memory::MemoryStore;
pub use records::{Records, Versioned};
pub use sqlite::SqliteStore;
pub use store::{
    Change, Commit, Condition, Entry, Lease, LeaseId, Operation, Page, Pending, Query, Revision, Store,
};
pub use watch::Watch;
