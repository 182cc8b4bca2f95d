//! Snapshots: a VM at one instant, kept.
//!
//! Snapshots of a VM form a tree: a snapshot's parent is what the VM was last at, by taking or by restoring, when it
//! was taken. The VM itself is the `NOW` under one of them. Restoring moves `NOW` and keeps everything else.

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::schedule::Occasion;
use crate::verification::Verification;
use crate::{LayerId, SnapshotId, Timestamp, VmId};

/// Why a snapshot exists, which says who may delete it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotKind {
    /// Taken by itself when the guest was first ready.
    Baseline,
    /// Asked for by somebody.
    Manual,
    /// Taken before a restore, so that it can be undone; expires by itself.
    Undo,
    /// Taken by a schedule, which deletes it when its rule keeps it no longer.
    Scheduled,
}

/// How much of a VM a snapshot is to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotExtent {
    /// Disk, memory and devices; of a VM without a process, its disk.
    #[default]
    Machine,
    /// The disk alone, at one instant of which the guest knows nothing: as after a power cut.
    Disk,
    /// The disk alone, with the guest's file systems flushed and frozen by its guest agent for that instant.
    Filesystem,
}

/// How the memory of a running guest is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureWay {
    /// While it runs, in passes over what it has written since; it is stopped for the last of it.
    #[default]
    PreCopy,
    /// As it was when it was stopped for a moment; what it is about to write to is taken first.
    Background,
}

/// How long an undo snapshot is kept, in milliseconds (24 h). Too short: a wrong restore noticed the next morning is
/// final. Too long: each restore costs the disk a memory image for longer.
pub const UNDO_KEPT_MS: u64 = 24 * 3600 * 1000;

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The VM it is of.
    pub vm: VmId,
    /// Its name, unique among the VM's snapshots.
    pub name: Name,
    /// Why it exists.
    pub kind: SnapshotKind,
    /// The run of a schedule that it was taken in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub occasion: Option<Occasion>,
    /// The snapshot that the VM was at before; none for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// Held against deletion.
    pub pinned: bool,
    /// A word from whoever took it.
    #[serde(default)]
    pub note: String,
    /// What was captured, as the agent reported it.
    pub facts: SnapshotFacts,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it is deleted by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// What the last look at it has shown; none: nobody has looked yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<Verification>,
}

/// What a capture measured and made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotFacts {
    /// Whether memory and device state were captured (the guest was running or paused).
    pub has_memory: bool,
    /// The frozen layers from the one just above the image to the newest.
    pub layers: Vec<LayerId>,
    /// The frozen layers of each data disk, from the lowest to the newest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<Vec<LayerId>>,
    /// How long the guest did not run, from QEMU's STOP to its RESUME event, in microseconds. Of a snapshot of a running
    /// VM's disk alone: how long its writes waited.
    pub paused_us: u64,
    /// How long the capture took in all, in milliseconds.
    pub total_ms: u64,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// What the memory image added to the disk, in bytes: neither zero pages nor what an earlier snapshot on the host
    /// holds cost anything.
    pub memory_stored_bytes: u64,
    /// What the files occupy, in bytes, that hold the rest of the memory and belong to an earlier snapshot as well.
    #[serde(default)]
    pub memory_shared_bytes: u64,
    /// What the newest frozen layers occupy, of all disks, in bytes.
    pub disk_stored_bytes: u64,
    /// Passes over memory that were needed.
    pub rounds: u64,
    /// How memory was taken. None: it was not, or an earlier snapshot had it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<CaptureWay>,
    /// The guest's file systems were flushed and frozen for the instant.
    #[serde(default)]
    pub quiesced: bool,
    /// What the guest's processors lost of their time while memory was taken, in percent of what they had just before.
    /// None: the guest hardly worked, or it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_slowdown_percent: Option<u32>,
}

impl SnapshotFacts {
    /// Of how many frozen layers the disk is that has most.
    pub fn longest_chain(&self) -> usize {
        self.data.iter().map(Vec::len).fold(self.layers.len(), usize::max)
    }
}

/// What became of a guest's clock after a restore, which put it back too.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum ClockSetting {
    /// Not known when the restore was over: it is tried for half a minute more.
    #[default]
    Pending,
    /// Set to the host's time by the guest agent.
    Set,
    /// No guest agent answered: the clock is where the snapshot was.
    NoAgent,
    /// The guest agent refused.
    Refused {
        /// In its words.
        reason: String,
    },
    /// The guest does not run.
    Held,
}

/// What deleting a snapshot frees and costs: forecast, or as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeletionFacts {
    /// What is free at once, in bytes: its memory, and the layers that nothing else needs.
    pub freed_bytes: u64,
    /// What is copied afterwards, in the background, to merge the layers that nobody needs apart any more, in bytes.
    pub merged_bytes: u64,
    /// What is free besides once that is done, in bytes.
    pub freed_later_bytes: u64,
    /// How long that takes at the pace of the host's merges so far, in milliseconds.
    pub merging_ms: u64,
}

/// What making a VM from a snapshot measured.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CloneFacts {
    /// From the agent's receipt of the command to QEMU saying that the guest runs, in microseconds; 0 when it does not.
    pub running_us: u64,
    /// What it shares with the VM that it was made from, as it occupies the disk, in bytes.
    pub shared_bytes: u64,
    /// What had to be copied for it, in bytes: everything, into another segment.
    pub copied_bytes: u64,
}

/// What a restore measured.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RestoreFacts {
    /// From the agent's receipt of the command to QEMU saying that the guest runs, in microseconds, undo snapshot
    /// not counted.
    pub running_us: u64,
    /// What the undo snapshot took before that, in microseconds; 0 if none was taken.
    pub undo_us: u64,
    /// Of a VM that was put back on another host: how long its guest ran on neither, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_us: Option<u64>,
    /// A process had been made ready before the command came.
    #[serde(default)]
    pub warm_process: bool,
    /// Pages that the new process had touched when its guest went on: those that its devices' state needed.
    #[serde(default)]
    pub pages_faulted: u64,
    /// What of the memory image is read ahead because earlier guests needed it first, in bytes; 0 before the first
    /// restore has shown it.
    #[serde(default)]
    pub working_set_bytes: u64,
    /// What became of the guest's clock.
    #[serde(default)]
    pub clock: ClockSetting,
}
