//! The store's verbs that change something, as statements within one open SQLite transaction.
//!
//! Several of the store's transactions share one of SQLite's (see `writer`). So that one of them can fail without
//! taking the others along, each looks before it writes: an error about what was asked for comes before the first
//! change.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use super::fault::fault;
use super::rows::{self, Head};
use crate::error::Error;
use crate::lease::Leases;
use crate::limits::{check_reached, check_ttl};
use crate::store::{Change, Commit, Condition, Entry, Lease, LeaseId, Operation, Revision};

/// What is done so far in a transaction that has not been committed yet.
pub(super) struct Transaction<'a> {
    connection: &'a Connection,
    path: &'a Path,
    now: Duration,
    written: Head,
    /// The numbers as they will be.
    pub head: Head,
    /// What watchers will be told.
    pub commits: Vec<Commit>,
    /// What will happen to the deadlines of leases.
    pub timings: Vec<Timing>,
}

/// A change to a lease's deadline, to be made once the transaction stands.
pub(super) enum Timing {
    /// Its time starts, for the first time or again.
    Start(Lease),
    /// It is over.
    End(LeaseId),
}

impl<'a> Transaction<'a> {
    /// Goes on from what is in the tables now.
    pub fn begin(connection: &'a Connection, path: &'a Path, now: Duration) -> Result<Self, Error> {
        let head = rows::head(connection).map_err(|error| fault(path, "read", error))?;
        Ok(Self { connection, path, now, written: head, head, commits: Vec::new(), timings: Vec::new() })
    }

    /// Writes what is written once for all verbs of the transaction.
    pub fn finish(&mut self) -> Result<(), Error> {
        if self.head != self.written {
            self.sql(|connection| rows::write_head(connection, self.head))?;
            self.written = self.head;
        }
        Ok(())
    }

    /// Ends the leases whose time is over.
    pub fn expire(&mut self, leases: &Leases) -> Result<(), Error> {
        for id in leases.due(self.now) {
            self.end_lease(id)?;
        }
        Ok(())
    }

    pub fn transact(
        &mut self,
        conditions: &[Condition],
        operations: &[Operation],
    ) -> Result<Revision, Error> {
        for Condition { key, mod_revision: expected } in conditions {
            let found = self.get(key)?.map_or(Revision::ABSENT, |entry| entry.mod_revision);
            if found != *expected {
                return Err(Error::Conflict { key: key.clone(), expected: *expected, found });
            }
        }
        for operation in operations {
            if let Operation::Put { lease: Some(id), .. } = operation {
                self.lease(*id)?;
            }
        }
        let mut changes = Vec::with_capacity(operations.len());
        for operation in operations {
            changes.extend(self.change(operation)?);
        }
        self.apply(changes)
    }

    pub fn grant_lease(&mut self, ttl: Duration) -> Result<Lease, Error> {
        let lease = Lease { id: LeaseId(self.head.last_lease + 1), ttl: check_ttl(ttl)? };
        self.sql(|connection| rows::write_lease(connection, lease))?;
        self.head.last_lease = lease.id.0;
        self.timings.push(Timing::Start(lease));
        Ok(lease)
    }

    pub fn keep_lease_alive(&mut self, id: LeaseId) -> Result<Lease, Error> {
        let lease = self.lease(id)?;
        self.timings.push(Timing::Start(lease));
        Ok(lease)
    }

    pub fn revoke_lease(&mut self, id: LeaseId) -> Result<(), Error> {
        self.lease(id)?;
        self.end_lease(id)
    }

    pub fn compact(&mut self, revision: Revision) -> Result<(), Error> {
        check_reached("revision", revision, self.head.revision)?;
        if revision > self.head.compacted {
            self.sql(|connection| rows::forget(connection, revision))?;
            self.head.compacted = revision;
        }
        Ok(())
    }

    fn end_lease(&mut self, id: LeaseId) -> Result<(), Error> {
        let keys = self.sql(|connection| rows::keys_of_lease(connection, id))?;
        self.apply(keys.into_iter().map(|key| Change::Delete { key }).collect())?;
        self.sql(|connection| rows::delete_lease(connection, id))?;
        self.timings.push(Timing::End(id));
        Ok(())
    }

    /// What an operation comes to, if it changes anything.
    fn change(&self, operation: &Operation) -> Result<Option<Change>, Error> {
        let before = self.get(operation.key())?;
        Ok(match operation {
            Operation::Delete { key } => before.map(|_| Change::Delete { key: key.clone() }),
            Operation::Put { key, value, lease } => {
                let mod_revision = self.head.revision.next();
                let (create_revision, version) =
                    before.map_or((mod_revision, 1), |entry| (entry.create_revision, entry.version + 1));
                Some(Change::Put(Entry {
                    key: key.clone(),
                    value: value.clone(),
                    create_revision,
                    mod_revision,
                    version,
                    lease: *lease,
                }))
            }
        })
    }

    /// Makes the changes at a revision of their own, if there are any.
    fn apply(&mut self, mut changes: Vec<Change>) -> Result<Revision, Error> {
        if changes.is_empty() {
            return Ok(self.head.revision);
        }
        let revision = self.head.revision.next();
        changes.sort_by(|one, other| one.key().cmp(other.key()));
        for change in &changes {
            self.sql(|connection| rows::write_change(connection, revision, change))?;
        }
        self.head.revision = revision;
        self.commits.push(Commit { revision, changes });
        Ok(revision)
    }

    fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        self.sql(|connection| rows::get(connection, key))
    }

    fn lease(&self, id: LeaseId) -> Result<Lease, Error> {
        self.sql(|connection| rows::lease(connection, id))?.ok_or(Error::LeaseNotFound { id })
    }

    /// Runs statements, and says of the storage what they fail with.
    pub fn sql<T>(&self, run: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>) -> Result<T, Error> {
        run(self.connection).map_err(|error| fault(self.path, "write", error))
    }
}
