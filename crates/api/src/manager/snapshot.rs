//! What is asked of snapshots: to be taken, compared, gone back to, and made VMs of.

use berth_model::name::Name;
use berth_model::snapshot::SnapshotExtent;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Wish for a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct CreateSnapshot {
    /// Its name; none: made of the time.
    #[serde(default)]
    pub name: Option<Name>,
    /// A word about it.
    #[serde(default)]
    pub note: String,
    /// How much of the VM it is to hold.
    #[serde(default)]
    pub extent: SnapshotExtent,
}

/// What to compare a snapshot with, and how.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DiffQuery {
    /// The later snapshot (id or name); none: the one that the VM is at.
    #[serde(default)]
    pub to: Option<String>,
    /// Read all files, also those whose size and times agree.
    #[serde(default)]
    pub content: Option<bool>,
    /// How many changes of files to list, at most [`DIFF_LIST_MAX`]; all are counted.
    #[serde(default)]
    pub limit: Option<u32>,
}

/// Most changes of files that one answer lists.
pub const DIFF_LIST_MAX: u32 = 10_000;

/// Where to put a VM back to.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct RestoreVm {
    /// The snapshot (id or name); none: the baseline.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Don't take an undo snapshot first.
    #[serde(default)]
    pub no_undo: bool,
    /// Go back to the newest undo snapshot, which takes back the newest restore; no snapshot is named then.
    #[serde(default)]
    pub newest_undo: bool,
    /// Hold the guest afterwards, though it ran then.
    #[serde(default)]
    pub paused: bool,
    /// Also when the snapshot failed its last verification.
    #[serde(default)]
    pub force: bool,
    /// The host (id or name) on which it is put back, to which it moves; none: the one it is on. Takes `vm.migrate` on the
    /// VM as well.
    #[serde(default)]
    pub host: Option<String>,
}

/// How to verify a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct VerifySnapshot {
    /// Not only read it: start a clone without a network from it and wait until its guest is ready.
    #[serde(default)]
    pub boot: bool,
}

/// Wish for a new VM that is made from a snapshot.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CloneSnapshot {
    /// The new VM's name.
    pub name: Name,
    /// The segment that it is to be in (id or name); none: the snapshot's. In another segment nothing is shared, and it
    /// takes `snapshot.memory` on the snapshot as well.
    #[serde(default)]
    pub segment: Option<String>,
    /// Start from the snapshot's disk alone, as after a power cut.
    #[serde(default)]
    pub cold: bool,
    /// Hold the guest where the snapshot left it.
    #[serde(default)]
    pub paused: bool,
}
