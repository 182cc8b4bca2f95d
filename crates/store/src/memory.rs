//! The driver for tests and simulations: everything in memory, nothing shared with the SQLite driver but the limits.
//!
//! It keeps every version of every key in the plainest way there is, because it is also the model against which the
//! other drivers are checked; speed comes second.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::clock::Clock;
use crate::error::Error;
use crate::lease::{Leases, spawn_expiry};
use crate::limits::{
    check_key, check_query, check_reached, check_readable, check_transaction, check_ttl, check_watchable,
    lower_bound,
};
use crate::store::{
    Change, Commit, Condition, Entry, Lease, LeaseId, Operation, Page, Pending, Query, Revision, Store,
};
use crate::watch::{History, Replay, Watch, follow, matching};

/// A store that is gone when it is dropped.
pub struct MemoryStore {
    shared: Arc<Shared>,
}

impl MemoryStore {
    /// An empty store. Must be called within a tokio runtime, which ends leases in the background.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let state = State::new();
        let deadlines = state.leases.next_deadline();
        let shared = Arc::new(Shared { clock: clock.clone(), state: Mutex::new(state) });
        let weak = Arc::downgrade(&shared);
        spawn_expiry(clock, deadlines, move || {
            if let Some(shared) = weak.upgrade() {
                drop(shared.lock());
            }
            Box::pin(std::future::ready(Ok(())))
        });
        Self { shared }
    }

    /// All verbs are quick and never wait, so they run where they are called.
    fn now<'a, T>(&'a self, verb: impl FnOnce(&mut State) -> Result<T, Error> + Send + 'a) -> Pending<'a, T> {
        Box::pin(async move { verb(&mut self.shared.lock()) })
    }
}

impl Store for MemoryStore {
    fn revision(&self) -> Pending<'_, Revision> {
        self.now(|state| Ok(state.revision()))
    }

    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, Option<Entry>> {
        self.now(move |state| check_key(key).map(|()| state.current(key).cloned()))
    }

    fn list(&self, query: Query) -> Pending<'_, Page> {
        self.now(move |state| state.list(&query))
    }

    fn transact(&self, conditions: Vec<Condition>, operations: Vec<Operation>) -> Pending<'_, Revision> {
        self.now(move |state| state.transact(&conditions, &operations))
    }

    fn watch(&self, prefix: &str, from_revision: Revision) -> Watch {
        let head = self.shared.lock().head.subscribe();
        follow(Past(Arc::downgrade(&self.shared)), head, prefix, from_revision)
    }

    fn grant_lease(&self, ttl: Duration) -> Pending<'_, Lease> {
        self.now(move |state| state.grant(ttl, self.shared.clock.now()))
    }

    fn keep_lease_alive(&self, id: LeaseId) -> Pending<'_, Lease> {
        self.now(move |state| {
            let lease = state.leases.get(id).ok_or(Error::LeaseNotFound { id })?;
            state.leases.start(lease, self.shared.clock.now());
            Ok(lease)
        })
    }

    fn revoke_lease(&self, id: LeaseId) -> Pending<'_, ()> {
        self.now(move |state| {
            state.leases.get(id).ok_or(Error::LeaseNotFound { id })?;
            state.end_lease(id);
            Ok(())
        })
    }

    fn compact(&self, revision: Revision) -> Pending<'_, ()> {
        self.now(move |state| state.compact(revision))
    }
}

struct Shared {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

impl Shared {
    /// The state as of now: leases that are over have been ended.
    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().expect("no verb panics half-way");
        for id in state.leases.due(self.clock.now()) {
            state.end_lease(id);
        }
        state
    }
}

struct Past(Weak<Shared>);

impl History for Past {
    fn replay<'a>(&'a self, prefix: &'a str, from: Revision) -> Pending<'a, Replay> {
        let replay = self.0.upgrade().ok_or(Error::Closed).and_then(|shared| {
            let state = shared.lock();
            check_watchable(from, state.compacted)?;
            let commits = state.commits.range(from..).filter_map(|(_, commit)| matching(commit, prefix));
            Ok(Replay { commits: commits.collect(), complete_to: state.revision() })
        });
        Box::pin(std::future::ready(replay))
    }
}

struct State {
    head: watch::Sender<Revision>,
    compacted: Revision,
    /// What each key was from which revision on; `None` where it was deleted.
    keys: BTreeMap<String, Vec<(Revision, Option<Entry>)>>,
    commits: BTreeMap<Revision, Commit>,
    leases: Leases,
    last_lease: u64,
}

impl State {
    fn new() -> Self {
        Self {
            head: watch::Sender::new(Revision::EMPTY_STORE),
            compacted: Revision::ABSENT,
            keys: BTreeMap::new(),
            commits: BTreeMap::new(),
            leases: Leases::new(),
            last_lease: 0,
        }
    }

    fn revision(&self) -> Revision {
        *self.head.borrow()
    }

    fn current(&self, key: &str) -> Option<&Entry> {
        self.keys.get(key)?.last()?.1.as_ref()
    }

    fn list(&self, query: &Query) -> Result<Page, Error> {
        check_query(query)?;
        let revision = query.at.unwrap_or(self.revision());
        check_readable(revision, self.revision(), self.compacted)?;
        let limit = query.limit.unwrap_or(usize::MAX);
        let from = lower_bound(query);
        let mut entries: Vec<Entry> = self
            .keys
            .range::<str, _>((Bound::Included(from.as_str()), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&query.prefix))
            .filter_map(|(_, versions)| at(versions, revision).cloned())
            .take(limit.saturating_add(1))
            .collect();
        let more = entries.len() > limit;
        entries.truncate(limit);
        Ok(Page { entries, revision, more })
    }

    fn transact(&mut self, conditions: &[Condition], operations: &[Operation]) -> Result<Revision, Error> {
        check_transaction(conditions, operations)?;
        for Condition { key, mod_revision: expected } in conditions {
            let found = self.current(key).map_or(Revision::ABSENT, |entry| entry.mod_revision);
            if found != *expected {
                return Err(Error::Conflict { key: key.clone(), expected: *expected, found });
            }
        }
        for operation in operations {
            if let Operation::Put { lease: Some(id), .. } = operation {
                self.leases.get(*id).ok_or(Error::LeaseNotFound { id: *id })?;
            }
        }
        let revision = self.revision().next();
        let changes = operations.iter().filter_map(|operation| self.change(operation, revision)).collect();
        Ok(self.commit(changes))
    }

    fn change(&self, operation: &Operation, revision: Revision) -> Option<Change> {
        match operation {
            Operation::Put { key, value, lease } => Some(Change::Put(self.put(key, value, *lease, revision))),
            Operation::Delete { key } => self.current(key).map(|_| Change::Delete { key: key.clone() }),
        }
    }

    fn put(&self, key: &str, value: &Bytes, lease: Option<LeaseId>, revision: Revision) -> Entry {
        let (create_revision, version) =
            self.current(key).map_or((revision, 1), |entry| (entry.create_revision, entry.version + 1));
        Entry {
            key: key.to_owned(),
            value: value.clone(),
            create_revision,
            mod_revision: revision,
            version,
            lease,
        }
    }

    /// Makes the changes at a revision of their own, if there are any.
    fn commit(&mut self, mut changes: Vec<Change>) -> Revision {
        if changes.is_empty() {
            return self.revision();
        }
        let revision = self.revision().next();
        changes.sort_by(|one, other| one.key().cmp(other.key()));
        for change in &changes {
            let entry = match change {
                Change::Put(entry) => Some(entry.clone()),
                Change::Delete { .. } => None,
            };
            self.keys.entry(change.key().to_owned()).or_default().push((revision, entry));
        }
        self.commits.insert(revision, Commit { revision, changes });
        self.head.send_replace(revision);
        revision
    }

    fn grant(&mut self, ttl: Duration, now: Duration) -> Result<Lease, Error> {
        let ttl = check_ttl(ttl)?;
        self.last_lease += 1;
        let lease = Lease { id: LeaseId(self.last_lease), ttl };
        self.leases.start(lease, now);
        Ok(lease)
    }

    fn end_lease(&mut self, id: LeaseId) {
        let held = self.keys.values().filter_map(|versions| versions.last()?.1.as_ref());
        let held = held.filter(|entry| entry.lease == Some(id));
        let changes = held.map(|entry| Change::Delete { key: entry.key.clone() }).collect();
        self.commit(changes);
        self.leases.end(id);
    }

    fn compact(&mut self, revision: Revision) -> Result<(), Error> {
        check_reached("revision", revision, self.revision())?;
        self.compacted = self.compacted.max(revision);
        let compacted = self.compacted;
        self.commits.retain(|revision, _| *revision > compacted);
        self.keys.retain(|_, versions| {
            let newest_old = versions.iter().rposition(|(since, _)| *since <= compacted).unwrap_or(0);
            versions.drain(..newest_old);
            let first = versions.first().expect("a key has at least one version");
            if first.0 <= compacted && first.1.is_none() {
                versions.remove(0);
            }
            !versions.is_empty()
        });
        Ok(())
    }
}

/// What a key was at a revision.
fn at(versions: &[(Revision, Option<Entry>)], revision: Revision) -> Option<&Entry> {
    versions.iter().rev().find(|(since, _)| *since <= revision)?.1.as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Subject;
    use crate::{ManualClock, store_contract};

    async fn subject() -> Subject {
        let clock = ManualClock::new();
        Subject::new(Arc::new(MemoryStore::new(Arc::new(clock.clone()))), clock, ())
    }

    store_contract!(subject());
}
