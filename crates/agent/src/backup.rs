//! Repositories, from a host's side: a process that works on one for the agent, and what is staged for it.
//!
//! A repository is never opened in the agent itself: packing and hashing take memory and time that guests need, and what is
//! read there may come from anybody. [`worker`] starts `berth backup-worker`, which is told everything on its standard input.
//!
//! What is read or written lies in `POOL/staging/<host>-<name>`: links to frozen files, which thereby stay whatever becomes
//! of their VM meanwhile, or files that came and are not checked yet. A staging directory of this host that an agent finds
//! when it starts is left over, and removed.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use berth_api::agent::{BackupList, OpenRepository, RepositoryContents};
use berth_api::backup::{Work, WorkerReply};
use berth_model::repository::{Backup, BackupContents, RepositoryAccess};
use berth_model::{HostId, Problem, ProblemCode};

use crate::durable::{self, FileError};
use crate::layout::{PoolDirs, VmDirs};
use crate::services::Services;

pub mod worker;

/// Opens a repository, or makes it, to see whether it can be used from here.
///
/// # Errors
/// Why it can't.
pub async fn open(services: &Services, wish: OpenRepository) -> Result<(), Problem> {
    let work = if wish.init { Work::Init } else { Work::Open };
    worker::ask(services, wish.access, work).await.map(drop)
}

/// What is in a repository.
///
/// # Errors
/// When it can't be opened or read.
pub async fn list(services: &Services, access: RepositoryAccess) -> Result<BackupList, Problem> {
    match worker::ask(services, access, Work::List).await? {
        WorkerReply::Backups { backups } => Ok(BackupList { backups }),
        _ => Err(worker::astray()),
    }
}

/// What one backup is of.
///
/// # Errors
/// When there is none, or it is not one of ours.
pub async fn look(
    services: &Services,
    wish: RepositoryContents,
) -> Result<(Backup, BackupContents), Problem> {
    match worker::ask(services, wish.access, Work::Look { backup: wish.backup }).await? {
        WorkerReply::Contents { backup, text } => {
            let contents = read_contents(&text).map_err(|detail| foreign(&backup.id, &detail))?;
            Ok((backup, contents))
        }
        _ => Err(worker::astray()),
    }
}

fn read_contents(text: &str) -> Result<BackupContents, String> {
    let contents: BackupContents = serde_json::from_str(text)
        .map_err(|error| format!("what it says of itself can't be read: {error}"))?;
    if contents.format != BackupContents::FORMAT {
        let (found, known) = (contents.format, BackupContents::FORMAT);
        return Err(format!("it is of format {found}, and this version reads {known}"));
    }
    Ok(contents)
}

/// That a backup is not what ours are.
pub fn foreign(backup: &str, detail: &str) -> Problem {
    Problem::new(ProblemCode::BadImage, format!("backup {backup} is refused: {detail}"))
}

/// A directory for what is read into or out of a repository, laid out as a VM's.
#[derive(Debug)]
pub struct Staging {
    dirs: VmDirs,
    kept: bool,
}

impl Staging {
    /// An empty one. One of the same name that an earlier try left is removed. Blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn begin(pool: &PoolDirs, host: &HostId, name: &str) -> Result<Self, FileError> {
        let staging = Self::of(pool, host, name);
        durable::remove_tree(staging.path())?;
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(staging.path()).map_err(FileError::io(staging.path(), "made"))?;
        Ok(staging)
    }

    /// One that is there, or is not.
    pub fn of(pool: &PoolDirs, host: &HostId, name: &str) -> Self {
        let path = pool.staging().join(format!("{host}-{name}"));
        let dirs = VmDirs { pool: pool.clone(), disk: path.clone(), state: path.clone(), run: path };
        Self { dirs, kept: false }
    }

    /// Its directories.
    pub const fn dirs(&self) -> &VmDirs {
        &self.dirs
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dirs.disk
    }

    /// Where the parts of the image are.
    pub fn image(&self) -> PathBuf {
        self.path().join("image")
    }

    /// Leaves it where it is.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = durable::remove_tree(self.path())
        {
            tracing::warn!(%error, "a staging directory stays until the agent starts again");
        }
    }
}

/// Removes what an agent of this host left staged in a pool.
///
/// # Errors
/// When the pool can't be listed.
pub fn clean(pool: &PoolDirs, host: &HostId) -> Result<(), FileError> {
    let directory = pool.staging();
    let Ok(entries) = fs::read_dir(&directory) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{host}-")) {
            durable::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}
