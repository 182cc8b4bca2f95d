//! The marker: a VM was given away. It is written with the guest standing still, so it is made to be quick.
//!
//! The host's record is a file that is written anew and renamed, which takes several rounds to the disk. The marker is a
//! block that was put on the disk before, as zeros; to set it is to write over it in place and wait for that one write.
//! It is on the disk or it is not: a block is written whole or not at all, and one that is neither zero nor the marker
//! counts as set, because then the target may have been told.
//!
//! The host's record follows when the guest runs again. Until then the marker counts ([`super::recover`] looks at it
//! first).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::durable::{self, FileError};

const BLOCK_BYTES: usize = 512;
const SET: [u8; BLOCK_BYTES] = [0x5a; BLOCK_BYTES];
const CLEAR: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// A marker that is on the disk and not set.
#[derive(Debug)]
pub struct Marker {
    file: File,
    path: PathBuf,
}

fn path_in(state: &Path) -> PathBuf {
    state.join("given-away")
}

impl Marker {
    /// Puts one on the disk, not set. Blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn prepare(state: &Path) -> Result<Self, FileError> {
        let path = path_in(state);
        let prepare = || {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            file.write_all_at(&CLEAR, 0)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = prepare().map_err(FileError::io(&path, "written"))?;
        durable::sync_parent(&path)?;
        Ok(Self { file, path })
    }

    /// Sets it: it is on the disk when this returns. Blocks, for one write.
    ///
    /// # Errors
    /// When the system refuses: it may be set or not then.
    pub fn set(&self) -> Result<(), FileError> {
        let set = || {
            self.file.write_all_at(&SET, 0)?;
            self.file.sync_data()
        };
        set().map_err(FileError::io(&self.path, "written"))
    }
}

/// Whether a marker is set. Blocks.
///
/// # Errors
/// When it can't be read: then it is not known.
pub fn is_set(state: &Path) -> Result<bool, FileError> {
    let path = path_in(state);
    match fs::read(&path) {
        Ok(bytes) => Ok(bytes.iter().any(|byte| *byte != 0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(FileError::io(&path, "read")(error)),
    }
}

/// Removes a marker, set or not: it is off the disk when this returns. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn remove(state: &Path) -> Result<(), FileError> {
    let path = path_in(state);
    if !path.exists() {
        return Ok(());
    }
    durable::remove_file(&path)?;
    durable::sync_parent(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_set_only_when_it_is_set() {
        let state = tempfile::tempdir().expect("directory");
        assert!(!is_set(state.path()).expect("none"));
        let marker = Marker::prepare(state.path()).expect("prepared");
        assert!(!is_set(state.path()).expect("prepared"));
        marker.set().expect("set");
        assert!(is_set(state.path()).expect("set"));
        remove(state.path()).expect("removed");
        remove(state.path()).expect("removed again");
        assert!(!is_set(state.path()).expect("removed"));
    }

    #[test]
    fn a_marker_that_was_torn_counts_as_set() {
        let state = tempfile::tempdir().expect("directory");
        let mut torn = CLEAR;
        torn[17] = SET[17];
        fs::write(path_in(state.path()), torn).expect("torn");
        assert!(is_set(state.path()).expect("torn"));
    }
}
