//! Records as types: JSON in the store, structs outside.
//!
//! One [`Records`] stands for all records of a kind, such as all VMs below `/vms/`. Fields that a newer version wrote
//! and this one does not know are lost when this one writes the record, unless the type keeps them
//! (`#[serde(flatten)]` over a map).

use std::any::type_name;
use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::store::{Condition, Entry, Operation, Query, Revision, Store};

/// How often [`Records::update_with`] starts over. Each time somebody else got further, so this many in a row is not
/// contention but a mistake, which must not spin for ever.
const ATTEMPTS_MAX: usize = 1024;

/// How many records are fetched at a time by [`Records::list`], so that one long list does not hold up other reads.
const PAGE_RECORDS: usize = 1000;

/// All records of type `T`, each under the same prefix and an id.
pub struct Records<'a, T> {
    store: &'a dyn Store,
    prefix: &'a str,
    kind: PhantomData<fn() -> T>,
}

/// A record and where it stands in history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versioned<T> {
    /// Its id: the key without the prefix.
    pub id: String,
    /// What it says.
    pub value: T,
    /// The revision of its last change; what an update is compared with, and an entity tag.
    pub revision: Revision,
}

impl<'a, T: Serialize + DeserializeOwned> Records<'a, T> {
    /// The records whose keys are `prefix` followed by an id; the prefix ends with a slash.
    pub fn new(store: &'a dyn Store, prefix: &'a str) -> Self {
        Self { store, prefix, kind: PhantomData }
    }

    /// The key of a record.
    pub fn key(&self, id: &str) -> String {
        format!("{}{id}", self.prefix)
    }

    /// The record, if it exists.
    pub async fn get(&self, id: &str) -> Result<Option<Versioned<T>>, Error> {
        let entry = self.store.get(&self.key(id)).await?;
        entry.map(|entry| self.decode(&entry)).transpose()
    }

    /// The record, or [`Error::NotFound`].
    pub async fn require(&self, id: &str) -> Result<Versioned<T>, Error> {
        self.get(id).await?.ok_or_else(|| Error::NotFound { key: self.key(id) })
    }

    /// Writes a record that must not exist yet; [`Error::Conflict`] if it does.
    pub async fn create(&self, id: &str, value: &T) -> Result<Revision, Error> {
        self.store.transact(vec![self.absent(id)], vec![self.put(id, value)?]).await
    }

    /// Writes a record that nobody has changed since `revision`; [`Error::Conflict`] if somebody has.
    pub async fn update(&self, id: &str, value: &T, revision: Revision) -> Result<Revision, Error> {
        self.store.transact(vec![self.unchanged(id, revision)], vec![self.put(id, value)?]).await
    }

    /// Deletes a record that nobody has changed since `revision`; [`Error::Conflict`] if somebody has.
    pub async fn delete(&self, id: &str, revision: Revision) -> Result<Revision, Error> {
        let operation = Operation::delete(self.key(id));
        self.store.transact(vec![self.unchanged(id, revision)], vec![operation]).await
    }

    /// Changes a record by a function of what it says, which is called again with the newer record when somebody
    /// else was quicker. A record that comes out as it went in is not written.
    ///
    /// Fails with what `change` fails with, and with [`Error::NotFound`].
    pub async fn update_with<E: From<Error>>(
        &self,
        id: &str,
        mut change: impl FnMut(&mut T) -> Result<(), E>,
    ) -> Result<Versioned<T>, E> {
        let key = self.key(id);
        let mut attempt = 0;
        loop {
            let entry = self.store.get(&key).await?.ok_or_else(|| Error::NotFound { key: key.clone() })?;
            let mut record = self.decode(&entry)?;
            change(&mut record.value)?;
            let bytes = self.encode(id, &record.value)?;
            if bytes == entry.value {
                return Ok(record);
            }
            let condition = self.unchanged(id, entry.mod_revision);
            match self.store.transact(vec![condition], vec![Operation::put(&*key, bytes)]).await {
                Ok(revision) => return Ok(Versioned { revision, ..record }),
                Err(Error::Conflict { .. }) if attempt < ATTEMPTS_MAX => attempt += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// All records in order of their ids, and the one revision at which all of them were read.
    pub async fn list(&self) -> Result<(Vec<Versioned<T>>, Revision), Error> {
        let mut query = Query::prefix(self.prefix).limit(PAGE_RECORDS);
        let mut records = Vec::new();
        loop {
            let page = self.store.list(query.clone()).await?;
            for entry in &page.entries {
                records.push(self.decode(entry)?);
            }
            match page.entries.last() {
                Some(last) if page.more => query = query.at(page.revision).after(&*last.key),
                _ => return Ok((records, page.revision)),
            }
        }
    }

    /// A page of records after an id (the first ones, if none is given), at an earlier page's revision or at the
    /// current one; and whether there are more.
    pub async fn page(
        &self,
        after: Option<&str>,
        limit: usize,
        at: Option<Revision>,
    ) -> Result<(Vec<Versioned<T>>, Revision, bool), Error> {
        let mut query = Query::prefix(self.prefix).limit(limit);
        query.after = after.map(|id| self.key(id));
        query.at = at;
        let page = self.store.list(query).await?;
        let records = page.entries.iter().map(|entry| self.decode(entry)).collect::<Result<_, _>>()?;
        Ok((records, page.revision, page.more))
    }

    /// For transactions over several records: this one must not exist.
    pub fn absent(&self, id: &str) -> Condition {
        Condition::absent(self.key(id))
    }

    /// For transactions over several records: nobody has changed this one since `revision`.
    pub fn unchanged(&self, id: &str, revision: Revision) -> Condition {
        Condition::unchanged(self.key(id), revision)
    }

    /// For transactions over several records: writes this one.
    pub fn put(&self, id: &str, value: &T) -> Result<Operation, Error> {
        Ok(Operation::put(self.key(id), self.encode(id, value)?))
    }

    /// For watches and lists: what an entry under the prefix says.
    pub fn decode(&self, entry: &Entry) -> Result<Versioned<T>, Error> {
        let value = serde_json::from_slice(&entry.value)
            .map_err(|source| Self::undecodable(entry.key.clone(), source))?;
        let id = entry.key.strip_prefix(self.prefix).unwrap_or(&entry.key).to_owned();
        Ok(Versioned { id, value, revision: entry.mod_revision })
    }

    fn encode(&self, id: &str, value: &T) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(value).map_err(|source| Self::undecodable(self.key(id), source))
    }

    fn undecodable(key: String, source: serde_json::Error) -> Error {
        Error::Undecodable { key, expected: type_name::<T>(), source }
    }
}

#[cfg(test)]
mod tests;
