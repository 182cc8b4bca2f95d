//! Where a repository's files are: a few named files, written once, read whole or in part.
//!
//! Three kinds of places offer the same five calls. The layout above them is restic's ([`backend`]): `config`, `keys/`,
//! `snapshots/`, `index/`, `locks/` and `data/<two digits>/`.
//!
//! A write is whole or not there: its name appears when all of it is on the disk.

use std::fmt::Display;
use std::io;
use std::ops::Range;

use berth_model::repository::{Location, RepositoryAccess};
use bytes::Bytes;

pub mod backend;
mod directory;
mod s3;
mod sftp;

/// A place that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It can't be reached, or does not do what is asked.
    #[error("{what} at {place} failed: {detail}")]
    Failed {
        /// Which place.
        place: String,
        /// What was tried.
        what: String,
        /// Why it failed.
        detail: String,
    },
    /// It does not do what is asked, and would not if it were asked again.
    #[error("{what} at {place} was refused: {detail}")]
    Refused {
        /// Which place.
        place: String,
        /// What was tried.
        what: String,
        /// What it said.
        detail: String,
    },
    /// There is no such file.
    #[error("{what} at {place} failed: there is no such file")]
    Missing {
        /// Which place.
        place: String,
        /// What was tried.
        what: String,
    },
    /// It is full.
    #[error("{place} is full: {what} failed")]
    NoSpace {
        /// Which place.
        place: String,
        /// What was tried.
        what: String,
    },
}

impl StoreError {
    fn io(place: &str, what: String) -> impl FnOnce(io::Error) -> Self + use<> {
        let place = place.to_owned();
        move |error| match error.kind() {
            io::ErrorKind::NotFound => Self::Missing { place, what },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { place, what },
            _ => Self::Failed { place, what, detail: error.to_string() },
        }
    }

    fn refused(place: &str, what: &str, detail: &dyn Display) -> Self {
        Self::Refused { place: place.to_owned(), what: what.to_owned(), detail: detail.to_string() }
    }

    fn failed(place: &str, what: &str, detail: &dyn Display) -> Self {
        Self::Failed { place: place.to_owned(), what: what.to_owned(), detail: detail.to_string() }
    }
}

/// A place with files. Paths are relative, of plain names joined by `/`.
pub(crate) trait Store: Send + Sync + 'static {
    /// What it is called, without anything secret.
    fn place(&self) -> &str;

    /// Makes it ready for a new repository.
    fn create(&self) -> Result<(), StoreError>;

    /// The files below a directory, at any depth, by their last names, with their lengths; none if there is no such directory.
    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError>;

    /// The length of a file; none if there is none.
    fn length(&self, path: &str) -> Result<Option<u64>, StoreError>;

    /// A file, or a part of it.
    fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError>;

    /// Writes a file: whole, or not at all.
    fn write(&self, path: &str, parts: &[Bytes]) -> Result<(), StoreError>;

    /// Removes a file; nothing if there is none.
    fn remove(&self, path: &str) -> Result<(), StoreError>;
}

/// Goes to a place.
pub(crate) fn open(access: &RepositoryAccess) -> Result<Box<dyn Store>, StoreError> {
    Ok(match &access.url {
        Location::Directory(path) => Box::new(directory::Directory::new(path.as_ref())),
        Location::Sftp(address) => Box::new(sftp::Sftp::new(address, &access.keys)?),
        Location::S3(address) => Box::new(s3::S3::new(address, &access.keys)?),
    })
}
