//! A marker: something was done that can't be taken back. It is set with the guest standing still, so it must cost
//! nothing.
//!
//! Each side of a migration has one. The source's says that the VM was given away: its next agent must not let the guest
//! run here again. The target's says that the guest was told to run: its next agent must not throw the VM away, for the
//! guest may have written to its disk. ([`super::arrival`] has what follows from that.)
//!
//! A marker has to outlive the agent. It need not outlive the machine: when that goes down, the VM's process goes with
//! it, and the agent that comes up afterwards need only not believe that nothing was done. So the marker is written to a
//! file and not waited for, for a file is there for the next agent whether it has reached the disk or not; and beside it
//! lies, on the disk from before, during which run of the machine it could be set. After another start of the machine
//! nobody can say what was done ([`Mark::Lost`]). Waiting for the disk here would take a few milliseconds of the pause on
//! a quiet machine, and hundreds on one whose disk is busy.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};
use crate::launcher::process::proc;

const SET: &[u8] = b"done\n";
const CLEAR: &[u8] = &[0; SET.len()];

/// What a marker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// As source: the VM was given away.
    GivenAway,
    /// As target: the guest was told to run.
    ToldToRun,
}

impl Deed {
    fn marker_in(self, state: &Path) -> PathBuf {
        state.join(match self {
            Self::GivenAway => "given-away",
            Self::ToldToRun => "told-to-run",
        })
    }

    fn chance_in(self, state: &Path) -> PathBuf {
        state.join(match self {
            Self::GivenAway => "sending.json",
            Self::ToldToRun => "loading.json",
        })
    }
}

/// What is known of a deed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// It was not done.
    Clear,
    /// It was done, or was about to be.
    Set,
    /// It could have been done, and the machine has gone down since: nobody can say.
    Lost,
}

/// Kept on the disk while a deed may be done.
#[derive(Debug, Serialize, Deserialize)]
struct Chance {
    /// The run of the machine in which it was begun.
    boot_id: String,
}

/// A marker that is not set yet.
#[derive(Debug)]
pub struct Marker {
    file: File,
    path: PathBuf,
}

fn boot_id() -> Result<String, FileError> {
    proc::boot_id().map_err(FileError::io(Path::new(proc::BOOT_ID), "read"))
}

impl Marker {
    /// Prepares one, durably. Blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn prepare(state: &Path, deed: Deed) -> Result<Self, FileError> {
        let path = deed.marker_in(state);
        let prepare = || {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            file.write_all_at(CLEAR, 0)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = prepare().map_err(FileError::io(&path, "written"))?;
        durable::write_json(&deed.chance_in(state), &Chance { boot_id: boot_id()? })?;
        Ok(Self { file, path })
    }

    /// Sets it: whoever looks from now on sees it, as long as the machine runs.
    ///
    /// # Errors
    /// When the system refuses: it may be set or not then.
    pub fn set(&self) -> Result<(), FileError> {
        self.file.write_all_at(SET, 0).map_err(FileError::io(&self.path, "written"))
    }

    /// Takes it back, durably: the deed is known not to have been done. Blocks.
    ///
    /// # Errors
    /// When the system refuses: it may be set or not then.
    pub fn clear(&self) -> Result<(), FileError> {
        let cleared = self.file.write_all_at(CLEAR, 0).and_then(|()| self.file.sync_all());
        cleared.map_err(FileError::io(&self.path, "written"))
    }
}

/// What is known of a deed. Blocks.
///
/// # Errors
/// When it can't be found out.
pub fn read(state: &Path, deed: Deed) -> Result<Mark, FileError> {
    let path = deed.marker_in(state);
    let marked = match fs::read(&path) {
        Ok(bytes) => bytes.iter().any(|byte| *byte != 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(FileError::io(&path, "read")(error)),
    };
    if marked {
        return Ok(Mark::Set);
    }
    match durable::read_json::<Chance>(&deed.chance_in(state))? {
        Some(chance) if chance.boot_id != boot_id()? => Ok(Mark::Lost),
        Some(_) | None => Ok(Mark::Clear),
    }
}

/// Whether the VM was given away, or may have been. Blocks.
///
/// # Errors
/// When it can't be found out.
pub fn was_given_away(state: &Path) -> Result<bool, FileError> {
    Ok(read(state, Deed::GivenAway)? != Mark::Clear)
}

/// Removes a marker, set or not: it is off the disk when this returns. Blocks.
///
/// # Errors
/// When the system refuses.
pub fn remove(state: &Path, deed: Deed) -> Result<(), FileError> {
    // The other one first: without it, a marker that comes back from a lost write would still be seen.
    durable::remove_file(&deed.chance_in(state))?;
    let path = deed.marker_in(state);
    durable::remove_file(&path)?;
    durable::sync_parent(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEEDS: [Deed; 2] = [Deed::GivenAway, Deed::ToldToRun];

    #[test]
    fn a_marker_is_set_only_when_it_is_set() {
        for (deed, other) in [(DEEDS[0], DEEDS[1]), (DEEDS[1], DEEDS[0])] {
            let state = tempfile::tempdir().expect("directory");
            let mark = || read(state.path(), deed).expect("mark");
            assert_eq!(mark(), Mark::Clear);
            let marker = Marker::prepare(state.path(), deed).expect("prepared");
            assert_eq!(mark(), Mark::Clear);
            marker.set().expect("set");
            assert_eq!(mark(), Mark::Set);
            assert_eq!(read(state.path(), other).expect("the other"), Mark::Clear);
            marker.clear().expect("cleared");
            assert_eq!(mark(), Mark::Clear);
            marker.set().expect("set again");
            remove(state.path(), deed).expect("removed");
            remove(state.path(), deed).expect("removed again");
            assert_eq!(mark(), Mark::Clear);
        }
    }

    #[test]
    fn after_the_machine_went_down_nobody_can_say_unless_the_marker_does() {
        for deed in DEEDS {
            let state = tempfile::tempdir().expect("directory");
            let marker = Marker::prepare(state.path(), deed).expect("prepared");
            let before = Chance { boot_id: "another run".to_owned() };
            durable::write_json(&deed.chance_in(state.path()), &before).expect("written");
            assert_eq!(read(state.path(), deed).expect("mark"), Mark::Lost);
            marker.set().expect("set");
            assert_eq!(read(state.path(), deed).expect("mark"), Mark::Set);
        }
        let state = tempfile::tempdir().expect("directory");
        Marker::prepare(state.path(), Deed::GivenAway).expect("prepared").set().expect("set");
        assert!(was_given_away(state.path()).expect("mark"));
    }
}
