//! A change to several records that is made whole or not at all.

use berth_store::{Condition, OPERATIONS_MAX, Operation};

use super::copy::Row;
use super::encode;
use super::name::UniqueName;
use super::noun::Record;

/// Conditions and changes, collected.
#[derive(Debug, Default, Clone)]
pub struct Transaction {
    conditions: Vec<Condition>,
    operations: Vec<Operation>,
}

impl Transaction {
    /// One that changes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a record that must not exist.
    pub fn create<T: Record>(&mut self, value: &T) {
        let key = key(value);
        self.conditions.push(Condition::absent(&*key));
        self.operations.push(Operation::put(key, encode(value)));
    }

    /// Writes a record that nobody has changed since `row` was read; says whether there is anything to write.
    pub fn replace<T: Record>(&mut self, row: &Row<T>, value: &T) -> bool {
        let (old, new) = (encode(&row.value), encode(value));
        self.unchanged(row);
        let differs = old != new;
        if differs {
            self.operations.push(Operation::put(row.key(), new));
        }
        differs
    }

    /// Removes a record that nobody has changed since `row` was read.
    pub fn remove<T: Record>(&mut self, row: &Row<T>) {
        self.unchanged(row);
        self.operations.push(Operation::delete(row.key()));
    }

    /// Requires that nobody has changed a record since `row` was read.
    pub fn unchanged<T: Record>(&mut self, row: &Row<T>) {
        self.conditions.push(Condition::unchanged(row.key(), row.revision));
    }

    /// Writes a record whatever was there.
    pub fn put<T: Record>(&mut self, value: &T) {
        self.operations.push(Operation::put(key(value), encode(value)));
    }

    /// Removes the record with this id, if there is one.
    pub fn forget<T: Record>(&mut self, id: &str) {
        self.operations.push(Operation::delete(format!("{}{id}", T::PREFIX)));
    }

    /// Takes a name, which must be free.
    pub fn claim(&mut self, name: &UniqueName, id: &str) {
        self.conditions.push(Condition::absent(name.key()));
        self.operations.push(Operation::put(name.key(), id.to_owned()));
    }

    /// Gives a name back.
    pub fn release(&mut self, name: &UniqueName) {
        self.operations.push(Operation::delete(name.key()));
    }

    /// Takes in all of another.
    pub fn join(&mut self, other: Self) {
        self.conditions.extend(other.conditions);
        self.operations.extend(other.operations);
    }

    /// Whether more would go over what a store takes at once.
    pub fn is_full(&self) -> bool {
        // A record mostly comes with its name, and the end of an operation needs a few places of its own.
        self.operations.len() + 8 > OPERATIONS_MAX || self.conditions.len() + 8 > OPERATIONS_MAX
    }

    pub(super) fn into_parts(self) -> (Vec<Condition>, Vec<Operation>) {
        (self.conditions, self.operations)
    }
}

fn key<T: Record>(value: &T) -> String {
    format!("{}{}", T::PREFIX, value.record_id())
}
