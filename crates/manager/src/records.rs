//! The cluster's records as types: what they are called in the store, how they are changed, how they are read.
//!
//! All changes are transactions ([`Transaction`]) that take a thing, its unique name and whatever else belongs to it
//! together. All reads of lists come from a copy in memory, because a list of two thousand VMs must not cost two
//! thousand reads. The copy follows the store's own watch rather than the callers of [`Records::commit`]: a caller
//! may be dropped between the change and its note of it (a client that hangs up), the watch misses nothing and sees
//! all changes in their one order. A commit returns only when the copy has got to it, so whoever changed something
//! reads it back.
//!
//! Another crate module adds a record type of its own by implementing [`Record`] and naming it in [`TABLES`].

mod copy;
mod find;
mod name;
mod transaction;

pub mod noun;
pub mod page;

use std::sync::Arc;

use berth_model::{Problem, ProblemCode};
use berth_store::{Revision, Store};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

pub use copy::Row;
pub use name::UniqueName;
pub use noun::{Debt, FixedPorts, ImagePlace, Record, RepositoryKeysRow, TABLES};
pub use page::page;
pub use transaction::Transaction;

use copy::Follower;

/// How often a change is tried again when others change the same record in between. That many in a row is not
/// contention but a mistake, which must not spin for ever.
const ATTEMPTS_MAX: usize = 256;

/// Why records could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The name belongs to another thing.
    #[error("the {noun} name '{name}' is taken")]
    Taken {
        /// Of what.
        noun: String,
        /// The name.
        name: String,
    },
    /// Somebody else changed it first; nothing was changed.
    #[error("{key} was changed by somebody else")]
    Conflict {
        /// The record's key.
        key: String,
    },
    /// There is no such record.
    #[error("there is no {noun} '{id}'")]
    Missing {
        /// Of what.
        noun: &'static str,
        /// Its id.
        id: String,
    },
    /// The store failed.
    #[error("the store failed")]
    Store(#[source] berth_store::Error),
}

impl From<RecordsError> for Problem {
    fn from(error: RecordsError) -> Self {
        match &error {
            RecordsError::Taken { noun, name } => Self::new(ProblemCode::AlreadyExists, error.to_string())
                .at("name", name, format!("a name that no other {noun} has")),
            RecordsError::Conflict { .. } => Self::new(ProblemCode::Busy, error.to_string()),
            RecordsError::Missing { noun, id } => Self::not_found(noun, id),
            RecordsError::Store(berth_store::Error::NoSpace { .. }) => {
                Self::new(ProblemCode::NoSpace, "the manager's disk is full: nothing can be recorded")
            }
            RecordsError::Store(cause) => Self::new(ProblemCode::Internal, format!("{error}: {cause}")),
        }
    }
}

/// All records of the cluster.
pub struct Records {
    store: Arc<dyn Store>,
    follower: Follower,
}

impl Records {
    /// Reads everything and begins to follow.
    ///
    /// # Errors
    /// When the store fails or holds what this version can't read.
    pub async fn open(store: Arc<dyn Store>) -> Result<Self, RecordsError> {
        let follower = Follower::start(Arc::clone(&store)).await.map_err(RecordsError::Store)?;
        Ok(Self { store, follower })
    }

    /// The store below, for records that are not kept in memory (audit).
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The record with this id.
    pub fn get<T: Record>(&self, id: &str) -> Option<Arc<Row<T>>> {
        self.follower.read(|copy| copy.get(id))
    }

    /// The record with this id, or the problem that there is none.
    ///
    /// # Errors
    /// [`ProblemCode::NotFound`].
    pub fn require<T: Record>(&self, id: &str) -> Result<Arc<Row<T>>, Problem> {
        self.get(id).ok_or_else(|| Problem::not_found(T::NOUN, id))
    }

    /// All records of a kind, by id.
    pub fn list<T: Record>(&self) -> Vec<Arc<Row<T>>> {
        self.follower.read(|copy| copy.list(""))
    }

    /// The records of a kind that `wanted` takes, by id; it must be quick.
    pub fn list_where<T: Record>(&self, wanted: impl Fn(&T) -> bool) -> Vec<Arc<Row<T>>> {
        self.follower.read(|copy| copy.list_where(wanted))
    }

    /// All records of a kind whose id begins with `prefix`, by id.
    pub fn list_below<T: Record>(&self, prefix: &str) -> Vec<Arc<Row<T>>> {
        self.follower.read(|copy| copy.list(prefix))
    }

    /// The id that has this name.
    pub fn id_of(&self, name: &UniqueName) -> Option<String> {
        self.follower.read(|copy| copy.id_of(&name.key()))
    }

    /// Turns over each time a record of this kind changes.
    pub fn changes<T: Record>(&self) -> watch::Receiver<u64> {
        self.follower.read(|copy| copy.changes::<T>())
    }

    /// How often a record of this kind has changed since the copy was read.
    pub fn change_count<T: Record>(&self) -> u64 {
        *self.changes::<T>().borrow()
    }

    /// Makes a transaction, and waits until the copy in memory shows it.
    ///
    /// # Errors
    /// What did not hold; then nothing was changed.
    pub async fn commit(&self, transaction: Transaction) -> Result<Revision, RecordsError> {
        let (conditions, operations) = transaction.into_parts();
        let revision = self.store.transact(conditions, operations).await.map_err(refused)?;
        self.follower.caught_up(revision).await?;
        Ok(revision)
    }

    /// Changes one record by a function, which is called again with the newer record when somebody else was quicker.
    /// A record that comes out as it went in is not written.
    ///
    /// # Errors
    /// What `change` refuses with; that there is no such record; that the store failed.
    pub async fn update<T, E>(
        &self,
        id: &str,
        mut change: impl FnMut(&mut T) -> Result<(), E>,
    ) -> Result<Arc<Row<T>>, E>
    where
        T: Record + Clone,
        E: From<RecordsError>,
    {
        for attempt in 0..ATTEMPTS_MAX {
            let known = if attempt == 0 { self.get(id) } else { None };
            let row = match known {
                Some(row) => row,
                None => self.fresh::<T>(id).await?,
            };
            let mut value = row.value.clone();
            change(&mut value)?;
            let mut transaction = Transaction::new();
            if !transaction.replace(&row, &value) {
                return Ok(row);
            }
            match self.commit(transaction).await {
                Ok(revision) => return Ok(Arc::new(Row { id: row.id.clone(), revision, value })),
                Err(RecordsError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(RecordsError::Conflict { key: format!("{}{id}", T::PREFIX) }.into())
    }

    /// Waits until the copy in memory shows everything that is in the store now: after a conflict, before the next try.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn catch_up(&self) -> Result<(), RecordsError> {
        let now = self.store.revision().await.map_err(RecordsError::Store)?;
        self.follower.caught_up(now).await
    }

    /// The record as the copy has it once it has got to everything that is in the store now.
    async fn fresh<T: Record>(&self, id: &str) -> Result<Arc<Row<T>>, RecordsError> {
        self.catch_up().await?;
        self.get(id).ok_or_else(|| RecordsError::Missing { noun: T::NOUN, id: id.to_owned() })
    }

    /// The next number of a counter, beginning with 1; numbers may be left out, never given twice.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn take_number(&self, counter: &str) -> Result<u64, RecordsError> {
        let key = counter_key(counter);
        for _ in 0..ATTEMPTS_MAX {
            let (last, revision) = self.counter(&key).await?;
            let next = last + 1;
            let conditions = vec![berth_store::Condition::unchanged(&*key, revision)];
            let operations = vec![berth_store::Operation::put(&*key, next.to_string())];
            match self.store.transact(conditions, operations).await.map_err(refused) {
                Ok(_) => return Ok(next),
                Err(RecordsError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(RecordsError::Conflict { key })
    }

    /// The number that a counter gave last; 0 if it never gave one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn peek_number(&self, counter: &str) -> Result<u64, RecordsError> {
        Ok(self.counter(&counter_key(counter)).await?.0)
    }

    async fn counter(&self, key: &str) -> Result<(u64, Revision), RecordsError> {
        match self.store.get(key).await.map_err(RecordsError::Store)? {
            Some(entry) => {
                let last = decode(key, &entry.value).map_err(RecordsError::Store)?;
                Ok((last, entry.mod_revision))
            }
            None => Ok((0, Revision::ABSENT)),
        }
    }

    /// Stops following; reads show what was last known.
    pub fn close(&self) {
        self.follower.stop();
    }
}

fn counter_key(counter: &str) -> String {
    format!("/meta/counters/{counter}")
}

/// What a refusal of the store means here.
fn refused(error: berth_store::Error) -> RecordsError {
    match error {
        berth_store::Error::Conflict { key, .. } => match UniqueName::noun_and_name(&key) {
            Some((noun, name)) => RecordsError::Taken { noun, name },
            None => RecordsError::Conflict { key },
        },
        other => RecordsError::Store(other),
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("records are plain data")
}

fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, berth_store::Error> {
    serde_json::from_slice(bytes).map_err(|source| berth_store::Error::Undecodable {
        key: key.to_owned(),
        expected: std::any::type_name::<T>(),
        source,
    })
}
