//! From what SQLite says to what a caller can act on: full, damaged, or the system's refusal.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rusqlite::{Error as Sql, ErrorCode, ffi};

use super::file::beside;
use crate::error::Error;

/// Says what an error of SQLite means for the store at `path`, which was busy `doing` something.
pub(super) fn fault(path: &Path, doing: &'static str, error: Sql) -> Error {
    let owned = path.to_owned();
    match &error {
        Sql::SqliteFailure(cause, _) => match cause.code {
            ErrorCode::DiskFull => Error::NoSpace { path: owned },
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => {
                Error::Corrupt { path: owned, detail: error.to_string() }
            }
            _ if cause.extended_code == ffi::SQLITE_IOERR_SHORT_READ => {
                Error::Corrupt { path: owned, detail: "it was cut short".to_owned() }
            }
            _ if cause.extended_code == ffi::SQLITE_IOERR_WRITE && !can_grow(path) => {
                Error::NoSpace { path: owned }
            }
            _ => Error::Io { doing, path: owned, source: Box::new(error) },
        },
        // A statement of ours found a row that no statement of ours writes.
        Sql::FromSqlConversionFailure(_, _, cause) => {
            Error::Corrupt { path: owned, detail: cause.to_string() }
        }
        Sql::IntegralValueOutOfRange(..)
        | Sql::InvalidColumnType(..)
        | Sql::Utf8Error(..)
        | Sql::QueryReturnedNoRows => Error::Corrupt { path: owned, detail: error.to_string() },
        _ => Error::Io { doing, path: owned, source: Box::new(error) },
    }
}

/// The same for statements that can't be wrong themselves, such as asking for the schema's version: when SQLite calls
/// them an error in general, it means the file.
pub(super) fn damage(path: &Path, doing: &'static str, error: Sql) -> Error {
    if error.sqlite_error().is_some_and(|cause| cause.extended_code == ffi::SQLITE_ERROR) {
        return Error::Corrupt { path: path.to_owned(), detail: error.to_string() };
    }
    fault(path, doing, error)
}

/// SQLite calls a disk full only when the system says ENOSPC, and keeps the errno to itself. A quota or a file size
/// limit hits us all the same, so after a failed write a file as long as the log is tried.
fn can_grow(path: &Path) -> bool {
    let probe = beside(path, ".probe");
    let log_bytes = std::fs::metadata(beside(path, "-wal")).map_or(0, |log| log.len());
    let result = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&probe)
        .and_then(|file| write_at_end(file, log_bytes));
    // Nobody is helped by an error about a file of which nothing is needed.
    let _ = std::fs::remove_file(&probe);
    !matches!(
        result.map_err(|error| error.kind()),
        Err(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
    )
}

fn write_at_end(mut file: File, offset: u64) -> Result<(), std::io::Error> {
    const PROBE_BYTES: usize = 64 << 10;
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(&[1; PROBE_BYTES])?;
    file.sync_all()
}
