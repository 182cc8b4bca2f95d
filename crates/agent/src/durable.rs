//! Files that are either as they were or as they shall be, whatever dies and when.
//!
//! A record is written to a name of its own, brought to the disk, and renamed over the old one; then the directory is
//! brought to the disk too, for the name is kept there. Whoever reads sees one whole record or the other.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use berth_model::{Problem, ProblemCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What all unfinished files' names end in; found at a start, they are leftovers.
pub const UNFINISHED_SUFFIX: &str = ".unfinished";

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("{} can't be {verb}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// `read`, `written`, …
        verb: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not hold what it should.
    #[error("{} is not what it should be", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl FileError {
    /// Makes an error out of the system's refusal; for `map_err`.
    pub fn io(path: &Path, verb: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, verb, source }
    }
}

/// Whether the cause is that a disk, or somebody's share of it, is full.
pub fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<FileError> for Problem {
    fn from(error: FileError) -> Self {
        let code = match &error {
            FileError::Io { source, .. } if is_no_space(source) => ProblemCode::NoSpace,
            FileError::Io { .. } | FileError::Content { .. } => ProblemCode::Internal,
        };
        Problem::new(code, with_causes(&error))
    }
}

/// An error with what caused it, in one line: for where types end.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Writes a record durably, readable by its owner alone.
///
/// # Errors
/// When the system refuses; the old record is then still there.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), FileError> {
    write(path, &json_text(path, value)?, 0o600)
}

/// A record whose content is on the disk under another name: giving it its own costs no wait for the disk.
#[derive(Debug)]
pub struct Staged {
    unfinished: PathBuf,
    path: PathBuf,
    named: bool,
}

impl Staged {
    /// Writes the content and brings it to the disk. Blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn json<T: Serialize>(path: &Path, value: &T) -> Result<Self, FileError> {
        let text = json_text(path, value)?;
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(".staged");
        unfinished.push(UNFINISHED_SUFFIX);
        let staged = Self { unfinished: unfinished.into(), path: path.to_owned(), named: false };
        fill(&staged.unfinished, &text, 0o600).map_err(FileError::io(&staged.path, "written"))?;
        Ok(staged)
    }

    /// Gives it its name: from now on it is what everybody reads. After a power cut it is still whole or still the one
    /// before; [`sync_parent`] makes sure that it is this one.
    ///
    /// # Errors
    /// When the system refuses: the old one is then still there.
    pub fn name(mut self) -> Result<PathBuf, FileError> {
        fs::rename(&self.unfinished, &self.path).map_err(FileError::io(&self.path, "written"))?;
        self.named = true;
        Ok(self.path.clone())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.named {
            // It is known as a leftover by its name.
            let _ = fs::remove_file(&self.unfinished);
        }
    }
}

fn json_text<T: Serialize>(path: &Path, value: &T) -> Result<Vec<u8>, FileError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|source| FileError::Content { path: path.to_owned(), source })?;
    text.push(b'\n');
    Ok(text)
}

/// Writes a file durably.
///
/// # Errors
/// As [`write_json`].
pub fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(UNFINISHED_SUFFIX);
    let unfinished = PathBuf::from(unfinished);
    let written = fill(&unfinished, content, mode)
        .and_then(|()| fs::rename(&unfinished, path))
        .map_err(FileError::io(path, "written"));
    if written.is_err() {
        // The error that counts is the first one.
        let _ = fs::remove_file(&unfinished);
        return written;
    }
    sync_parent(path)
}

fn fill(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Brings to the disk that a file in a directory was made, renamed or removed.
///
/// # Errors
/// When the system refuses.
pub fn sync_parent(path: &Path) -> Result<(), FileError> {
    let parent = path.parent().unwrap_or_else(|| Path::new("/"));
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(FileError::io(parent, "synced"))
}

/// Reads a record; none if there is no such file.
///
/// # Errors
/// When it can't be read, or is not a record of this kind.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FileError::io(path, "read")(error)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| FileError::Content { path: path.to_owned(), source })
}

/// Removes a file; nothing if there is none.
///
/// # Errors
/// When the system refuses.
pub fn remove_file(path: &Path) -> Result<(), FileError> {
    ignore_missing(fs::remove_file(path)).map_err(FileError::io(path, "removed"))
}

/// Removes a directory with all that is in it; nothing if there is none.
///
/// # Errors
/// When the system refuses.
pub fn remove_tree(path: &Path) -> Result<(), FileError> {
    ignore_missing(fs::remove_dir_all(path)).map_err(FileError::io(path, "removed"))
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Does something that blocks on a thread for such things.
///
/// # Errors
/// What the work says; work that panics is a fault of ours.
pub async fn blocking<T, F>(work: F) -> Result<T, Problem>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Problem> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Problem::new(ProblemCode::Internal, format!("work on files broke: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("a.json");
        assert_eq!(read_json::<Vec<u32>>(&path).expect("no file"), None);
        write_json(&path, &vec![1, 2]).expect("first");
        write_json(&path, &vec![3]).expect("second");
        assert_eq!(read_json::<Vec<u32>>(&path).expect("file"), Some(vec![3]));
        assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_staged_record_is_seen_once_it_has_its_name_and_leaves_nothing_when_it_is_dropped() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("a.json");
        write_json(&path, &1).expect("first");
        drop(Staged::json(&path, &2).expect("staged"));
        assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 1);
        let staged = Staged::json(&path, &3).expect("staged");
        write_json(&path, &4).expect("meanwhile");
        assert_eq!(read_json::<u32>(&path).expect("file"), Some(4));
        staged.name().expect("named");
        assert_eq!(read_json::<u32>(&path).expect("file"), Some(3));
        assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_torn_record_is_an_error_and_not_an_absence() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("a.json");
        fs::write(&path, b"[1,").expect("torn");
        assert!(matches!(read_json::<Vec<u32>>(&path), Err(FileError::Content { .. })));
    }

    #[test]
    fn a_write_that_fails_keeps_the_old_record() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("a.json");
        write_json(&path, &1).expect("first");
        fs::create_dir(directory.path().join("a.json.unfinished")).expect("in the way");
        assert!(write_json(&path, &2).is_err());
        assert_eq!(read_json::<u32>(&path).expect("file"), Some(1));
    }
}
