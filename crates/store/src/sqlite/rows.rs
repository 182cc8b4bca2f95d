//! Rows: how an entry becomes one, how one becomes an entry again, and the seal that must hold in between.

use std::path::Path;

use bytes::Bytes;
use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, Type, ValueRef};
use rusqlite::{Connection, Error as Sql, OptionalExtension, Row, params};

use super::fault::fault;
use crate::error::Error;
use crate::limits::{lower_bound, prefix_end};
use crate::store::{Change, Commit, Entry, Lease, LeaseId, Query, Revision};

/// The columns of both `entry` and `change`, in the order in which [`read_entry`] and [`read_change`] take them.
const ENTRY: &str = "key, value, create_revision, mod_revision, version, lease, seal";
const CHANGE: &str = "key, value, create_revision, revision, version, lease, seal";

const VALUES: &str = "VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";

/// What becomes of an entry that is there already.
const REPLACE: &str = "ON CONFLICT (key) DO UPDATE SET value = ?2, create_revision = ?3, mod_revision = ?4,
    version = ?5, lease = ?6, seal = ?7";

/// The store's one row of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// The revision of the last transaction.
    pub revision: Revision,
    /// States before this one can't be read any more.
    pub compacted: Revision,
    /// The lease that was granted last.
    pub last_lease: u64,
}

impl Head {
    fn seal(self) -> i64 {
        Seal::new("meta").number(self.revision.0).number(self.compacted.0).number(self.last_lease).end()
    }
}

/// Writes the first row of a new store.
pub(super) fn begin(connection: &Connection) -> Result<(), Sql> {
    let head = Head { revision: Revision::EMPTY_STORE, compacted: Revision::ABSENT, last_lease: 0 };
    connection.execute("INSERT INTO meta VALUES (1, 0, 0, 0, 0)", [])?;
    write_head(connection, head)
}

pub(super) fn head(connection: &Connection) -> Result<Head, Sql> {
    connection
        .prepare_cached("SELECT revision, compacted, last_lease, seal FROM meta WHERE only = 1")?
        .query_row([], |row| {
            let last_lease: LeaseId = row.get(2)?;
            let head = Head { revision: row.get(0)?, compacted: row.get(1)?, last_lease: last_lease.0 };
            verify("the store's head", head.seal(), row.get(3)?)?;
            Ok(head)
        })
}

pub(super) fn write_head(connection: &Connection, head: Head) -> Result<(), Sql> {
    connection
        .prepare_cached(
            "UPDATE meta SET revision = ?1, compacted = ?2, last_lease = ?3, seal = ?4 WHERE only = 1",
        )?
        .execute(params![head.revision, head.compacted, LeaseId(head.last_lease), head.seal()])?;
    Ok(())
}

pub(super) fn get(connection: &Connection, key: &str) -> Result<Option<Entry>, Sql> {
    connection
        .prepare_cached(&format!("SELECT {ENTRY} FROM entry WHERE key = ?1"))?
        .query_row([key], read_entry)
        .optional()
}

/// The entries that `query` asks for as they are now, at most `rows_max`.
pub(super) fn list_now(connection: &Connection, query: &Query, rows_max: i64) -> Result<Vec<Entry>, Sql> {
    connection
        .prepare_cached(&format!(
            "SELECT {ENTRY} FROM entry WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT ?3"
        ))?
        .query_map(params![lower_bound(query), End(&query.prefix), rows_max], read_entry)?
        .collect()
}

/// The same as they were at an earlier revision.
pub(super) fn list_at(
    connection: &Connection,
    query: &Query,
    revision: Revision,
    rows_max: i64,
) -> Result<Vec<Entry>, Sql> {
    // No grouping: it would have to go through everything and sort it before the first row comes out.
    let sql = format!(
        "SELECT {CHANGE} FROM change
         WHERE key >= ?1 AND key < ?2 AND revision <= ?4 AND value IS NOT NULL AND NOT EXISTS (
             SELECT 1 FROM change AS newer
             WHERE newer.key = change.key AND newer.revision > change.revision AND newer.revision <= ?4)
         ORDER BY key LIMIT ?3"
    );
    connection
        .prepare_cached(&sql)?
        .query_map(params![lower_bound(query), End(&query.prefix), rows_max, revision], read_entry)?
        .collect()
}

/// Commits from `from` on with what they changed under `prefix`. Stops between two commits once `changes_max` were
/// read, and returns the last commit's revision if it stopped.
pub(super) fn commits(
    connection: &Connection,
    prefix: &str,
    from: Revision,
    changes_max: usize,
) -> Result<(Vec<Commit>, Option<Revision>), Sql> {
    let mut statement = connection.prepare_cached(&format!(
        "SELECT {CHANGE} FROM change WHERE revision >= ?1 AND key >= ?2 AND key < ?3 ORDER BY revision, id"
    ))?;
    let mut rows = statement.query(params![from, prefix, End(prefix)])?;
    let mut commits: Vec<Commit> = Vec::new();
    let mut count = 0;
    while let Some(row) = rows.next()? {
        let (revision, change) = read_change(row)?;
        match commits.last_mut() {
            Some(commit) if commit.revision == revision => commit.changes.push(change),
            Some(commit) if count >= changes_max => {
                let last = commit.revision;
                return Ok((commits, Some(last)));
            }
            _ => commits.push(Commit { revision, changes: vec![change] }),
        }
        count += 1;
    }
    Ok((commits, None))
}

/// Writes a change into the present and into history.
pub(super) fn write_change(connection: &Connection, revision: Revision, change: &Change) -> Result<(), Sql> {
    match change {
        Change::Put(entry) => {
            write_put(connection, &format!("INSERT INTO entry ({ENTRY}) {VALUES} {REPLACE}"), entry)?;
            write_put(connection, &format!("INSERT INTO change ({CHANGE}) {VALUES}"), entry)
        }
        Change::Delete { key } => {
            connection.prepare_cached("DELETE FROM entry WHERE key = ?1")?.execute([key])?;
            connection
                .prepare_cached(&format!(
                    "INSERT INTO change ({CHANGE}) VALUES (?1, NULL, 0, ?2, 0, NULL, ?3)"
                ))?
                .execute(params![key, revision, seal_delete(key, revision)])?;
            Ok(())
        }
    }
}

fn write_put(connection: &Connection, sql: &str, entry: &Entry) -> Result<(), Sql> {
    connection.prepare_cached(sql)?.execute(params![
        entry.key,
        &entry.value[..],
        entry.create_revision,
        entry.mod_revision,
        Revision(entry.version),
        entry.lease,
        seal_entry(entry)
    ])?;
    Ok(())
}

pub(super) fn keys_of_lease(connection: &Connection, id: LeaseId) -> Result<Vec<String>, Sql> {
    connection
        .prepare_cached("SELECT key FROM entry WHERE lease = ?1 ORDER BY key")?
        .query_map([id], |row| row.get(0))?
        .collect()
}

pub(super) fn lease(connection: &Connection, id: LeaseId) -> Result<Option<Lease>, Sql> {
    if i64::try_from(id.0).is_err() {
        return Ok(None); // a caller's invention: no lease ever had such an id
    }
    connection
        .prepare_cached("SELECT id, ttl_ms, seal FROM lease WHERE id = ?1")?
        .query_row([id], read_lease)
        .optional()
}

pub(super) fn leases(connection: &Connection) -> Result<Vec<Lease>, Sql> {
    connection.prepare("SELECT id, ttl_ms, seal FROM lease")?.query_map([], read_lease)?.collect()
}

pub(super) fn write_lease(connection: &Connection, lease: Lease) -> Result<(), Sql> {
    let ttl_ms = ttl_ms(lease);
    connection
        .prepare_cached("INSERT INTO lease (id, ttl_ms, seal) VALUES (?1, ?2, ?3)")?
        .execute(params![lease.id, Revision(ttl_ms), seal_lease(lease)])?;
    Ok(())
}

pub(super) fn delete_lease(connection: &Connection, id: LeaseId) -> Result<(), Sql> {
    connection.prepare_cached("DELETE FROM lease WHERE id = ?1")?.execute([id])?;
    Ok(())
}

/// Forgets what no state from `revision` on needs: versions that were replaced by then, and deletions.
pub(super) fn forget(connection: &Connection, revision: Revision) -> Result<(), Sql> {
    connection.execute(
        "DELETE FROM change WHERE revision <= ?1 AND (value IS NULL OR EXISTS (
             SELECT 1 FROM change AS newer
             WHERE newer.key = change.key AND newer.revision > change.revision AND newer.revision <= ?1))",
        [revision],
    )?;
    Ok(())
}

/// Reads every row once, so that damage is found at the start and not when the record is needed.
pub(super) fn check_all(connection: &Connection, path: &Path) -> Result<(), Error> {
    let broken = |error| fault(path, "check", error);
    let head = head(connection).map_err(broken)?;
    leases(connection).map_err(broken)?;
    let mut entries = connection.prepare(&format!("SELECT {ENTRY} FROM entry")).map_err(broken)?;
    for entry in entries.query_map([], read_entry).map_err(broken)? {
        entry.map_err(broken)?;
    }
    let mut changes = connection.prepare(&format!("SELECT {CHANGE} FROM change")).map_err(broken)?;
    for change in changes.query_map([], read_change).map_err(broken)? {
        change.map_err(broken)?;
    }
    let strays = strays(connection, head).map_err(broken)?;
    if strays != 0 {
        let detail = format!("history and entries disagree in {strays} places");
        return Err(Error::Corrupt { path: path.to_owned(), detail });
    }
    Ok(())
}

/// Counts entries that history does not know, keys that history knows and the present does not, and revisions
/// without a change: whole rows that went missing break no seal.
fn strays(connection: &Connection, head: Head) -> Result<i64, Sql> {
    let kept_from = head.compacted.max(Revision::EMPTY_STORE);
    let present: i64 = connection.query_row(
        "SELECT count(*) FROM entry LEFT JOIN change
             ON change.key = entry.key AND change.revision = entry.mod_revision AND change.seal = entry.seal
         WHERE change.key IS NULL",
        [],
        |row| row.get(0),
    )?;
    let past: i64 = connection.query_row(
        "SELECT count(*) FROM (SELECT key, max(revision) AS latest FROM change GROUP BY key) AS last
         JOIN change ON change.key = last.key AND change.revision = latest
         LEFT JOIN entry ON entry.key = last.key
         WHERE (change.value IS NULL) != (entry.key IS NULL) OR latest > ?1",
        [head.revision],
        |row| row.get(0),
    )?;
    let gaps: i64 = connection.query_row(
        "SELECT abs(?1 - ?2 - (SELECT count(DISTINCT revision) FROM change WHERE revision > ?2))",
        params![head.revision, kept_from],
        |row| row.get(0),
    )?;
    Ok(present + past + gaps)
}

fn read_entry(row: &Row<'_>) -> Result<Entry, Sql> {
    let entry = Entry {
        key: row.get(0)?,
        value: Bytes::from(row.get::<_, Vec<u8>>(1)?),
        create_revision: row.get(2)?,
        mod_revision: row.get(3)?,
        version: row.get::<_, Revision>(4)?.0,
        lease: row.get(5)?,
    };
    verify(&entry.key, seal_entry(&entry), row.get(6)?)?;
    Ok(entry)
}

fn read_change(row: &Row<'_>) -> Result<(Revision, Change), Sql> {
    let revision: Revision = row.get(3)?;
    if row.get_ref(1)? != ValueRef::Null {
        return Ok((revision, Change::Put(read_entry(row)?)));
    }
    let key: String = row.get(0)?;
    verify(&key, seal_delete(&key, revision), row.get(6)?)?;
    Ok((revision, Change::Delete { key }))
}

fn read_lease(row: &Row<'_>) -> Result<Lease, Sql> {
    let ttl_ms = row.get::<_, Revision>(1)?.0;
    let lease = Lease { id: row.get(0)?, ttl: std::time::Duration::from_millis(ttl_ms) };
    verify("a lease", seal_lease(lease), row.get(2)?)?;
    Ok(lease)
}

fn ttl_ms(lease: Lease) -> u64 {
    u64::try_from(lease.ttl.as_millis()).unwrap_or(u64::MAX)
}

fn seal_entry(entry: &Entry) -> i64 {
    Seal::new("put")
        .bytes(entry.key.as_bytes())
        .bytes(&entry.value)
        .number(entry.create_revision.0)
        .number(entry.mod_revision.0)
        .number(entry.version)
        .number(entry.lease.map_or(0, |id| id.0))
        .end()
}

fn seal_delete(key: &str, revision: Revision) -> i64 {
    Seal::new("delete").bytes(key.as_bytes()).number(revision.0).end()
}

fn seal_lease(lease: Lease) -> i64 {
    Seal::new("lease").number(lease.id.0).number(ttl_ms(lease)).end()
}

/// A checksum over a row's fields. It finds accidents; who can write the file can write seals as well.
struct Seal(blake3::Hasher);

impl Seal {
    fn new(kind: &str) -> Self {
        Self(blake3::Hasher::new()).bytes(kind.as_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        self
    }

    fn number(mut self, number: u64) -> Self {
        self.0.update(&number.to_le_bytes());
        self
    }

    fn end(self) -> i64 {
        let mut first = [0; size_of::<i64>()];
        self.0.finalize_xof().fill(&mut first);
        i64::from_le_bytes(first)
    }
}

fn verify(what: &str, expected: i64, found: i64) -> Result<(), Sql> {
    if expected == found {
        return Ok(());
    }
    let cause = format!("{what} does not match its seal");
    Err(Sql::FromSqlConversionFailure(0, Type::Null, cause.into()))
}

/// The end of a prefix as a bound: where no string is large enough a blob is, which sorts after all text.
struct End<'a>(&'a str);

impl ToSql for End<'_> {
    fn to_sql(&self) -> Result<ToSqlOutput<'_>, Sql> {
        Ok(match prefix_end(self.0) {
            Some(end) => ToSqlOutput::from(end),
            None => ToSqlOutput::Borrowed(ValueRef::Blob(&[])),
        })
    }
}

impl ToSql for Revision {
    fn to_sql(&self) -> Result<ToSqlOutput<'_>, Sql> {
        number_to_sql(self.0)
    }
}

impl FromSql for Revision {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        number_from_sql(value).map(Self)
    }
}

impl ToSql for LeaseId {
    fn to_sql(&self) -> Result<ToSqlOutput<'_>, Sql> {
        number_to_sql(self.0)
    }
}

impl FromSql for LeaseId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        number_from_sql(value).map(Self)
    }
}

fn number_to_sql(number: u64) -> Result<ToSqlOutput<'static>, Sql> {
    let number = i64::try_from(number).map_err(|error| Sql::ToSqlConversionFailure(error.into()))?;
    Ok(ToSqlOutput::from(number))
}

fn number_from_sql(value: ValueRef<'_>) -> FromSqlResult<u64> {
    let number = value.as_i64()?;
    u64::try_from(number).map_err(|_| FromSqlError::OutOfRange(number))
}
