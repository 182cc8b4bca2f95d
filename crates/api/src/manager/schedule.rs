//! Schedules, as they are asked for and shown.

use berth_model::name::Name;
use berth_model::schedule::reserve::PoolRoom;
use berth_model::schedule::{Cron, Keep, Part, Schedule, Zone};
use berth_model::snapshot::SnapshotExtent;
use berth_model::{SnapshotId, Timestamp, VmId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Which schedules.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ScheduleListQuery {
    /// Only those of this segment (id or name).
    #[serde(default)]
    pub segment: Option<String>,
    /// Most items in the answer.
    #[serde(default)]
    pub limit: Option<u32>,
    /// Where the last page ended: its `next_cursor`.
    #[serde(default)]
    pub cursor: Option<String>,
}

/// Wish for a schedule, of a segment or of one VM.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateSchedule {
    /// Its name, unique in its segment.
    pub name: Name,
    /// The segment (id or name) whose VMs it is about, those of the segments inside it counted.
    #[serde(default)]
    pub segment: Option<String>,
    /// The one VM that it is about (id or `segment/name`), instead.
    #[serde(default)]
    pub vm: Option<String>,
    /// When: five fields of cron.
    pub cron: Cron,
    /// By which clock; none: UTC.
    #[serde(default)]
    pub timezone: Option<Zone>,
    /// What is kept of what it takes.
    pub keep: Keep,
    /// How much of a VM each snapshot is to hold.
    #[serde(default)]
    pub extent: SnapshotExtent,
}

/// A change of a schedule; what is absent stays.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct UpdateSchedule {
    /// Another name.
    #[serde(default)]
    pub name: Option<Name>,
    /// When: five fields of cron.
    #[serde(default)]
    pub cron: Option<Cron>,
    /// By which clock.
    #[serde(default)]
    pub timezone: Option<Zone>,
    /// What is kept of what it takes.
    #[serde(default)]
    pub keep: Option<Keep>,
}

/// A schedule with what comes next and what was.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ScheduleReport {
    /// The schedule; when it was only tried, as it would be.
    pub schedule: Schedule,
    /// When it will run next; empty while it is paused.
    pub next_runs: Vec<Timestamp>,
    /// The VMs that it is about now, as far as the caller may see them.
    pub vms: Vec<ScheduledVm>,
    /// What its rule would delete at this moment.
    pub would_delete: Vec<Doomed>,
    /// How many snapshots there are that it took.
    pub snapshots: u64,
    /// What these occupy, in bytes.
    pub stored_bytes: u64,
    /// The pools that they are in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<PoolRoom>,
    /// Why it can't do anything now, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
}

/// A VM that a schedule is about.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ScheduledVm {
    /// The VM.
    pub vm: VmId,
    /// `segment/name`.
    pub name: String,
    /// Its part in the last run that it was in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Part>,
}

/// A snapshot that a rule keeps no longer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Doomed {
    /// Of which VM.
    pub vm: VmId,
    /// `segment/name`.
    pub vm_name: String,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// What it is called.
    pub name: Name,
    /// When it was taken.
    pub taken_at: Timestamp,
    /// What it occupies by itself, in bytes.
    pub stored_bytes: u64,
}
