//! What can be asked for.

use berth_api::manager::{CloneSnapshot, CreateVm, ImportSnapshot, MigrateVm, RestoreVm};
use berth_model::name::Name;
use berth_model::operation::OperationKind;
use berth_model::repository::BackupContents;
use berth_model::schedule::Occasion;
use berth_model::snapshot::{SnapshotExtent, SnapshotKind};
use berth_model::{ImageId, RepositoryId, SnapshotId, VmId};
use serde::{Deserialize, Serialize};

/// A wish for a change, as it came in.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum OperationRequest {
    /// Make a VM.
    VmCreate {
        /// As asked for.
        wish: Box<CreateVm>,
    },
    /// Start a stopped VM.
    VmStart {
        /// Which.
        vm: VmId,
    },
    /// Ask the guest to power down.
    VmShutdown {
        /// Which.
        vm: VmId,
        /// How long the guest may take, in seconds; none: [`crate::workflow::power::SHUTDOWN_TIMEOUT_S`].
        timeout_s: Option<u32>,
    },
    /// Take the power away.
    VmStop {
        /// Which.
        vm: VmId,
    },
    /// Take the power away and give it back.
    VmRestart {
        /// Which.
        vm: VmId,
    },
    /// Hold the guest.
    VmPause {
        /// Which.
        vm: VmId,
    },
    /// Let a held guest go on.
    VmResume {
        /// Which.
        vm: VmId,
    },
    /// Delete a VM with its disk and snapshots.
    VmDelete {
        /// Which.
        vm: VmId,
        /// Also when it runs.
        force: bool,
    },
    /// Move a VM.
    VmMigrate {
        /// Which.
        vm: VmId,
        /// Where to and how.
        wish: MigrateVm,
    },
    /// Take a snapshot.
    SnapshotCreate {
        /// Of which VM.
        vm: VmId,
        /// Why it will exist: `Manual`, `Baseline` or `Scheduled`.
        kind: SnapshotKind,
        /// The run of a schedule that it is for.
        occasion: Option<Occasion>,
        /// Its name; none: made of the time.
        name: Option<Name>,
        /// A word about it.
        note: String,
        /// How much of the VM it is to hold.
        #[serde(default)]
        extent: SnapshotExtent,
    },
    /// Put a VM back to a snapshot.
    SnapshotRestore {
        /// Which VM.
        vm: VmId,
        /// To what.
        wish: RestoreVm,
    },
    /// Make a new VM from a snapshot.
    SnapshotClone {
        /// Of which VM, which nothing happens to.
        origin: VmId,
        /// Which.
        snapshot: SnapshotId,
        /// What it is to be; the segment is named.
        wish: CloneSnapshot,
    },
    /// See whether a snapshot is still what it was.
    SnapshotVerify {
        /// Of which VM, which nothing happens to.
        vm: VmId,
        /// Which.
        snapshot: SnapshotId,
        /// Start a clone from it as well.
        boot: bool,
    },
    /// Put a snapshot into a repository.
    SnapshotExport {
        /// Of which VM, which nothing happens to.
        origin: VmId,
        /// Which.
        snapshot: SnapshotId,
        /// Into which.
        repository: RepositoryId,
    },
    /// Make a new VM from a backup.
    SnapshotImport {
        /// In which repository.
        repository: RepositoryId,
        /// Its id there.
        backup: String,
        /// What it says of itself.
        contents: Box<BackupContents>,
        /// What it is to be; the segment is named.
        wish: ImportSnapshot,
    },
    /// Delete a snapshot.
    SnapshotDelete {
        /// Of which VM.
        vm: VmId,
        /// Which.
        snapshot: SnapshotId,
    },
    /// Delete an image everywhere.
    ImageDelete {
        /// Which.
        image: ImageId,
    },
}

impl OperationRequest {
    /// What kind of operation it is.
    pub const fn kind(&self) -> OperationKind {
        match self {
            Self::VmCreate { .. } => OperationKind::VmCreate,
            Self::VmStart { .. } => OperationKind::VmStart,
            Self::VmShutdown { .. } => OperationKind::VmShutdown,
            Self::VmStop { .. } => OperationKind::VmStop,
            Self::VmRestart { .. } => OperationKind::VmRestart,
            Self::VmPause { .. } => OperationKind::VmPause,
            Self::VmResume { .. } => OperationKind::VmResume,
            Self::VmDelete { .. } => OperationKind::VmDelete,
            Self::VmMigrate { .. } => OperationKind::VmMigrate,
            Self::SnapshotCreate { .. } => OperationKind::SnapshotCreate,
            Self::SnapshotRestore { .. } => OperationKind::SnapshotRestore,
            Self::SnapshotClone { .. } => OperationKind::SnapshotClone,
            Self::SnapshotVerify { .. } => OperationKind::SnapshotVerify,
            Self::SnapshotExport { .. } => OperationKind::SnapshotExport,
            Self::SnapshotImport { .. } => OperationKind::SnapshotImport,
            Self::SnapshotDelete { .. } => OperationKind::SnapshotDelete,
            Self::ImageDelete { .. } => OperationKind::ImageDelete,
        }
    }

    /// The VM that it changes, if it is about one that exists.
    pub const fn vm(&self) -> Option<&VmId> {
        match self {
            Self::VmCreate { .. }
            | Self::SnapshotClone { .. }
            | Self::SnapshotVerify { .. }
            | Self::SnapshotExport { .. }
            | Self::SnapshotImport { .. }
            | Self::ImageDelete { .. } => None,
            Self::VmStart { vm }
            | Self::VmShutdown { vm, .. }
            | Self::VmStop { vm }
            | Self::VmRestart { vm }
            | Self::VmPause { vm }
            | Self::VmResume { vm }
            | Self::VmDelete { vm, .. }
            | Self::VmMigrate { vm, .. }
            | Self::SnapshotCreate { vm, .. }
            | Self::SnapshotRestore { vm, .. }
            | Self::SnapshotDelete { vm, .. } => Some(vm),
        }
    }
}
