//! What each kind of operation does: one file a noun, each beginning with its list of steps.
//!
//! [`vm`] holds what the workflows about VMs have in common, [`addresses`] and [`image`] what they need of networks and
//! images.

pub mod addresses;
pub mod image;

pub mod vm;

pub mod create;
mod reach;
mod user_data;
mod wish;

pub mod power;

pub mod snapshot;

pub mod restore;

pub mod clone;

pub mod verify;

pub mod export;

pub mod import;

pub mod migration;

pub mod delete;

use berth_model::operation::OperationKind;

/// Whether an operation of this kind that succeeds puts an end to the trouble that a VM was in.
pub(crate) const fn makes_well(kind: OperationKind) -> bool {
    match kind {
        OperationKind::VmCreate
        | OperationKind::VmStart
        | OperationKind::VmRestart
        | OperationKind::VmMigrate
        | OperationKind::SnapshotRestore => true,
        OperationKind::VmShutdown
        | OperationKind::VmStop
        | OperationKind::VmPause
        | OperationKind::VmResume
        | OperationKind::VmDelete
        | OperationKind::SnapshotCreate
        | OperationKind::SnapshotClone
        | OperationKind::SnapshotVerify
        | OperationKind::SnapshotExport
        | OperationKind::SnapshotImport
        | OperationKind::SnapshotDelete
        | OperationKind::ImageDelete => false,
    }
}
