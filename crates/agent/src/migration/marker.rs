//! The marker: a VM was given away. It is set with the guest standing still, so it must cost nothing.
//!
//! It has to outlive the agent, whose successor must not let the guest run here again. It need not outlive the machine:
//! when that goes down, the VM's process goes with it, and the agent that comes up afterwards need only not believe that
//! the VM is its own. So the marker is written to a file and not waited for, for a file is there for the next agent
//! whether it has reached the disk or not; and beside it lies, on the disk from before, during which run of the machine
//! the VM was being sent. After another start of the machine nobody can say what was done, so the VM counts as given away,
//! and the manager finds out. Waiting for the disk here would take a few milliseconds of the pause on a quiet machine, and
//! hundreds on one whose disk is busy.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};

const SET: &[u8] = b"given away\n";
const CLEAR: &[u8] = &[0; SET.len()];

/// Kept on the disk while a VM is being sent.
#[derive(Debug, Serialize, Deserialize)]
struct Sending {
    /// The run of the machine in which it was begun.
    boot_id: String,
}

/// A marker that is not set yet.
#[derive(Debug)]
pub struct Marker {
    file: File,
    path: PathBuf,
}

fn marker_in(state: &Path) -> PathBuf {
    state.join("given-away")
}

fn sending_in(state: &Path) -> PathBuf {
    state.join("sending.json")
}

fn boot_id() -> Result<String, FileError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(FileError::io(path, "read"))?;
    Ok(text.trim().to_owned())
}

impl Marker {
    /// Prepares one, durably. Blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn prepare(state: &Path) -> Result<Self, FileError> {
        let path = marker_in(state);
        let prepare = || {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            file.write_all_at(CLEAR, 0)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = prepare().map_err(FileError::io(&path, "written"))?;
        durable::write_json(&sending_in(state), &Sending { boot_id: boot_id()? })?;
        Ok(Self { file, path })
    }

    /// Sets it: whoever looks from now on sees it, as long as the machine runs.
    ///
    /// # Errors
    /// When the system refuses: it may be set or not then.
    pub fn set(&self) -> Result<(), FileError> {
        self.file.write_all_at(SET, 0).map_err(FileError::io(&self.path, "written"))
    }
}

/// Whether the VM was given away, or may have been. Blocks.
///
/// # Errors
/// When it can't be found out.
pub fn is_set(state: &Path) -> Result<bool, FileError> {
    let path = marker_in(state);
    let marked = match fs::read(&path) {
        Ok(bytes) => bytes.iter().any(|byte| *byte != 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(FileError::io(&path, "read")(error)),
    };
    let sending: Option<Sending> = durable::read_json(&sending_in(state))?;
    let machine_restarted = match sending {
        Some(sending) => sending.boot_id != boot_id()?,
        None => false,
    };
    Ok(marked || machine_restarted)
}

/// Removes a marker, set or not: it is off the disk when this returns. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn remove(state: &Path) -> Result<(), FileError> {
    // The other one first: without it, a marker that comes back from a lost write would still be seen.
    durable::remove_file(&sending_in(state))?;
    let path = marker_in(state);
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
    fn a_machine_that_went_down_in_between_counts_as_given_away() {
        let state = tempfile::tempdir().expect("directory");
        Marker::prepare(state.path()).expect("prepared");
        let before = Sending { boot_id: "another run".to_owned() };
        durable::write_json(&sending_in(state.path()), &before).expect("written");
        assert!(is_set(state.path()).expect("set"));
    }
}
