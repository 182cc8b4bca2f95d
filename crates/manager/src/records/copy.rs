//! The copy of the records in memory, and what keeps it up to date.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use berth_store::{Change, Entry, Query, Revision, Store};
use tokio::sync::watch;

use super::name::UniqueName;
use super::noun::{Record, TABLES};
use super::{RecordsError, decode};

/// Entries read at a time when everything is read.
const PAGE_ENTRIES: usize = 1000;
/// How long to wait before everything is read again after the store failed. A store that failed for good stays so,
/// and a manager whose copy can't follow answers reads only.
const RELOAD_AFTER: Duration = Duration::from_secs(1);

/// A record and the revision of its last change.
#[derive(Debug, Clone)]
pub struct Row<T> {
    /// Its key without the prefix.
    pub id: String,
    /// When it last changed: for compare-and-set, and an entity tag.
    pub revision: Revision,
    /// What it says.
    pub value: T,
}

impl<T: Record> Row<T> {
    pub(super) fn key(&self) -> String {
        format!("{}{}", T::PREFIX, self.id)
    }
}

impl<T> Deref for Row<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

type AnyRow = Arc<dyn Any + Send + Sync>;

/// All records of one kind.
pub struct Table {
    prefix: &'static str,
    read: fn(&str, &Entry) -> Result<AnyRow, berth_store::Error>,
    rows: BTreeMap<String, AnyRow>,
    changes: watch::Sender<u64>,
}

impl Table {
    /// An empty one.
    pub fn of<T: Record>() -> Self {
        Self { prefix: T::PREFIX, read: read::<T>, rows: BTreeMap::new(), changes: watch::Sender::new(0) }
    }

    fn set(&mut self, id: &str, entry: &Entry) -> Result<(), berth_store::Error> {
        let row = (self.read)(id, entry)?;
        self.rows.insert(id.to_owned(), row);
        Ok(())
    }
}

fn read<T: Record>(id: &str, entry: &Entry) -> Result<AnyRow, berth_store::Error> {
    let value = decode::<T>(&entry.key, &entry.value)?;
    Ok(Arc::new(Row { id: id.to_owned(), revision: entry.mod_revision, value }))
}

/// All tables.
pub(super) struct Copy {
    tables: Vec<Table>,
    names: BTreeMap<String, String>,
}

impl Copy {
    fn new() -> Self {
        Self { tables: TABLES.iter().map(|table| table()).collect(), names: BTreeMap::new() }
    }

    fn table<T: Record>(&self) -> &Table {
        self.tables.iter().find(|table| table.prefix == T::PREFIX).expect("every record type is in TABLES")
    }

    pub(super) fn get<T: Record>(&self, id: &str) -> Option<Arc<Row<T>>> {
        self.table::<T>().rows.get(id).map(typed)
    }

    pub(super) fn list<T: Record>(&self, below: &str) -> Vec<Arc<Row<T>>> {
        let rows = self.table::<T>().rows.range(below.to_owned()..);
        rows.take_while(|(id, _)| id.starts_with(below)).map(|(_, row)| typed(row)).collect()
    }

    pub(super) fn list_where<T: Record>(&self, wanted: impl Fn(&T) -> bool) -> Vec<Arc<Row<T>>> {
        let rows = self.table::<T>().rows.values();
        rows.filter_map(|row| {
            let row: &Row<T> = row.downcast_ref()?;
            wanted(&row.value).then_some(row)
        })
        .filter_map(|row| self.get(&row.id))
        .collect()
    }

    pub(super) fn id_of(&self, key: &str) -> Option<String> {
        self.names.get(key).cloned()
    }

    pub(super) fn changes<T: Record>(&self) -> watch::Receiver<u64> {
        self.table::<T>().changes.subscribe()
    }

    /// Says which table changed, if one did.
    fn apply(&mut self, change: &Change) -> Result<(), berth_store::Error> {
        let key = change.key();
        if key.starts_with(UniqueName::prefix()) {
            match change {
                Change::Put(entry) => {
                    self.names.insert(key.to_owned(), String::from_utf8_lossy(&entry.value).into_owned());
                }
                Change::Delete { .. } => {
                    self.names.remove(key);
                }
            }
            return Ok(());
        }
        let Some(table) = self.tables.iter_mut().find(|table| key.starts_with(table.prefix)) else {
            return Ok(());
        };
        let id = &key[table.prefix.len()..];
        match change {
            Change::Put(entry) => table.set(id, entry)?,
            Change::Delete { .. } => {
                table.rows.remove(id);
            }
        }
        table.changes.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Takes over what was read anew, keeping those who listen for changes.
    fn renew(&mut self, fresh: Self) {
        for (table, new) in self.tables.iter_mut().zip(fresh.tables) {
            table.rows = new.rows;
            table.changes.send_modify(|count| *count += 1);
        }
        self.names = fresh.names;
    }
}

fn typed<T: Record>(row: &AnyRow) -> Arc<Row<T>> {
    Arc::clone(row).downcast().expect("a table holds rows of its own type")
}

/// The copy with the task that follows the store.
pub(super) struct Follower {
    copy: Arc<RwLock<Copy>>,
    reached: watch::Receiver<Revision>,
    task: tokio::task::AbortHandle,
}

impl Follower {
    pub(super) async fn start(store: Arc<dyn Store>) -> Result<Self, berth_store::Error> {
        let (loaded, revision) = load(&*store).await?;
        let copy = Arc::new(RwLock::new(loaded));
        let (reached, receiver) = watch::channel(revision);
        let task = tokio::spawn(follow(store, Arc::clone(&copy), reached)).abort_handle();
        Ok(Self { copy, reached: receiver, task })
    }

    pub(super) fn read<R>(&self, look: impl FnOnce(&Copy) -> R) -> R {
        look(&self.copy.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the copy shows everything up to this revision.
    pub(super) async fn caught_up(&self, revision: Revision) -> Result<(), RecordsError> {
        let mut reached = self.reached.clone();
        match reached.wait_for(|reached| *reached >= revision).await {
            Ok(_) => Ok(()),
            Err(_) => Err(RecordsError::Store(berth_store::Error::Closed)),
        }
    }

    pub(super) fn stop(&self) {
        self.task.abort();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn load(store: &dyn Store) -> Result<(Copy, Revision), berth_store::Error> {
    let mut copy = Copy::new();
    let mut at = None;
    for prefix in
        copy.tables.iter().map(|table| table.prefix).chain([UniqueName::prefix()]).collect::<Vec<_>>()
    {
        let mut query = Query::prefix(prefix).limit(PAGE_ENTRIES);
        if let Some(revision) = at {
            query = query.at(revision);
        }
        loop {
            let page = store.list(query.clone()).await?;
            at = Some(page.revision);
            let last = page.entries.last().map(|entry| entry.key.clone());
            for entry in page.entries {
                copy.apply(&Change::Put(entry))?;
            }
            match last {
                Some(last) if page.more => query = query.at(page.revision).after(last),
                _ => break,
            }
        }
    }
    Ok((copy, at.unwrap_or(Revision::EMPTY_STORE)))
}

async fn follow(store: Arc<dyn Store>, copy: Arc<RwLock<Copy>>, reached: watch::Sender<Revision>) {
    loop {
        let from = reached.borrow().next();
        let mut commits = store.watch("/", from);
        let error = loop {
            match commits.next().await {
                Some(Ok(commit)) => {
                    let mut copy = copy.write().unwrap_or_else(PoisonError::into_inner);
                    for change in &commit.changes {
                        if let Err(error) = copy.apply(change) {
                            tracing::error!(%error, "a record was written that this version can't read");
                        }
                    }
                    drop(copy);
                    reached.send_replace(commit.revision);
                }
                Some(Err(error)) => break error,
                None => break berth_store::Error::Closed,
            }
        };
        if matches!(error, berth_store::Error::Closed) {
            return;
        }
        tracing::warn!(%error, "lost the store's watch: reading everything again");
        while let Err(error) = reload(&*store, &copy, &reached).await {
            tracing::error!(%error, "the records can't be read");
            tokio::time::sleep(RELOAD_AFTER).await;
        }
    }
}

async fn reload(
    store: &dyn Store,
    copy: &RwLock<Copy>,
    reached: &watch::Sender<Revision>,
) -> Result<(), berth_store::Error> {
    let (fresh, revision) = load(store).await?;
    copy.write().unwrap_or_else(PoisonError::into_inner).renew(fresh);
    reached.send_replace(revision);
    Ok(())
}
