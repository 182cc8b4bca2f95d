//! What can be wrong with a backup, in words for whoever asked for it.

use std::path::PathBuf;

use rustic_core::RusticError;

use crate::store::StoreError;

/// A backup that could not be made, found or read.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The place can't be reached, or refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no repository.
    #[error(
        "there is no repository at {place}: make one with 'berth repository create --init', or see whether the place is mounted"
    )]
    NoRepository {
        /// Where.
        place: String,
    },
    /// There is one already.
    #[error("there is a repository at {place} already: use it without --init")]
    AlreadyThere {
        /// Where.
        place: String,
    },
    /// The password opens none of the repository's keys.
    #[error("the password does not open the repository at {place}")]
    WrongPassword {
        /// Where.
        place: String,
    },
    /// Another program holds the repository for itself.
    #[error(
        "the repository at {place} is locked by {holder}: wait until it is done; a lock that a dead program left is removed by 'restic unlock'"
    )]
    Locked {
        /// Where.
        place: String,
        /// Who holds it.
        holder: String,
    },
    /// No backup, or several, begin so.
    #[error("{found} backups in the repository at {place} have an id that begins with '{id}': expected one")]
    NotOne {
        /// Where.
        place: String,
        /// As given.
        id: String,
        /// How many there are.
        found: usize,
    },
    /// What is in the repository is not what was put there.
    #[error("the repository at {place} is damaged: {detail}")]
    Damaged {
        /// Where.
        place: String,
        /// What is wrong.
        detail: String,
    },
    /// Somebody asked for it to stop.
    #[error("it was cancelled")]
    Cancelled,
    /// A backup holds what no backup of ours does.
    #[error("backup {backup} is refused: {detail}")]
    Foreign {
        /// Which.
        backup: String,
        /// Why.
        detail: String,
    },
    /// A file of this host could not be read or written.
    #[error("{} can't be {verb}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        verb: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl BackupError {
    pub(crate) fn file(path: &std::path::Path, verb: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, verb, source }
    }

    /// What the library said, in one line.
    pub(crate) fn damaged(place: &str, error: &RusticError) -> Self {
        let text = error.display_log();
        let detail = text.strip_prefix("Error: ").unwrap_or(&text).replace('\n', " ");
        Self::Damaged { place: place.to_owned(), detail }
    }
}
