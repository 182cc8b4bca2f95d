//! The file: made whole or not at all, owned by one store at a time, and looked through before it is trusted.
//!
//! A new store is built under another name, synced, and renamed. So a file under the right name always has its
//! tables, and an empty or half one is damage, never an occasion to start afresh.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::fault::{damage, fault};
use super::{rows, schema};
use crate::error::Error;

/// For others than us who may look at the file while it is in use, with the sqlite3 shell say.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// More than there are different statements, so that each is compiled once.
const STATEMENTS_KEPT: usize = 32;

/// What stays of the log file after a checkpoint. Smaller, and a burst allocates anew; larger only costs disk.
const LOG_BYTES_KEPT: i64 = 16 << 20;

/// An opened file: locked against all other stores until dropped.
pub(super) struct Opened {
    /// For the one thread that writes.
    pub writer: Connection,
    /// For the one thread that reads.
    pub reader: Connection,
    /// Held for as long as the file is in use.
    pub lock: File,
}

/// Opens the store at `path`, creating it if nothing is there.
pub(super) fn open(path: &Path) -> Result<Opened, Error> {
    let lock = lock(path)?;
    if !exists(path)? {
        create(path)?;
    }
    restrict(path)?;
    let mut writer = connect(path)?;
    check_header(&writer, path)?;
    check_pages(&writer, path)?;
    configure(&writer).map_err(|error| damage(path, "configure", error))?;
    schema::migrate(&mut writer, path, schema::MIGRATIONS)?;
    schema::check(&writer, path, schema::MIGRATIONS)?;
    rows::check_all(&writer, path)?;
    let reader = connect(path)?;
    reader.pragma_update(None, "query_only", true).map_err(|error| fault(path, "configure", error))?;
    Ok(Opened { writer, reader, lock })
}

/// The file's name with something appended.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// A second store on the file would write revisions that this one's watchers never hear of.
fn lock(path: &Path) -> Result<File, Error> {
    let lock_path = beside(path, ".lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(|error| system("open", &lock_path, error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(Error::InUse { path: path.to_owned() }),
        Err(errno) => Err(system("lock", &lock_path, errno.into())),
    }
}

fn exists(path: &Path) -> Result<bool, Error> {
    let here = |path: &Path| path.try_exists().map_err(|error| system("look at", path, error));
    if here(path)? {
        return Ok(true);
    }
    if here(&beside(path, "-wal"))? {
        let detail = "its log is there and the file itself is gone".to_owned();
        return Err(Error::Corrupt { path: path.to_owned(), detail });
    }
    Ok(false)
}

fn create(path: &Path) -> Result<(), Error> {
    let draft = beside(path, ".new");
    for leftover in [draft.clone(), beside(&draft, "-journal")] {
        match std::fs::remove_file(&leftover) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(system("remove", &leftover, error));
            }
            _ => {}
        }
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(|error| system("create", &draft, error))?;
    fill(&draft)?;
    file.sync_all().map_err(|error| system("sync", &draft, error))?;
    std::fs::rename(&draft, path).map_err(|error| system("create", path, error))?;
    sync_directory_of(path)
}

fn fill(draft: &Path) -> Result<(), Error> {
    let mut connection = connect(draft)?;
    schema::migrate(&mut connection, draft, schema::MIGRATIONS)?;
    rows::begin(&connection)
        .and_then(|()| connection.pragma_update(None, "application_id", schema::APPLICATION_ID))
        .map_err(|error| fault(draft, "write", error))?;
    connection.close().map_err(|(_, error)| fault(draft, "close", error))
}

/// Without this a rename may be undone by a power cut, and all that was written afterwards with it.
fn sync_directory_of(path: &Path) -> Result<(), Error> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| system("sync", directory, error))
}

/// The records name users and hold hashes of their tokens: nobody else's business. The log inherits this mode.
fn restrict(path: &Path) -> Result<(), Error> {
    let metadata = std::fs::metadata(path).map_err(|error| system("look at", path, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), mode = format!("{mode:o}"), "the store was open to others, closing it");
        std::fs::set_permissions(path, Permissions::from_mode(0o600))
            .map_err(|error| system("restrict", path, error))?;
    }
    Ok(())
}

fn connect(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(path, flags)
        .and_then(|connection| {
            connection.set_prepared_statement_cache_capacity(STATEMENTS_KEPT);
            connection.busy_timeout(BUSY_TIMEOUT).map(|()| connection)
        })
        .map_err(|error| fault(path, "open", error))
}

/// Tells other people's databases, and versions from the future, from damaged stores.
fn check_header(connection: &Connection, path: &Path) -> Result<(), Error> {
    let id: i64 = connection
        .pragma_query_value(None, "application_id", |row| row.get(0))
        .map_err(|error| damage(path, "read", error))?;
    if id != schema::APPLICATION_ID {
        let detail = format!("it is not a store's file (application id {id:#x})");
        return Err(Error::Corrupt { path: path.to_owned(), detail });
    }
    let known = i64::try_from(schema::MIGRATIONS.len()).expect("migrations are written by hand");
    match schema::version(connection, path)? {
        found if found > known => Err(Error::NewerSchema { path: path.to_owned(), found, known }),
        found if found < 1 => {
            Err(Error::Corrupt { path: path.to_owned(), detail: format!("schema version {found}") })
        }
        _ => Ok(()),
    }
}

/// The thorough check and not the quick one: the quick one leaves out whether indexes agree with their tables.
fn check_pages(connection: &Connection, path: &Path) -> Result<(), Error> {
    let verdict: String = connection
        .pragma_query_value(None, "integrity_check", |row| row.get(0))
        .map_err(|error| damage(path, "check", error))?;
    if verdict != "ok" {
        return Err(Error::Corrupt { path: path.to_owned(), detail: verdict });
    }
    Ok(())
}

fn configure(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.pragma_update(None, "journal_mode", "wal")?;
    // The log is synced with every commit: what is acknowledged survives a power cut.
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT)?;
    // A damaged schema must not be able to call anything.
    connection.pragma_update(None, "trusted_schema", false)
}

fn system(doing: &'static str, path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    if matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge) {
        return Error::NoSpace { path: path.to_owned() };
    }
    Error::Io { doing, path: path.to_owned(), source: Box::new(error) }
}
