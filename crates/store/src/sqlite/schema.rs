//! The tables, and how a file of an older version gets them.
//!
//! Two copies of the present are kept on purpose: `entry` answers gets and lists by one scan, `change` is the history
//! for watches and for lists at an earlier revision. Both have row ids although their keys would do: without, SQLite
//! gives every row of a kilobyte a page of its own, and the file is four times as large. Every row carries a seal, because SQLite has no checksums of its
//! own for what lies in the main file, and a record that changed by itself must not be taken for what was written.

use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};

use super::fault::{damage, fault};
use crate::error::Error;

/// Says "a Berth store" in the file's header: the letters BRTH.
pub(super) const APPLICATION_ID: i64 = 0x4252_5448;

/// Step n makes schema n + 1 out of schema n. Steps that have been released are never edited.
pub(super) const MIGRATIONS: &[&str] = &["
    CREATE TABLE meta (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        revision INTEGER NOT NULL,
        compacted INTEGER NOT NULL,
        last_lease INTEGER NOT NULL,
        seal INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE entry (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        value BLOB NOT NULL,
        create_revision INTEGER NOT NULL,
        mod_revision INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lease INTEGER,
        seal INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX entry_by_lease ON entry (lease) WHERE lease IS NOT NULL;
    CREATE TABLE change (
        id INTEGER PRIMARY KEY,
        revision INTEGER NOT NULL,
        key TEXT NOT NULL,
        value BLOB,
        create_revision INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lease INTEGER,
        seal INTEGER NOT NULL,
        UNIQUE (key, revision)
    ) STRICT;
    CREATE INDEX change_by_revision ON change (revision);
    CREATE TABLE lease (
        id INTEGER PRIMARY KEY,
        ttl_ms INTEGER NOT NULL,
        seal INTEGER NOT NULL
    ) STRICT;
"];

/// Brings the schema from whatever older version it has to the newest, each step whole or not at all.
///
/// Fails with [`Error::NewerSchema`] if the file is from the future.
pub(super) fn migrate(connection: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), Error> {
    let known = i64::try_from(migrations.len()).expect("migrations are written by hand");
    let found = version(connection, path)?;
    if found > known {
        return Err(Error::NewerSchema { path: path.to_owned(), found, known });
    }
    let done = usize::try_from(found)
        .map_err(|_| Error::Corrupt { path: path.to_owned(), detail: format!("schema version {found}") })?;
    for (step, sql) in migrations.iter().enumerate().skip(done) {
        apply(connection, step + 1, sql).map_err(|error| fault(path, "migrate", error))?;
    }
    Ok(())
}

fn apply(connection: &mut Connection, version: usize, sql: &str) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute_batch(sql)?;
    transaction.pragma_update(None, "user_version", i64::try_from(version).expect("a small number"))?;
    transaction.commit()
}

/// The schema version that the file says it has; 0 for a file in which nothing was ever made.
pub(super) fn version(connection: &Connection, path: &Path) -> Result<i64, Error> {
    connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(|error| damage(path, "read", error))
}

/// Refuses tables that are not what the migrations make: nothing below could be relied on.
pub(super) fn check(connection: &Connection, path: &Path, migrations: &[&str]) -> Result<(), Error> {
    let expected = fresh(migrations).map_err(|error| fault(path, "build the schema to compare", error))?;
    let found = describe(connection).map_err(|error| damage(path, "read the schema of", error))?;
    if found != expected {
        let detail = "its tables are not those that this program makes".to_owned();
        return Err(Error::Corrupt { path: path.to_owned(), detail });
    }
    Ok(())
}

fn fresh(migrations: &[&str]) -> Result<Vec<(String, String)>, rusqlite::Error> {
    let connection = Connection::open_in_memory()?;
    for sql in migrations {
        connection.execute_batch(sql)?;
    }
    describe(&connection)
}

fn describe(connection: &Connection) -> Result<Vec<(String, String)>, rusqlite::Error> {
    // Names that begin so are SQLite's own, such as the statistics an administrator may have had gathered.
    let sql =
        "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name";
    connection.prepare(sql)?.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: &[&str] = &[
        "CREATE TABLE one (a INTEGER)",
        "ALTER TABLE one ADD COLUMN b TEXT",
        "CREATE TABLE three (c INTEGER)",
    ];

    #[test]
    fn migrations_run_in_order_from_whatever_version_is_there() {
        let path = Path::new("test");
        for start in 0..=STEPS.len() {
            let mut connection = Connection::open_in_memory().unwrap();
            migrate(&mut connection, path, &STEPS[..start]).unwrap();
            migrate(&mut connection, path, STEPS).unwrap();
            assert_eq!(version(&connection, path).unwrap(), 3, "from {start}");
            check(&connection, path, STEPS).unwrap();
        }
    }

    #[test]
    fn a_migration_that_fails_leaves_the_version_before_it() {
        let path = Path::new("test");
        let mut connection = Connection::open_in_memory().unwrap();
        let broken = &[STEPS[0], "CREATE TABLE two (a INTEGER); CREATE TABLE one (a INTEGER)"];
        migrate(&mut connection, path, broken).unwrap_err();
        assert_eq!(version(&connection, path).unwrap(), 1);
        check(&connection, path, &STEPS[..1]).unwrap();
    }

    #[test]
    fn a_schema_from_the_future_is_refused_untouched() {
        let path = Path::new("test");
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, path, STEPS).unwrap();
        let error = migrate(&mut connection, path, &STEPS[..1]).unwrap_err();
        assert!(matches!(error, Error::NewerSchema { found: 3, known: 1, .. }), "{error}");
        check(&connection, path, STEPS).unwrap();
    }

    #[test]
    fn tables_that_were_tampered_with_are_refused() {
        let path = Path::new("test");
        let mut connection = Connection::open_in_memory().unwrap();
        migrate(&mut connection, path, STEPS).unwrap();
        connection.execute_batch("ALTER TABLE one RENAME COLUMN b TO c").unwrap();
        assert!(matches!(check(&connection, path, STEPS), Err(Error::Corrupt { .. })));
    }
}
