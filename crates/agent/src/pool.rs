//! Pools: directories that are opened and looked at once, when the agent starts.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use berth_model::host::PoolReport;
use rustix::fs::StatVfs;
use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};
use crate::layout::PoolDirs;

/// A pool that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Something in it can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Other users can't get to it.
    #[error(
        "pool '{pool}' at {} can't be used: {} can't be entered by the VMs' own users (expected mode o+x)",
        path.display(),
        closed.display()
    )]
    Closed {
        /// The pool's name.
        pool: String,
        /// Where it is.
        path: PathBuf,
        /// The directory that is closed.
        closed: PathBuf,
    },
    /// No random numbers.
    #[error("no random numbers can be had: {detail}")]
    Entropy {
        /// The system's words.
        detail: String,
    },
}

/// What was found of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolFacts {
    /// Where it is.
    pub dirs: PoolDirs,
    /// Its identity: two hosts that read the same one see the same directory.
    pub uuid: String,
    /// Whether its file system lets files be written past the page cache.
    pub direct_io: bool,
    /// What part of it has to stay free for schedules to go on, in percent.
    pub reserve_percent: u8,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    uuid: String,
}

/// Opens a pool: makes what it lacks, and looks at what its file system can do.
///
/// # Errors
/// When it can't be used.
pub fn open(dirs: PoolDirs, isolated_users: bool, reserve_percent: u8) -> Result<PoolFacts, PoolError> {
    for directory in [dirs.images(), dirs.vms()] {
        fs::create_dir_all(&directory).map_err(FileError::io(&directory, "made"))?;
        if isolated_users {
            let mode = fs::Permissions::from_mode(0o711);
            fs::set_permissions(&directory, mode).map_err(FileError::io(&directory, "opened"))?;
        }
    }
    if isolated_users {
        check_reachable(&dirs)?;
    }
    let uuid = identity(&dirs.identity())?;
    let direct_io = takes_direct_io(&dirs.path);
    Ok(PoolFacts { dirs, uuid, direct_io, reserve_percent })
}

/// How full a pool is.
///
/// # Errors
/// When the file system can't be asked.
pub fn report(facts: &PoolFacts) -> io::Result<PoolReport> {
    let (size_bytes, free_bytes) = size_and_free(&rustix::fs::statvfs(&facts.dirs.path)?);
    Ok(PoolReport {
        name: facts.dirs.name.clone(),
        pool_uuid: facts.uuid.clone(),
        size_bytes,
        free_bytes,
        reserve_bytes: size_bytes / 100 * u64::from(facts.reserve_percent),
    })
}

/// What a file system holds for its users and what of it is free, in bytes. What it keeps back for itself is nobody's to
/// fill, and so no part of the pool.
fn size_and_free(found: &StatVfs) -> (u64, u64) {
    let usable_blocks = found.f_blocks.saturating_sub(found.f_bfree).saturating_add(found.f_bavail);
    (usable_blocks.saturating_mul(found.f_frsize), found.f_bavail.saturating_mul(found.f_frsize))
}

/// Reads the pool's identity; the first host to use a pool gives it one.
fn identity(path: &Path) -> Result<String, PoolError> {
    if let Some(identity) = durable::read_json::<Identity>(path)? {
        return Ok(identity.uuid);
    }
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|error| PoolError::Entropy { detail: error.to_string() })?;
    let uuid: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    // Two hosts may be first at once: a link, unlike a renaming, fails for the second.
    let mine = path.with_extension(format!("{uuid}{}", durable::UNFINISHED_SUFFIX));
    durable::write_json(&mine, &Identity { uuid: uuid.clone() })?;
    let linked = fs::hard_link(&mine, path);
    durable::remove_file(&mine)?;
    match linked {
        Ok(()) => Ok(uuid),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => identity(path),
        Err(error) => Err(FileError::io(path, "written")(error).into()),
    }
}

fn check_reachable(dirs: &PoolDirs) -> Result<(), PoolError> {
    let real = fs::canonicalize(&dirs.path).map_err(FileError::io(&dirs.path, "found"))?;
    for directory in real.ancestors() {
        let mode = fs::metadata(directory).map_err(FileError::io(directory, "read"))?.mode();
        if mode & 0o001 == 0 {
            let (pool, path) = (dirs.name.to_string(), dirs.path.clone());
            return Err(PoolError::Closed { pool, path, closed: directory.to_owned() });
        }
    }
    Ok(())
}

fn takes_direct_io(directory: &Path) -> bool {
    let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap_or(0);
    let path = directory.join(format!("direct-io{}", durable::UNFINISHED_SUFFIX));
    let opened =
        OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(&path).is_ok();
    // A file that could not be made is not there to be removed.
    let _ = fs::remove_file(&path);
    opened
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_keeps_its_identity() {
        let directory = tempfile::tempdir().expect("directory");
        let dirs = PoolDirs { name: "local".parse().expect("name"), path: directory.path().to_owned() };
        let first = open(dirs.clone(), false, 10).expect("first");
        assert_eq!(open(dirs.clone(), false, 10).expect("second"), first);
        assert_eq!(first.uuid.len(), 32);
        let mut left: Vec<_> =
            fs::read_dir(&dirs.path).expect("list").map(|entry| entry.expect("entry").file_name()).collect();
        left.sort();
        assert_eq!(left, ["images", "pool.json", "vms"]);
    }

    #[test]
    fn what_the_file_system_keeps_for_itself_is_no_part_of_the_pool() {
        let mut size = rustix::fs::statvfs("/").expect("statvfs");
        (size.f_frsize, size.f_blocks, size.f_bfree, size.f_bavail) = (4096, 1000, 700, 100);
        assert_eq!(size_and_free(&size), (400 * 4096, 100 * 4096));
    }

    #[test]
    fn a_pool_that_vms_can_not_reach_says_which_directory_is_in_the_way() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("closed/pool");
        fs::create_dir_all(&path).expect("made");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).expect("opened");
        fs::set_permissions(directory.path().join("closed"), fs::Permissions::from_mode(0o700))
            .expect("closed");
        let dirs = PoolDirs { name: "local".parse().expect("name"), path };
        let error = open(dirs, true, 10).expect_err("closed").to_string();
        assert!(error.contains("/closed can't be entered"), "{error}");
    }
}
