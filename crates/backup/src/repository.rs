//! A repository: opened with its password, or made.

use std::sync::Arc;

use berth_model::repository::RepositoryAccess;
use rustic_core::repofile::SnapshotFile;
use rustic_core::{
    CheckOptions, ConfigOptions, Credentials, KeyOptions, OpenStatus, RepositoryBackends, RepositoryOptions,
    RusticError, RusticResult,
};

use crate::lock::{self, Lock};
use crate::store::backend::Backend;
use crate::store::{self, StoreError};
use crate::watch::Teller;
use crate::{BackupError, Watch};

/// The library's repository.
type Core = rustic_core::Repository<OpenStatus>;

/// What its snapshots' paths begin with.
const PATH_PREFIX: &str = "/berth/";
/// The tag that all of its snapshots have.
const TAG: &str = "berth";
/// What the tag with an operation's id begins with.
const OPERATION_TAG: &str = "operation=";
/// What the tag with a snapshot's name begins with.
const SNAPSHOT_TAG: &str = "snapshot=";

/// A repository that is open.
pub struct Repository {
    pub(crate) place: String,
    pub(crate) backend: Arc<Backend>,
    pub(crate) core: Core,
    pub(crate) watch: Arc<Watch>,
}

/// A backup as a repository lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its id: 64 hexadecimal digits.
    pub id: String,
    /// What it is of, by its maker's word: a VM's `segment/name`.
    pub vm: String,
    /// What its snapshot was called.
    pub snapshot: String,
    /// When it was made, in milliseconds since 1970.
    pub created_at_ms: i64,
    /// How long its files are in all.
    pub bytes: u64,
    /// What it added to the repository, compressed.
    pub added_bytes: u64,
}

/// What a backup is filed under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// The VM's `segment/name`, which stands for the host in restic's lists.
    pub vm: String,
    /// What of the VM stays when it is renamed: its backups are looked at for what need not be read again.
    pub vm_id: String,
    /// What the snapshot is called.
    pub snapshot: String,
    /// The operation that makes the backup: done twice, it makes one.
    pub operation: String,
}

impl Label {
    pub(crate) fn path(&self) -> String {
        format!("{PATH_PREFIX}{}", self.vm_id)
    }

    pub(crate) fn tags(&self) -> [String; 3] {
        let operation = format!("{OPERATION_TAG}{}", self.operation);
        [TAG.to_owned(), format!("{SNAPSHOT_TAG}{}", self.snapshot), operation]
    }
}

impl Repository {
    /// Opens the repository that is there.
    ///
    /// # Errors
    /// When there is none, the place can't be reached, or the password is not the repository's.
    pub fn open(access: &RepositoryAccess, watch: &Arc<Watch>) -> Result<Self, BackupError> {
        let (place, backend) = go_to(access)?;
        if backend.store().length("config")?.is_none() {
            return Err(BackupError::NoRepository { place });
        }
        let core = core(&backend, watch)?.open(&credentials(access));
        Self::new(core, place, backend, watch)
    }

    /// Makes a repository where there is none.
    ///
    /// # Errors
    /// When there is one already, or the place can't be reached or written to.
    pub fn init(access: &RepositoryAccess, watch: &Arc<Watch>) -> Result<Self, BackupError> {
        let (place, backend) = go_to(access)?;
        backend.store().create()?;
        if backend.store().length("config")?.is_some() {
            return Err(BackupError::AlreadyThere { place });
        }
        let (keys, config) = (KeyOptions::default(), ConfigOptions::default());
        let core = core(&backend, watch)?.init(&credentials(access), &keys, &config);
        Self::new(core, place, backend, watch)
    }

    fn new(
        core: RusticResult<Core>,
        place: String,
        backend: Arc<Backend>,
        watch: &Arc<Watch>,
    ) -> Result<Self, BackupError> {
        let core = core.map_err(|error| explain(&place, &backend, &error))?;
        Ok(Self { place, backend, core, watch: Arc::clone(watch) })
    }

    /// Where it is, without anything secret.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Every backup of a VM that is in it, the oldest first; what others have put in is left out.
    ///
    /// # Errors
    /// When the place can't be read.
    pub fn list(&self) -> Result<Vec<Listed>, BackupError> {
        let mut snapshots = self.snapshots()?;
        snapshots.sort_by(|one, other| one.time.cmp(&other.time));
        Ok(snapshots.iter().filter(|snapshot| is_ours(snapshot)).map(listed).collect())
    }

    /// Looks whether everything that the backups need is there, and, if `read_data`, whether it is what it was.
    ///
    /// # Errors
    /// What is damaged.
    pub fn check(&self, read_data: bool) -> Result<(), BackupError> {
        let checked = self.core.check(CheckOptions::default().read_data(read_data));
        checked.and_then(|results| results.is_ok()).map_err(|error| self.explain(&error))
    }

    /// Keeps others from removing what is being written or read, for as long as the result lives.
    ///
    /// # Errors
    /// When somebody has the repository for himself.
    pub fn lock(&self) -> Result<Lock, BackupError> {
        lock::take(&self.place, &self.backend, &self.core)
    }

    pub(crate) fn snapshots(&self) -> Result<Vec<SnapshotFile>, BackupError> {
        self.core.get_all_snapshots().map_err(|error| self.explain(&error))
    }

    /// The one backup whose id begins so.
    pub(crate) fn find(&self, id: &str) -> Result<SnapshotFile, BackupError> {
        let mut found = self.snapshots()?;
        found.retain(|snapshot| is_ours(snapshot) && id_of(snapshot).starts_with(id));
        match (found.pop(), found.len()) {
            (Some(snapshot), 0) => Ok(snapshot),
            (one, others) => {
                let found = others + usize::from(one.is_some());
                Err(BackupError::NotOne { place: self.place.clone(), id: id.to_owned(), found })
            }
        }
    }

    /// The library's repository once more: it is used up when its index is read. The key is there already.
    pub(crate) fn reopen(&self) -> Result<Core, BackupError> {
        let core = core(&self.backend, &self.watch)?.open(&Credentials::Masterkey(self.core.key()));
        core.map_err(|error| self.explain(&error))
    }

    /// What the library's refusal means.
    pub(crate) fn explain(&self, error: &RusticError) -> BackupError {
        explain(&self.place, &self.backend, error)
    }
}

/// A backup's id, as `restic` knows it.
pub(crate) fn id_of(snapshot: &SnapshotFile) -> String {
    snapshot.id.to_hex().as_str().to_owned()
}

/// Whether a snapshot is a backup that this operation has made.
pub(crate) fn is_of_operation(snapshot: &SnapshotFile, operation: &str) -> bool {
    snapshot.tags.iter().any(|tag| tag.strip_prefix(OPERATION_TAG) == Some(operation))
}

pub(crate) fn is_ours(snapshot: &SnapshotFile) -> bool {
    snapshot.tags.iter().any(|tag| tag == TAG)
}

pub(crate) fn listed(snapshot: &SnapshotFile) -> Listed {
    let summary = snapshot.summary.as_ref();
    Listed {
        id: id_of(snapshot),
        vm: snapshot.hostname.clone(),
        snapshot: snapshot
            .tags
            .iter()
            .find_map(|tag| tag.strip_prefix(SNAPSHOT_TAG))
            .unwrap_or_default()
            .to_owned(),
        created_at_ms: snapshot.time.timestamp().as_millisecond(),
        bytes: summary.map_or(0, |summary| summary.total_bytes_processed),
        added_bytes: summary.map_or(0, |summary| summary.data_added_packed),
    }
}

fn go_to(access: &RepositoryAccess) -> Result<(String, Arc<Backend>), StoreError> {
    let store = store::open(access)?;
    Ok((store.place().to_owned(), Backend::new(store)))
}

fn core(backend: &Arc<Backend>, watch: &Arc<Watch>) -> Result<rustic_core::Repository<()>, BackupError> {
    let backends = RepositoryBackends::new(Arc::clone(backend) as Arc<_>, None);
    // A cache would lie in a directory of the user's, and outlive its use.
    let options = RepositoryOptions::default().no_cache(true);
    rustic_core::Repository::new_with_progress(&options, &backends, Teller(Arc::clone(watch)))
        .map_err(|error| BackupError::damaged(backend.store().place(), &error))
}

fn credentials(access: &RepositoryAccess) -> Credentials {
    Credentials::password(access.keys.password.reveal())
}

fn explain(place: &str, backend: &Backend, error: &RusticError) -> BackupError {
    if error.is_incorrect_password() {
        return BackupError::WrongPassword { place: place.to_owned() };
    }
    match backend.take_refusal() {
        Some(refusal) => refusal.into(),
        None => BackupError::damaged(place, error),
    }
}
