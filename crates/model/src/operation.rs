//! Operations: every change that takes time, as the people who asked for it see it.
//!
//! An operation is durable: the manager writes it down before it starts and after each step, so that a manager that
//! is killed goes on with it, or undoes it, at its next start.
//!
//! ```mermaid
//! stateDiagram-v2
//!     running --> succeeded: done
//!     running --> undoing: failed
//!     undoing --> failed: undone
//!     undoing --> cancelled: undone-after-cancel
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::migration::MigrationReport;
use crate::repository::{ExportFacts, ImportFacts};
use crate::snapshot::{CloneFacts, DeletionFacts, RestoreFacts, SnapshotFacts};
use crate::verification::{Verification, VerificationFacts};
use crate::{ImageId, OperationId, Problem, SegmentId, SnapshotId, Timestamp, VmId};

/// What an operation does.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
pub enum OperationKind {
    /// Make a VM and start it.
    #[serde(rename = "vm.create")]
    VmCreate,
    /// Start a stopped VM.
    #[serde(rename = "vm.start")]
    VmStart,
    /// Ask the guest to power down, and wait until it has.
    #[serde(rename = "vm.shutdown")]
    VmShutdown,
    /// Take the power away.
    #[serde(rename = "vm.stop")]
    VmStop,
    /// Take the power away and give it back.
    #[serde(rename = "vm.restart")]
    VmRestart,
    /// Hold the guest.
    #[serde(rename = "vm.pause")]
    VmPause,
    /// Let a held guest go on.
    #[serde(rename = "vm.resume")]
    VmResume,
    /// Delete a VM with its disk and snapshots.
    #[serde(rename = "vm.delete")]
    VmDelete,
    /// Move a VM to another host.
    #[serde(rename = "vm.migrate")]
    VmMigrate,
    /// Take a snapshot.
    #[serde(rename = "snapshot.create")]
    SnapshotCreate,
    /// Put a VM back to a snapshot.
    #[serde(rename = "snapshot.restore")]
    SnapshotRestore,
    /// Make a new VM from a snapshot.
    #[serde(rename = "snapshot.clone")]
    SnapshotClone,
    /// See whether a snapshot is still what it was.
    #[serde(rename = "snapshot.verify")]
    SnapshotVerify,
    /// Delete a snapshot.
    #[serde(rename = "snapshot.delete")]
    SnapshotDelete,
    /// Put a snapshot into a repository.
    #[serde(rename = "snapshot.export")]
    SnapshotExport,
    /// Make a new VM from a backup.
    #[serde(rename = "snapshot.import")]
    SnapshotImport,
    /// Delete an image everywhere.
    #[serde(rename = "image.delete")]
    ImageDelete,
}

impl OperationKind {
    /// Every kind.
    pub const ALL: [Self; 17] = [
        Self::VmCreate,
        Self::VmStart,
        Self::VmShutdown,
        Self::VmStop,
        Self::VmRestart,
        Self::VmPause,
        Self::VmResume,
        Self::VmDelete,
        Self::VmMigrate,
        Self::SnapshotCreate,
        Self::SnapshotRestore,
        Self::SnapshotClone,
        Self::SnapshotVerify,
        Self::SnapshotDelete,
        Self::SnapshotExport,
        Self::SnapshotImport,
        Self::ImageDelete,
    ];

    /// The kind's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::VmCreate => "vm.create",
            Self::VmStart => "vm.start",
            Self::VmShutdown => "vm.shutdown",
            Self::VmStop => "vm.stop",
            Self::VmRestart => "vm.restart",
            Self::VmPause => "vm.pause",
            Self::VmResume => "vm.resume",
            Self::VmDelete => "vm.delete",
            Self::VmMigrate => "vm.migrate",
            Self::SnapshotCreate => "snapshot.create",
            Self::SnapshotRestore => "snapshot.restore",
            Self::SnapshotClone => "snapshot.clone",
            Self::SnapshotVerify => "snapshot.verify",
            Self::SnapshotDelete => "snapshot.delete",
            Self::SnapshotExport => "snapshot.export",
            Self::SnapshotImport => "snapshot.import",
            Self::ImageDelete => "image.delete",
        }
    }
}

impl fmt::Display for OperationKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// Where an operation stands.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum OperationState {
    /// Its steps are being done.
    Running,
    /// A step failed or it was cancelled: what was done is being undone.
    Undoing,
    /// Done.
    Succeeded,
    /// Failed, and nothing of it is left.
    Failed,
    /// Cancelled, and nothing of it is left.
    Cancelled,
}

impl OperationState {
    /// Whether nothing more will happen.
    pub const fn is_over(self) -> bool {
        match self {
            Self::Running | Self::Undoing => false,
            Self::Succeeded | Self::Failed | Self::Cancelled => true,
        }
    }

    /// The state's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Undoing => "undoing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How far a phase is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Progress {
    /// What is being done, in the field's words (`warm-up`, `waiting for the guest`).
    pub phase: String,
    /// Bytes done in this phase; 0 where bytes say nothing.
    #[serde(default)]
    pub done_bytes: u64,
    /// Bytes that this phase has in all, as far as is known; 0: not known.
    #[serde(default)]
    pub total_bytes: u64,
    /// Bytes a second now.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// The pass over memory that is being made, from 1; 0 where there are none.
    #[serde(default)]
    pub round: u64,
    /// How fast the guest rewrites memory, in bytes a second; 0: not known.
    #[serde(default)]
    pub dirty_bytes_per_second: u64,
    /// Milliseconds left, as far as can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_ms: Option<u64>,
}

/// What an operation that succeeded has to say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "of", rename_all = "kebab-case")]
pub enum OperationResult {
    /// Nothing more than that it is done.
    Done,
    /// A snapshot was taken.
    Snapshot {
        /// Which.
        snapshot: SnapshotId,
        /// What it cost.
        facts: SnapshotFacts,
    },
    /// A snapshot was deleted.
    SnapshotDeleted {
        /// What that freed.
        facts: DeletionFacts,
    },
    /// A VM was put back.
    Restore {
        /// To which snapshot.
        snapshot: SnapshotId,
        /// The snapshot that undoes it, if one was taken.
        undo: Option<SnapshotId>,
        /// What it cost.
        facts: RestoreFacts,
    },
    /// A VM was made from a snapshot.
    Clone {
        /// The snapshot that it was made from.
        snapshot: SnapshotId,
        /// What it cost.
        facts: CloneFacts,
    },
    /// A snapshot was looked at.
    Verification {
        /// Which.
        snapshot: SnapshotId,
        /// What was found.
        verification: Verification,
        /// What reading it has shown.
        facts: VerificationFacts,
    },
    /// A snapshot was put into a repository.
    Export {
        /// Which.
        snapshot: SnapshotId,
        /// What it cost.
        facts: ExportFacts,
    },
    /// A VM was made from a backup.
    Import {
        /// The backup's id in its repository.
        backup: String,
        /// What it cost.
        facts: ImportFacts,
    },
    /// A VM was moved.
    Migration {
        /// What was measured.
        report: MigrationReport,
    },
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// What it does.
    pub kind: OperationKind,
    /// The VM it changes, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// The image it changes, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// The segment of what it changes; none: that is in none. It says who may see the operation when that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<SegmentId>,
    /// What it is about, in words (`default/books`).
    pub subject: String,
    /// Who asked for it.
    pub actor: String,
    /// Where it stands.
    pub state: OperationState,
    /// How far it is.
    pub progress: Progress,
    /// Names of the steps that are done, in order.
    pub steps_done: Vec<String>,
    /// Somebody asked for it to stop.
    pub cancel_requested: bool,
    /// What it has to say, when it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<OperationResult>,
    /// Why it failed or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}
