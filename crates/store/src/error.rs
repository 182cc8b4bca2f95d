//! Everything that can go wrong, with what a caller needs to react or to tell.

use std::path::PathBuf;

use crate::store::{LeaseId, Revision};

/// Why a verb of the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A condition of a transaction did not hold; nothing was changed.
    #[error("{key} was to be at revision {expected} and is at {found} (0 means absent)")]
    Conflict {
        /// The first key whose condition failed.
        key: String,
        /// The revision that the condition named.
        expected: Revision,
        /// The key's `mod_revision`; [`Revision::ABSENT`] if it does not exist.
        found: Revision,
    },

    /// History from the asked revision on is no longer kept.
    #[error("revision {asked} is compacted, the oldest that can be asked for is {oldest}")]
    Compacted {
        /// The revision that was asked for.
        asked: Revision,
        /// The oldest that the same verb can answer for.
        oldest: Revision,
    },

    /// The caller handed in what no store takes; nothing was changed.
    #[error("{field} is {value}, expected {expected}")]
    Invalid {
        /// What was wrong, such as `key`.
        field: &'static str,
        /// What was handed in, shortened if long.
        value: String,
        /// What would have been accepted.
        expected: String,
    },

    /// There is no such lease: it expired, was revoked, or never was.
    #[error("lease {id} does not exist or has ended")]
    LeaseNotFound {
        /// The lease that was named.
        id: LeaseId,
    },

    /// There is no record under this key, where one is needed to go on.
    #[error("{key} does not exist")]
    NotFound {
        /// The key that was named.
        key: String,
    },

    /// A record's value can't be read as, or written from, the type that the caller gave.
    #[error("the record at {key} is not a {expected}")]
    Undecodable {
        /// Where it stands.
        key: String,
        /// The name of the type.
        expected: &'static str,
        /// What the decoder stumbled over.
        #[source]
        source: serde_json::Error,
    },

    /// The stored data is damaged. The file is left as it is.
    #[error("{} is damaged: {detail}", path.display())]
    Corrupt {
        /// The store's file.
        path: PathBuf,
        /// What is wrong and, if known, where.
        detail: String,
    },

    /// The store was written by a newer version of this program.
    #[error("{} has schema {found}, this program knows schemas up to {known}", path.display())]
    NewerSchema {
        /// The store's file.
        path: PathBuf,
        /// The file's schema version.
        found: i64,
        /// The newest that is known here.
        known: i64,
    },

    /// Another process, or another store of this one, has the file open.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The store's file.
        path: PathBuf,
    },

    /// The disk, or what we may use of it, is full. Nothing was changed; the store goes on when there is room again.
    #[error("no space left to write {}", path.display())]
    NoSpace {
        /// The store's file.
        path: PathBuf,
    },

    /// The operating system refused. A change may or may not have been made.
    #[error("can't {doing} {}", path.display())]
    Io {
        /// What was tried, as in "can't open …".
        doing: &'static str,
        /// The file it was tried on.
        path: PathBuf,
        /// What the system or the database said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The store was closed or stopped after a failed write. A change in flight may or may not have been made.
    #[error("the store is closed")]
    Closed,
}

impl Error {
    /// Whether the cause lies in the storage and not in what was asked for.
    pub(crate) fn is_storage(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::NoSpace { .. } | Self::Io { .. })
    }
}
