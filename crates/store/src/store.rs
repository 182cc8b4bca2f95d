//! The trait that all drivers implement, and the words it is said in.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::watch::Watch;

/// What every verb returns: a boxed future, so that the trait can be used as `Arc<dyn Store>`.
///
/// Dropping it takes nothing back: a change that was handed in may still be made.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

/// Records under string keys, changed by compare-and-set, watched from a revision.
///
/// Promises, whatever the driver:
///
/// - A change whose future returned `Ok` is durable: it survives the death of the process and of the machine.
/// - Changes are made one after the other; a read that starts after a change was acknowledged sees it.
/// - A transaction is made whole or not at all, and gets a revision of its own, one more than the last.
/// - After [`Error::Io`] or [`Error::Closed`] a change may or may not have been made: read before you repeat it.
///   After any other error nothing was changed.
///
/// Bad input (see the limits beside this trait) gets [`Error::Invalid`] from every verb.
pub trait Store: Send + Sync {
    /// The store's revision now; an empty store has revision 1.
    fn revision(&self) -> Pending<'_, Revision>;

    /// The entry under `key`, if there is one.
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>>;

    /// A page of entries in byte order of their keys, all as they were at one revision, which the page names.
    ///
    /// To go on reading the same state while others write, pass that revision and the last key back:
    /// `Query::at` and `Query::after`. Fails with [`Error::Compacted`] when that state is no longer kept.
    fn list(&self, query: Query) -> Pending<'_, Page>;

    /// Makes all of `operations` if all of `conditions` hold, and returns the new revision.
    ///
    /// Operations that change nothing (none at all, deletes of what is not there) make no revision; the current one
    /// is returned. No key may be named by two operations.
    ///
    /// Fails with [`Error::Conflict`] naming the first condition that does not hold, [`Error::LeaseNotFound`],
    /// [`Error::NoSpace`].
    fn transact(&self, conditions: Vec<Condition>, operations: Vec<Operation>) -> Pending<'_, Revision>;

    /// All changes to keys that begin with `prefix`, beginning with those made at `from_revision`, in order, without
    /// gaps, one [`Commit`] a transaction.
    ///
    /// To follow what a list showed, watch from `page.revision.next()`; to go on after a lost watch, from
    /// `commit.revision.next()` of the last commit seen. A revision still to come is waited for. Errors come as the
    /// stream's last item: [`Error::Compacted`] when changes from there on are no longer kept (also to a watcher
    /// that was too slow), after which the way on is to list again; [`Error::Closed`].
    fn watch(&self, prefix: &str, from_revision: Revision) -> Watch;

    /// Grants a lease; keys put under it vanish, in one transaction, once it has not been kept alive for the granted
    /// time, which may be longer than `ttl`. They vanish never before and usually soon after.
    ///
    /// A store that was restarted gives every lease its full time again.
    fn grant_lease(&self, ttl: Duration) -> Pending<'_, Lease>;

    /// Starts a lease's time afresh. Fails with [`Error::LeaseNotFound`] when it ended.
    fn keep_lease_alive(&self, id: LeaseId) -> Pending<'_, Lease>;

    /// Ends a lease now, deleting its keys in one transaction. Fails with [`Error::LeaseNotFound`].
    fn revoke_lease(&self, id: LeaseId) -> Pending<'_, ()>;

    /// Forgets history that only states before `revision` need. Lists at `revision` and later, and watches from
    /// later ones, go on working; earlier get [`Error::Compacted`]. Doing it twice is no error.
    fn compact(&self, revision: Revision) -> Pending<'_, ()>;

    /// Writes `value` under `key` whatever is there.
    fn put(&self, key: &str, value: Bytes) -> Pending<'_, Revision> {
        self.transact(Vec::new(), vec![Operation::put(key, value)])
    }

    /// Deletes `key`; when there is nothing under it, nothing happens and the current revision is returned.
    fn delete(&self, key: &str) -> Pending<'_, Revision> {
        self.transact(Vec::new(), vec![Operation::delete(key)])
    }
}

/// A point in the store's history. Grows by one with each transaction that changes anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// In conditions: the key must not exist. In conflicts: it does not.
    pub const ABSENT: Self = Self(0);

    /// The revision of a store in which nothing has ever been written.
    pub const EMPTY_STORE: Self = Self(1);

    /// The revision after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("a store does not live through 2^64 transactions"))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key, its value, and where both come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key, such as `/vms/vm-abc`.
    pub key: String,
    /// The value; the store does not look into it.
    pub value: Bytes,
    /// The revision at which the key last came into being.
    pub create_revision: Revision,
    /// The revision of the last change; what conditions compare with.
    pub mod_revision: Revision,
    /// How many times the key was put since it came into being, from 1.
    pub version: u64,
    /// The lease that the key vanishes with.
    pub lease: Option<LeaseId>,
}

/// What [`Store::list`] is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub(crate) prefix: String,
    pub(crate) after: Option<String>,
    pub(crate) limit: Option<usize>,
    pub(crate) at: Option<Revision>,
}

impl Query {
    /// All keys that begin with `prefix`; the empty prefix means all keys.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..Self::default() }
    }

    /// Only keys greater than this one, which need not exist.
    #[must_use]
    pub fn after(mut self, key: impl Into<String>) -> Self {
        self.after = Some(key.into());
        self
    }

    /// At most so many entries; at least 1.
    #[must_use]
    pub fn limit(mut self, entries_max: usize) -> Self {
        self.limit = Some(entries_max);
        self
    }

    /// The state at this revision instead of the current one.
    #[must_use]
    pub fn at(mut self, revision: Revision) -> Self {
        self.at = Some(revision);
        self
    }
}

/// What [`Store::list`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Entries in byte order of their keys.
    pub entries: Vec<Entry>,
    /// The revision at which all of them were read.
    pub revision: Revision,
    /// Whether the limit left entries out.
    pub more: bool,
}

/// What must hold for a transaction to be made: the key's `mod_revision` is exactly this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The key to look at.
    pub key: String,
    /// The revision of its last change; [`Revision::ABSENT`] if it must not exist.
    pub mod_revision: Revision,
}

impl Condition {
    /// Nobody changed `key` since `mod_revision`.
    pub fn unchanged(key: impl Into<String>, mod_revision: Revision) -> Self {
        Self { key: key.into(), mod_revision }
    }

    /// There is nothing under `key`.
    pub fn absent(key: impl Into<String>) -> Self {
        Self::unchanged(key, Revision::ABSENT)
    }
}

/// One change that a transaction makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Writes a value, whatever was there; the key belongs to `lease` afterwards, or to none.
    Put {
        /// The key to write.
        key: String,
        /// The whole new value.
        value: Bytes,
        /// The lease with which the key is to vanish.
        lease: Option<LeaseId>,
    },
    /// Deletes a key, if it is there.
    Delete {
        /// The key to delete.
        key: String,
    },
}

impl Operation {
    /// Writes `value` under `key`, bound to no lease.
    pub fn put(key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Writes `value` under `key`, to vanish with `lease`.
    pub fn put_leased(key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: Some(lease) }
    }

    /// Deletes `key`.
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// The key that it changes.
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// What one transaction changed, or the part of it that a watcher asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The transaction's revision; to go on from here, watch from the next one.
    pub revision: Revision,
    /// The changes in byte order of their keys, at least one; no key twice.
    pub changes: Vec<Change>,
}

/// What happened to one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was created or overwritten.
    Put(Entry),
    /// It was deleted, or its lease ended.
    Delete {
        /// The key that is no more.
        key: String,
    },
}

impl Change {
    /// The key that it happened to.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key } => key,
        }
    }
}

/// Names a lease. Never used twice in the life of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease as granted or kept alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub id: LeaseId,
    /// For how long it lives from now unless it is kept alive; at least what was asked for.
    pub ttl: Duration,
}
